"""One run of a sweep: started, followed by what it writes after each epoch, and ended early if it is not worth it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tfdist.config.run_dir import RunDir, read_records
from tfdist.launcher.process.children import Reaper
from tfdist.reporting.record import as_number

_LOOK_SECS = 0.2
# To save its state; see `--grace_secs`.
_END_SECS = 60.0


class TrialRun:
    """A run of `tfdist.train` in a process of its own, which the reaper ends if this one dies."""

    def __init__(self, command: Sequence[str], run_dir: Path, env: Mapping[str, str], reaper: Reaper) -> None:
        self._run_dir = RunDir(run_dir)
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._log = run_dir.parent / f"{run_dir.name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                list(command),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        reaper.add(self._process.pid)

    def follow(
        self, metric: str, *, note: Callable[[int, float], bool], is_stopped: Callable[[], bool]
    ) -> tuple[int, bool]:
        """Waits for the end.

        Args:
            metric: Name of a number in `metrics.jsonl`.
            note: Told of an epoch, from 0, and its number; says whether the run is to be ended.
            is_stopped: Says whether all are to end.

        Returns:
            The exit code, and whether `note` has ended it.
        """
        num_seen, is_pruned = 0, False
        while not is_stopped():
            code = self._process.poll()
            for record in read_records(self._run_dir.metrics_file)[num_seen:]:
                num_seen += 1
                value = as_number(record.get(metric))
                if value is not None and note(int(record["epoch"]), value) and code is None and not is_pruned:
                    is_pruned = True
                    self.end()
                if is_stopped():
                    break
            else:
                if code is not None:
                    return code, is_pruned
                time.sleep(_LOOK_SECS)
        self.end()
        return self._process.wait(), is_pruned

    def end(self) -> None:
        """Asks it to save its state and end; kills it if it does not."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(_END_SECS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def names(self) -> set[str]:
        """The numbers that it writes after an epoch."""
        return {name for record in read_records(self._run_dir.metrics_file) for name in record}

    @property
    def last_line(self) -> str:
        """The last line that it has printed."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "(nothing)"


def build_command(flags: Sequence[str], run_dir: Path, launch: Sequence[str]) -> list[str]:
    """Returns the command of one run, by `tfdist.launch` where that has flags; else the run starts its own cluster."""
    train = ["tfdist.train", *flags, f"--run_dir={run_dir}", "--report=off", "--verbose=2"]
    return [sys.executable, "-m", *(["tfdist.launch", *launch, "-m"] if launch else []), *train]
