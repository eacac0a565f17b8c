"""Of what tasks die, and the words by which each is known."""

import dataclasses
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """Something of which tasks die.

    Attributes:
        pattern: What is found in how it ended, or in what it said.
        text: What it most likely was; `{line}` is the line in which that was found.
        remedy: What to do.
        issue: Where others have met it, as a link.
        is_echo: Whether it tells that another has died first.
    """

    pattern: str
    text: str
    remedy: str
    issue: str | None = None
    is_echo: bool = False


# The first that fits is taken, so the more telling come first.
CAUSES = (
    Cause(
        pattern=r"out of memory|OOM when allocating|ResourceExhausted|^MemoryError|Cannot allocate memory",
        text="out of memory: {line}",
        remedy="lower the batch (--global_batch_size), place fewer tasks on the machine, or use a larger one",
    ),
    Cause(
        pattern=r"^chaos: ",
        text="a failure made on purpose: {line}",
        remedy="leave --chaos out",
    ),
    Cause(
        pattern=r"lost its host",
        text="its machine or the way to it is gone: {line}",
        remedy="look whether it is up, then go on with --resume; --max_restarts does so by itself",
    ),
    Cause(
        pattern=r"is not finite in epoch|the loss became|NonFiniteError",
        text="NaN or infinity: {line}",
        remedy="look at the examples that it names; --on_nan=skip leaves such steps out",
    ),
    Cause(
        pattern=r"cannot be bound|[Aa]ddress already in use|Could not start gRPC server|cannot reserve",
        text="its port was taken: {line}",
        remedy="end the program that has it (ss -ltnp), or choose another port",
        issue="https://github.com/tensorflow/tensorflow/issues/39922",
    ),
    Cause(
        pattern=r"made no step for|was stopped for",
        text="it stood still: {line}",
        remedy="its log ends with its stacks: see what it waited for",
    ),
    Cause(
        pattern=r"ModuleNotFoundError|ImportError|No module named|SyntaxError|cannot start '\S*python",
        text="its Python lacks something, or is the wrong one: {line}",
        remedy="choose the right one by --python; `python -m tfdist.doctor` compares them",
    ),
    Cause(
        pattern=r"DataLossError|Invalid JPEG|DecodeError|\bin build_data\b",
        text="bad input: {line}",
        remedy="look at the file or example that its log names",
    ),
    Cause(
        pattern=r"lost the others|other tasks are gone|UnavailableError|no answer within",
        text="it lost a peer, or never found it: {line}",
        remedy="look at the logs of the others, and run `python -m tfdist.doctor` with the same hosts",
        is_echo=True,
    ),
    Cause(
        pattern=r"SIGSEGV|SIGABRT|SIGBUS|SIGILL",
        text="a crash in native code: {line}",
        remedy="run it again with PYTHONFAULTHANDLER=1, which shows where; compare the versions on all hosts",
    ),
    Cause(
        pattern=r"SIGKILL",
        text="killed by somebody else, or by the system for want of memory that nobody has counted",
        remedy="ask the system (dmesg | grep -i 'out of memory') and the scheduler",
    ),
    Cause(
        pattern=r"SIGTERM|SIGINT|SIGHUP|code 143",
        text="it was told to end: {line}",
        remedy="go on with --resume",
    ),
)


def find_cause(lines: Sequence[str]) -> tuple[Cause, str] | None:
    """Finds the most telling cause in what was said, in lines without blanks around them.

    Returns:
        The cause, and the line that tells it (of a traceback its last); None if there is none.
    """
    for cause in CAUSES:
        for line in reversed(lines):
            if re.search(cause.pattern, line):
                return cause, lines[-1] if line.startswith("File ") else line
    return None
