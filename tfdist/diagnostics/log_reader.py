"""Reads what a dead run has left, and says who died first, when, at which step, and of what."""

import contextlib
import dataclasses
import json
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfdist.diagnostics.causes import find_cause
from tfdist.diagnostics.findings import Finding
from tfdist.errors import PEER_LOST_CODE, ConfigError

_TASK = r"(?:chief|worker|ps):\d+"
# A line of the launcher's own log, as `tfdist.launcher.supervise.processes` writes it.
_NOTE = re.compile(r"([\d-]{10} [\d:]{8}) (.*)")
_END = re.compile(rf"(?P<task>{_TASK}) (?P<how>[^;]*?)(?: at step (?P<step>\d+))?(?P<rest>;.*)?$")
_ENDED = ("exited", "was killed", "was stopped", "lost ", "made no step")
_AGAIN = re.compile(r"^--- launched again .*$", re.MULTILINE)
_TRACEBACK = "Traceback (most recent call last):"
_TAIL_LINES = 200
_LINE_CHARS = 200
_LOSING = f"lost the others (exit code {PEER_LOST_CODE})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """How a task ended.

    Attributes:
        task: As in "worker:1".
        how: In the launcher's words, as "exited with code 1".
        time: When, as the launcher wrote it; "" if unknown.
        step: The last optimizer step it was seen at, or None.
    """

    task: str
    how: str
    time: str = ""
    step: int | None = None


def read_run(folder: str) -> list[Finding]:
    """Looks for the cause of a run's death.

    Args:
        folder: The run_dir.

    Returns:
        An error for the task that died first, and notes; only notes if none has died.

    Raises:
        ConfigError: If there are no logs.
    """
    logs = Path(folder) / "logs"
    outputs = {path.stem.replace("-", ":", 1): _read_last(path) for path in sorted(logs.glob("*-*.log"))}
    if not outputs:
        raise ConfigError(f"run_dir {folder!r} has no logs/*.log: name the folder of a run that was launched")
    told = logs / "launcher.log"
    notes = _last_try(told.read_text(errors="replace")) if told.is_file() else []
    first = find_first(notes) or (None if _has_verdict(notes) else _guess_first(logs, outputs))
    findings = [_describe_progress(Path(folder))]
    if first is None:
        return [_describe_no_failure(notes), *findings]
    chaos = [text for _, text in notes if text.startswith("chaos:") and f":{first.task}@" in text]
    return [explain(first, outputs.get(first.task, ""), chaos), *findings]


def find_first(notes: Sequence[tuple[str, str]]) -> End | None:
    """Finds the task that failed first in one try of a job.

    Args:
        notes: Times and texts of the launcher's own log.

    Returns:
        How it ended; None if the job went well, or the log does not say.
    """
    if notes and notes[-1][1] == "ended with code 0":
        return None
    ends: list[End] = []
    verdict = None
    for when, text in notes:
        match = _END.fullmatch(text)
        if match is None or not match["how"].startswith(_ENDED):
            continue
        if (match["rest"] or "").startswith("; whole output"):
            verdict = match["task"]
        elif not match["rest"] and match["how"] != "exited with code 0":
            step = int(match["step"]) if match["step"] else None
            ends.append(End(task=match["task"], how=match["how"], time=when, step=step))
    # The launcher's own verdict, at its last end; where the launcher died too, whoever did not only lose the others.
    judged = [end for end in ends if end.task == verdict]
    return judged[-1] if judged else min(ends, key=lambda end: end.how == _LOSING, default=None)


def explain(end: End, output: str, chaos: Sequence[str] = ()) -> Finding:
    """Says of what a task most likely died.

    Args:
        end: How it ended.
        output: What it printed.
        chaos: Failures that the launcher was told to make of it.

    Returns:
        One finding.
    """
    when = f", at {end.time}" if end.time else ""
    step = f", at step {end.step}" if end.step is not None else ""
    head = f"{end.task} died first{when}{step}: it {end.how}"
    lines = [line.strip() for line in output.splitlines() if line.strip()][-_TAIL_LINES:]
    cause, line = find_cause([end.how, *chaos]) or find_cause(lines) or (None, "")
    if cause is not None:
        text = f"{head}; most likely {cause.text.format(line=textwrap.shorten(line, _LINE_CHARS))}"
        return Finding(severity="error", text=text, remedy=cause.remedy, issue=cause.issue)
    what = "a Python exception" if _TRACEBACK in lines else "its last line"
    return Finding(
        severity="error",
        text=f"{head}; {what}: {lines[-1] if lines else '(nothing)'}",
        remedy="mend what it names; its log has the rest",
    )


def _last_try(text: str) -> list[tuple[str, str]]:
    notes = [match.groups() for line in text.splitlines() if (match := _NOTE.fullmatch(line))]
    starts = [i for i, (_, said) in enumerate(notes) if said.startswith("starting all: ")]
    return [(when, said) for when, said in notes[starts[-1] if starts else 0 :]]


def _has_verdict(notes: Sequence[tuple[str, str]]) -> bool:
    return bool(notes) and notes[-1][1].startswith("ended with code")


def _describe_no_failure(notes: Sequence[tuple[str, str]]) -> Finding:
    if notes and not _has_verdict(notes):
        text = f"no task has failed since {notes[0][0]}, and the launcher has not ended"
        return Finding(severity="note", text=text, remedy="it still runs, or was killed with all its tasks")
    text = "no task has failed, as far as the logs say"
    return Finding(severity="note", text=text, remedy="nothing is to be done")


def _guess_first(logs: Path, outputs: Mapping[str, str]) -> End | None:
    """Without the launcher's word: who complains, and not only of the others; of those, who fell silent first."""
    failed = []
    for task, output in outputs.items():
        lines = [line.strip() for line in output.splitlines() if line.strip()][-_TAIL_LINES:]
        cause = find_cause(lines)
        if cause or _TRACEBACK in lines:
            at = (logs / f"{task.replace(':', '-')}.log").stat().st_mtime
            failed.append((bool(cause and cause[0].is_echo), at, task))
    if not failed:
        return None
    _, at, task = min(failed)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    return End(task=task, how="ended, and nobody has noted how", time=when)


def _read_last(path: Path) -> str:
    """Returns what a task has printed since it was launched last."""
    return _AGAIN.split(path.read_text(errors="replace"))[-1]


def _describe_progress(folder: Path) -> Finding:
    records = []
    if (folder / "metrics.jsonl").is_file():
        for line in (folder / "metrics.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    num_checkpoints = len(list((folder / "checkpoints").glob("*.npz")))
    whole = (
        f"{records[-1]['epoch'] + 1} whole epochs, {records[-1]['step']} steps"
        if records
        else "no whole epoch"
    )
    remedy = "--resume goes on from the last" if num_checkpoints else "a new run starts from the beginning"
    return Finding(
        severity="note", text=f"it had made {whole}, and keeps {num_checkpoints} checkpoints", remedy=remedy
    )
