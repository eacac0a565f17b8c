"""`python -m tfdist.doctor`: looks for what will keep a run from working, and for what has ended one.

python -m tfdist.doctor --hosts=h1:2,h2                 # every host, by ssh
python -m tfdist.doctor --num_workers=2 --strategy=ps   # a cluster on this machine
python -m tfdist.doctor                                 # as one task, on each: TF_CONFIG says which
python -m tfdist.doctor logs runs/my_run                # who died first, and of what
"""

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence

from tfdist.diagnostics.findings import Finding, render_finding
from tfdist.diagnostics.flags import DoctorFlags, parse_flags
from tfdist.diagnostics.log_reader import read_run
from tfdist.diagnostics.survey import survey_here, survey_job
from tfdist.errors import TfdistError


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Without the program's name; None takes this process's own.

    Returns:
        0 if the run may start, 1 if there are errors (or the logs tell of a failure), 2 for a mistake in the flags.
    """
    logging.getLogger("tfdist").setLevel(logging.ERROR)  # what others are warned of is a finding here
    try:
        flags = parse_flags(sys.argv[1:] if args is None else args, os.environ, __doc__ or "")
        findings = _find(flags)
    except TfdistError as error:
        print(f"tfdist.doctor: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `| head` may have had enough
    print(_render_json(findings) if flags.is_json else _render(findings))
    return int(any(finding.severity == "error" for finding in findings))


def _find(flags: DoctorFlags) -> list[Finding]:
    if flags.logs_of is not None:
        return read_run(flags.logs_of)
    if flags.job is not None:
        return survey_job(flags.job)
    return survey_here(os.environ, flags.asked)


def _render_json(findings: Sequence[Finding]) -> str:
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1)


def _render(findings: Sequence[Finding]) -> str:
    has_errors = any(finding.severity == "error" for finding in findings)
    return "\n".join([*map(render_finding, findings), *([] if has_errors else ["no errors"])])


if __name__ == "__main__":
    sys.exit(main())
