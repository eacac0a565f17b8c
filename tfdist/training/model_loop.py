"""What every strategy's loop offers; where one process runs the program alone, much of it is nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tfdist.data.sources.source import Source
from tfdist.training.input_position import InputPosition
from tfdist.training.monitoring.input_wait import InputWait
from tfdist.training.plan import BatchPlan, FinishedStep


class Loop:
    """Runs epochs, evaluation and prediction of a built model.

    Attributes:
        num_replicas: Among how many a batch is divided.
        num_readers: Processes that run the program, each of which reads the data.
        epoch_logs: Of the last epoch.
        input_wait: Of the epoch so far.
    """

    num_replicas = 1
    num_readers = 1

    def __init__(self) -> None:
        self.epoch_logs: dict[str, Any] = {}
        self.input_wait = InputWait()
        self._position = InputPosition()

    @property
    def step_secs(self) -> float | None:
        """How long a step took lately, alike on all workers; None where nobody knows."""
        raise NotImplementedError

    def start(self) -> None:
        """Prepares for training with the weights that the model has now."""
        self.release()

    def release(self) -> None:
        """Lets go of the data."""
        self._position.forget()

    def shard_source_of(self, source: Source, shard: str) -> Source:
        """Returns what of a source this process reads."""
        return source

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Trains over the plan's steps, yielding once a finished step, with the logs where `plan.wants_logs`."""
        raise NotImplementedError

    def evaluate(self, source: Source, plan: BatchPlan) -> dict[str, Any]:
        """Returns the metrics over the plan's steps."""
        raise NotImplementedError

    def predict(self, source: Source, plan: BatchPlan) -> Any:
        """Returns the outputs as arrays in the data's order, on every process."""
        raise NotImplementedError

    def measures(self) -> dict[str, Any]:
        """Returns what this strategy alone measures of the epoch so far, by the names that `metrics.jsonl` has."""
        raise NotImplementedError

    def snapshot_metrics(self) -> list[Any]:
        """Brings the replicas together, and returns the metrics' state so far; every process must call it."""
        raise NotImplementedError

    def snapshot_sync(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint must hold of the way in which workers share, by name."""
        return {}

    def restore_sync(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `snapshot_sync` returned."""

    def snapshot_input(self) -> bytes:
        """Returns where the stream stands that is trained on; empty where that cannot be saved."""
        return self._position.save()

    @property
    def metric_origins(self) -> list[np.ndarray]:
        """What the processes' parts of the metrics' state are counted from."""
        raise NotImplementedError

    def own_metrics(self) -> list[Any]:
        """Returns this process's part of the metrics' state, from its origin."""
        raise NotImplementedError

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""
        return values

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the bytes of the process with that number on every process."""
        return content

    def meet(self) -> None:
        """Returns once every process has called it, and needs nothing of the others for what came before."""
