"""`python -m tfdist.report`: writes a page of HTML that tells of a run, or of several side by side.

python -m tfdist.report runs/my_run                        # writes runs/my_run/report.html
python -m tfdist.report runs/a runs/b --output=both.html   # compares them
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tfdist.config.parser import OneLineParser
from tfdist.errors import TfdistError
from tfdist.reporting.write import write_report


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Without the program's name; None takes this process's own.

    Returns:
        0, or 2 for a mistake in the flags.
    """
    parser = OneLineParser(prog="tfdist.report", usage=__doc__, allow_abbrev=False)
    parser.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="folders of runs, also of such that died"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the page (default: report.html in the one folder, or here)"
    )
    try:
        flags = parser.parse_args(sys.argv[1:] if args is None else args)
        path = write_report(flags.run_dirs, flags.output)
    except TfdistError as error:
        print(f"tfdist.report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"the report is in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
