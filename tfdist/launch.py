"""`python -m tfdist.launch`: starts a cluster that runs a script, a module or a program."""

import os
import sys
from collections.abc import Sequence

from tfdist.errors import TfdistError
from tfdist.launcher.flags import parse_flags


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Without the program's name; None takes this process's own.

    Returns:
        The job's exit code; 2 if the command line cannot be honoured.
    """
    try:
        flags = parse_flags(sys.argv[1:] if args is None else args, os.environ)
        if flags.dry_run:
            print(flags.backend.render(flags.job, flags.place), end="")
            return 0
        return flags.backend.run(flags.job, flags.place)
    except TfdistError as error:
        print(f"tfdist.launch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tfdist.launch: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
