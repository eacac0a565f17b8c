"""What every test shares: a quiet TensorFlow, no cluster in the environment, and no process left behind."""

import os
import re
import signal
import time
from pathlib import Path

import programs
import pytest

pytest_plugins = ["tiers"]

# Read by TensorFlow when it is first imported, so set before any test module is.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as all tasks have it: plain Keras shall round as they do
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
# A scheduler's variables would make every test believe that it is one task of a job.
_FOREIGN = re.compile(
    r"^(TF_CONFIG$|TFDIST_|SLURM_|OMPI_|PMI_|PMIX_|MPI_LOCAL|SM_|CLUSTER_SPEC$|KUBERNETES_|JOB_COMPLETION_INDEX$)"
)
for _name in [name for name in os.environ if _FOREIGN.match(name)]:
    del os.environ[_name]

os.environ["TFDIST_REPORT"] = "off"  # a second of every run; those that read one say so

# Every process that a test starts inherits this, however far it is from us and whoever its parent has become.
_MARK = f"TFDIST_TEST_SESSION={os.getpid()}-{time.time_ns()}"
os.environ.update([_MARK.split("=")])

_GRACE_SECS = 5.0
# Between two looks at all processes of the machine, which cost some milliseconds.
_LOOK_SECS = 1.0
_first_seen: dict[int, str] = {}
_looked_at = 0.0


def _parent_and_state(pid: int) -> tuple[int, str]:
    # The command name may hold spaces and brackets: the fields that matter start after its last bracket.
    state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    return int(parent), state


def _living_descendants() -> set[int]:
    """Pids of processes that this test run started and that still run; zombies have ended."""
    parents, marked = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            parent, state = _parent_and_state(pid)
            if state in "ZX":
                continue
            parents[pid] = parent
            if _MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                marked.add(pid)
        except (OSError, ValueError):  # It ended while we looked, or belongs to another user.
            continue
    found = {os.getpid()} | marked
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()} - _python_own_children() - {programs.server_pid()}


def _python_own_children() -> set[int]:
    # multiprocessing starts this one behind the caller's back, and ends it when the interpreter ends.
    from multiprocessing import resource_tracker  # inside: most test runs never use multiprocessing

    return {getattr(resource_tracker._resource_tracker, "_pid", None) or 0}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "(ended)"


def pytest_runtest_logfinish(nodeid: str) -> None:
    global _looked_at
    if time.monotonic() < _looked_at + _LOOK_SECS:
        return
    for pid in _living_descendants():
        _first_seen.setdefault(pid, nodeid)
    _looked_at = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run, and ends what it left, when a process that a test started is still there."""
    programs.stop()
    deadline = time.monotonic() + _GRACE_SECS
    while (left := _living_descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not left:
        return
    report = [
        f"  pid {pid}, seen after {_first_seen.get(pid, 'the end')}: {_command(pid)}" for pid in sorted(left)
    ]
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    session.config.stash[_LEFT_BEHIND] = report


_LEFT_BEHIND = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if report := config.stash.get(_LEFT_BEHIND, None):
        terminalreporter.section("processes left behind (killed now)", red=True)
        terminalreporter.write_line("\n".join(report))
