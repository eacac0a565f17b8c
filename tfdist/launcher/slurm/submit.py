"""Submits a job to Slurm, and shows its output until it ends."""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tfdist.errors import ConfigError, LaunchError
from tfdist.launcher.job import Job
from tfdist.launcher.process.logs import say
from tfdist.launcher.process.signals import SignalInbox
from tfdist.launcher.slurm.script import Allocation, render_sbatch

_LOOK_SECS = 1.0
_TRIES = 30
_TAIL_LINES = 20
_ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
)  # fmt: skip
_FIRST = re.compile(r"tfdist: task (\d+) on \S+ was the first to fail, with exit code \d+")


def run_slurm(job: Job, allocation: Allocation) -> int:
    """Submits a job, shows its output until it ends, and cancels it when this process is told to end.

    Returns:
        0 if the job ended well; else the exit code of the task that failed first, or 128 + n for signal n.

    Raises:
        ConfigError: If the job cannot be rendered, or its run_dir not be made.
        LaunchError: If Slurm is missing or refuses.
    """
    script = render_sbatch(job, allocation)
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on the PATH: run this on a login node of a Slurm cluster, or use --dry_run"
        )
    if job.run_dir:
        _make_folder(job.run_dir)
    job_id = _slurm("sbatch", "--parsable", stdin=script).partition(";")[0]
    output = Path(_read_job(job_id)["StdOut"])
    say(f"job {job_id}, output in {output}; Ctrl-C cancels it")
    with SignalInbox(lambda: None) as inbox:
        try:
            fields = _follow(job_id, output, inbox)
        except BrokenPipeError:  # nobody reads our output any more, as after `| head`
            inbox.received.append(signal.SIGPIPE)
            # What is still buffered would raise again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if inbox.received:
            say(f"{inbox.received[0].name}: cancelling job {job_id}")
            _slurm("scancel", job_id)
            return 128 + inbox.received[0]
    return _report(job_id, fields, output)


def _make_folder(run_dir: str) -> None:
    """Makes the folder in which the log will lie: Slurm makes none."""
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir {run_dir!r} cannot be made ({error.strerror}): choose another --run_dir"
        ) from None


def _follow(job_id: str, output: Path, inbox: SignalInbox) -> dict[str, str]:
    """Copies what the job writes, until it has ended or a signal arrives."""
    position, state = 0, ""
    while True:
        fields = _read_job(job_id)
        position = _show(output, position)
        if fields["JobState"] in _ENDED:
            return fields
        if fields["JobState"] != state:
            state = fields["JobState"]
            reason = f" ({fields['Reason']})" if fields.get("Reason", "None") != "None" else ""
            say(f"job {job_id} is {state.lower()}{reason}")
        if inbox.received:
            return fields
        select.select([inbox], [], [], _LOOK_SECS)


def _show(output: Path, position: int) -> int:
    """Writes what a file has gained since it was this long."""
    try:
        with output.open("rb") as file:
            file.seek(position)
            while data := file.read(2**16):
                sys.stdout.buffer.write(data)
            sys.stdout.flush()
            return file.tell()
    except FileNotFoundError:  # it has not started
        return position


def _report(job_id: str, fields: dict[str, str], output: Path) -> int:
    """Shows the first cause, as the last thing, and gives the job's exit code."""
    code, _, number = fields["ExitCode"].partition(":")
    exit_code = int(code) or (128 + int(number) if int(number) else 0)
    state = fields["JobState"]
    if state == "COMPLETED":
        return exit_code
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    found = [match for line in lines if (match := _FIRST.fullmatch(line))]
    if found:
        task = found[-1][1]
        say(f"the last lines of task {task}, the first to fail:")
        prefix = re.compile(rf" *{task}: ")  # srun pads the numbers to one width
        for line in [line for line in lines if prefix.match(line)][-_TAIL_LINES:]:
            print(line, file=sys.stderr)
    say(f"job {job_id} ended as {state.lower()}, exit code {exit_code or 1}; whole output: {output}")
    return exit_code or 1


def _read_job(job_id: str) -> dict[str, str]:
    """Asks for a job's state, patiently: a busy controller times out."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(LaunchError):
            return _parse_job(_slurm("scontrol", "show", "job", "--oneliner", job_id))
        time.sleep(_LOOK_SECS)
    return _parse_job(_slurm("scontrol", "show", "job", "--oneliner", job_id))


def _parse_job(text: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+\S+=|$)", text))


def _slurm(*words: str, stdin: str = "") -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise LaunchError(f"{words[0]} failed: {error}")
    return done.stdout.strip()
