"""What a launcher has seen and done, one JSON object a line in `logs/launcher.jsonl`, beside the log for people."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job.

    Attributes:
        kind: `start` (all tasks are started), `exit` (a task has ended), `chaos` (a failure was made on purpose),
            `verdict` (the task that failed first), `end` (all have ended), or `note` (anything else).
        text: The line that people read.
        at: When, in seconds since 1970.
        task: Of which task, as in "worker:1"; None: of the whole job.
        how: How it ended, as in "exited with code 1".
        exit_code: Of the task, or of the job; 128 + n for signal n.
        step: The last optimizer step it was seen at; None if it was at none.
    """

    kind: str = "note"
    text: str = ""
    at: float = dataclasses.field(default_factory=time.time)
    task: str | None = None
    how: str = ""
    exit_code: int | None = None
    step: int | None = None

    @property
    def clock(self) -> str:
        """When it happened, by this machine's clock, as in "2026-11-21 10:00:01"."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.at))


def note_event(run_dir: str, event: Event) -> None:
    """Adds an event to both logs of a run; a full disk must not end what is being watched."""
    values = {name: value for name, value in dataclasses.asdict(event).items() if value not in (None, "")}
    logs = Path(run_dir) / "logs"
    for name, line in (
        ("launcher.log", f"{event.clock} {event.text}"),
        ("launcher.jsonl", json.dumps(values)),
    ):
        with contextlib.suppress(OSError), open(logs / name, "a", encoding="utf-8") as log:
            log.write(f"{line}\n")


def read_events(run_dir: str) -> list[Event]:
    """Returns what a launcher has noted, the oldest first; what is not a whole record is left out."""
    path = Path(run_dir) / "logs" / "launcher.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError):  # half a line, or that of another version
            events.append(Event(**json.loads(line)))
    return events
