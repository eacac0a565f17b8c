"""`python -m tfdist.report`: writes a page of HTML that tells of a run, or of several side by side.

python -m tfdist.report runs/my_run                        # writes runs/my_run/report.html
python -m tfdist.report runs/a runs/b --output=both.html   # compares them
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tfdist.config.parser import OneLineParser
from tfdist.config.run_dir import write_named
from tfdist.errors import TfdistError


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


def write_report(run_dirs: Sequence[str], output: str | None = None) -> Path:
    """Writes the page.

    Args:
        run_dirs: The runs' folders.
        output: The file; None: `report.html` in the folder, of several here. One that exists is replaced.

    Raises:
        ConfigError: If a folder holds no run, or the page cannot be written.
    """
    # Here: drawing takes half a second to import, and `--help` none.
    from tfdist.reporting.page import render_page
    from tfdist.reporting.record import read_record

    records = [read_record(folder) for folder in run_dirs]
    path = (
        Path(output).expanduser()
        if output
        else Path(run_dirs[0] if len(run_dirs) == 1 else ".") / "report.html"
    )
    write_named(path, render_page(records), flag="output")
    return path


if __name__ == "__main__":
    sys.exit(main())
