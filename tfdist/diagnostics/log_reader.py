"""Reads what a dead run has left, and says who died first, when, at which step, and of what."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfdist.config.run_dir import RunDir, read_records
from tfdist.diagnostics.causes import find_cause
from tfdist.diagnostics.findings import Finding
from tfdist.errors import PEER_LOST_CODE, ConfigError
from tfdist.launcher.events import Event, read_events

_AGAIN = re.compile(r"^--- launched again .*$", re.MULTILINE)
_TRACEBACK = "Traceback (most recent call last):"
_TAIL_LINES = 200
_LINE_CHARS = 200


def read_run(folder: str) -> list[Finding]:
    """Looks for the cause of a run's death.

    Returns:
        An error for the task that died first, and notes; only notes if none has died.

    Raises:
        ConfigError: If there are no logs.
    """
    logs = Path(folder) / "logs"
    outputs = {path.stem.replace("-", ":", 1): _read_last(path) for path in sorted(logs.glob("*-*.log"))}
    if not outputs:
        raise ConfigError(f"run_dir {folder!r} has no logs/*.log: name the folder of a run that was launched")
    events = _last_try(read_events(folder))
    first = find_first(events) or (None if _has_ended(events) else _guess_first(logs, outputs))
    findings = [_describe_progress(Path(folder))]
    if first is None:
        return [_describe_no_failure(events), *findings]
    chaos = [event.text for event in events if event.kind == "chaos" and event.task == first.task]
    return [explain(first, outputs.get(str(first.task), ""), chaos), *findings]


def find_first(events: Sequence[Event]) -> Event | None:
    """Finds the task that failed first in one try of a job, by what the launcher has noted.

    Returns:
        How it ended; None if the job went well, or the launcher does not say.
    """
    if _has_ended(events) and events[-1].exit_code == 0:
        return None
    ends = [event for event in events if event.kind == "exit" and event.exit_code != 0]
    verdict = next((event.task for event in reversed(events) if event.kind == "verdict"), None)
    # The launcher's own verdict, at its last end; where the launcher died too, whoever did not only lose the others.
    judged = [event for event in ends if event.task == verdict]
    return judged[-1] if judged else min(ends, key=lambda end: end.exit_code == PEER_LOST_CODE, default=None)


def explain(end: Event, output: str, chaos: Sequence[str] = ()) -> Finding:
    """Says of what a task most likely died, by its end, its output and the failures that were made on purpose."""
    step = f", at step {end.step}" if end.step is not None else ""
    head = f"{end.task} died first, at {end.clock}{step}: it {end.how}"
    lines = [line.strip() for line in output.splitlines() if line.strip()][-_TAIL_LINES:]
    cause, line = find_cause([end.how, *chaos]) or find_cause(lines) or (None, "")
    if cause is not None:
        text = f"{head}; most likely {cause.text.format(line=textwrap.shorten(line, _LINE_CHARS))}"
        return Finding("error", text, cause.remedy, cause.issue)
    what = "a Python exception" if _TRACEBACK in lines else "its last line"
    text = f"{head}; {what}: {lines[-1] if lines else '(nothing)'}"
    return Finding("error", text, "mend what it names; its log has the rest")


def _last_try(events: Sequence[Event]) -> list[Event]:
    starts = [i for i, event in enumerate(events) if event.kind == "start"]
    return list(events[starts[-1] if starts else 0 :])


def _has_ended(events: Sequence[Event]) -> bool:
    return bool(events) and events[-1].kind == "end"


def _describe_no_failure(events: Sequence[Event]) -> Finding:
    if events and not _has_ended(events):
        text = f"no task has failed since {events[0].clock}, and the launcher has not ended"
        return Finding("note", text, "it still runs, or was killed with all its tasks")
    return Finding("note", "no task has failed, as far as the logs say", "nothing is to be done")


def _guess_first(logs: Path, outputs: Mapping[str, str]) -> Event | None:
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
    return Event(kind="exit", task=task, how="ended, and nobody has noted how", at=at)


def _read_last(path: Path) -> str:
    """Returns what a task has printed since it was launched last."""
    return _AGAIN.split(path.read_text(errors="replace"))[-1]


def _describe_progress(folder: Path) -> Finding:
    records = read_records(RunDir(folder).metrics_file)
    num_checkpoints = len(list((folder / "checkpoints").glob("*.npz")))
    whole = "no whole epoch"
    if records:
        whole = f"{records[-1]['epoch'] + 1} whole epochs, {records[-1]['step']} steps"
    remedy = "--resume goes on from the last" if num_checkpoints else "a new run starts from the beginning"
    return Finding("note", f"it had made {whole}, and keeps {num_checkpoints} checkpoints", remedy)
