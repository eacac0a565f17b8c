"""Evaluates the checkpoints of a run as they come, beside its training: `--mode=follow`."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from tfdist.api.run import Run
from tfdist.commands.companion import LAST_VARIABLE, PARENT_VARIABLE
from tfdist.commands.keep_best import KeepBest
from tfdist.config.run_config import RunConfig
from tfdist.config.run_dir import RunDir, append_record, read_records
from tfdist.errors import ConfigError
from tfdist.training.checkpoint.snapshot import Snapshot, apply_snapshot, read_checkpoint
from tfdist.training.checkpoint.store import Checkpoints
from tfdist.training.metrics import single_numbers
from tfdist.training.monitoring.callbacks import TensorBoardScalars

_log = logging.getLogger("tfdist")
_LOOK_SECS = 0.2


class Follower:
    """Evaluates each checkpoint once, the oldest first, until the run is over.

    Lines go to `eval.jsonl`, the numbers of whole epochs to TensorBoard too. Checkpoints that training removes before
    their turn are passed over.

    Args:
        run: Of one device.
        model: Built, as the run's.
        test: What is evaluated on.
        config: The run's.
        say: Takes a line for each.
    """

    def __init__(
        self, run: Run, model: keras.Model, test: Any, config: RunConfig, say: Callable[[str], None]
    ) -> None:
        self._run, self._model, self._test, self._say = run, model, test, say
        self._batch_size = config.global_batch_size
        self._run_dir = RunDir(Path(config.run_dir))
        self._checkpoints = Checkpoints(directory=self._run_dir.checkpoints_dir)
        self._done = {str(line.get("checkpoint")) for line in read_records(self._run_dir.evaluations_file)}
        self._callbacks: list[Any] = [TensorBoardScalars(run_dir=self._run_dir)]
        if config.keep_best is not None:
            self._callbacks.append(KeepBest(run_dir=self._run_dir, metric=config.keep_best))
        for callback in self._callbacks:
            callback.set_model(model)
        self._is_told = bool(os.environ.get(LAST_VARIABLE))
        self._parent = int(os.environ.get(PARENT_VARIABLE, "0"))

    def follow(self) -> None:
        """Evaluates until the run is over, or SIGTERM says that no more will come."""
        signal.signal(signal.SIGTERM, self._note_told)
        while not self._is_orphan:
            is_over = self._is_over()  # first: what came before it is still to be evaluated
            path = next((p for p in reversed(self._checkpoints.files()) if p.name not in self._done), None)
            if path is not None:
                self._done.add(path.name)
                self._take(path)
            elif is_over:
                return
            else:
                time.sleep(_LOOK_SECS)

    def _note_told(self, number: int, frame: Any) -> None:
        del number, frame
        self._is_told = True

    @property
    def _is_orphan(self) -> bool:
        return bool(self._parent) and os.getppid() != self._parent

    def _is_over(self) -> bool:
        # Who has started this process tells; if that is not the run, the run's last file does.
        return self._is_told or (not self._parent and self._run_dir.results_file.exists())

    def _take(self, path: Path) -> None:
        try:
            snapshot = read_checkpoint(path)
        except FileNotFoundError:
            return
        except (ConfigError, OSError) as error:
            _log.warning("%s It is not evaluated.", error)
            return
        if snapshot.epoch or snapshot.step:  # else nothing is trained yet
            self._evaluate(snapshot, path.name)

    def _evaluate(self, snapshot: Snapshot, name: str) -> None:
        start = time.monotonic()
        apply_snapshot(snapshot, self._model, with_optimizers=False)
        results = self._run.evaluate(
            self._model, self._test, batch_size=self._batch_size, verbose=0, return_dict=True
        )
        logs = {f"val_{metric}": value for metric, value in results.items()}
        epoch = snapshot.epoch if snapshot.step else snapshot.epoch - 1
        line: dict[str, Any] = {"epoch": epoch, "step": _count_steps(snapshot), "checkpoint": name}
        line |= {"secs": round(time.monotonic() - start, 3), "time": round(time.time(), 3)}
        if not snapshot.step:
            for callback in self._callbacks:
                callback.on_epoch_end(epoch, logs)
        # Last: one that was killed before is evaluated again.
        append_record(self._run_dir.evaluations_file, line | logs)
        numbers = {n: number for log in logs.items() for n, number in single_numbers(*log).items()}
        where = f" step {snapshot.step}" if snapshot.step else ""
        shown = "  ".join(f"{n} {number:.4f}" for n, number in numbers.items())
        self._say(f"evaluator: epoch {epoch + 1}{where}: {shown}")


def _count_steps(snapshot: Snapshot) -> int | None:
    """Returns the optimizer steps since the run began."""
    names = [name for name in snapshot.variables if re.search(r"\biterations?$", name)]
    return int(snapshot.variables[names[0]]) if names else None
