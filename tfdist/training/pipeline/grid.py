"""Which stage of which copy of the model each process is, and what the processes tell each other."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.cluster.spec import Cluster, split_address
from tfdist.errors import ConfigError
from tfdist.runtime.strategies import StagedStrategy, wait_for_workers
from tfdist.training.step.replicas import Replicas

# Far from the keys that TensorFlow gives its own groups and tensors, and from those of pairs of workers.
_COPY_KEYS = 1 << 24
_NUMBERS = itertools.count()


class Grid:
    """The processes of a run: copies of the model side by side, each a line of stages.

    Args:
        strategy: The run's.
        cluster: With this process's task.
        num_stages: Of each copy; None: one copy.

    Attributes:
        rank: This process's place in the cluster.
        num_stages: Of each copy.
        num_copies: Of the model.
        stage: This process's, zero-based: neighbours in the cluster are neighbours in the line.
        copy: Which it is a part of.
        tasks: In the order of their places.
        hosts: Where they are.

    Raises:
        ConfigError: If the processes make no whole number of copies.
    """

    def __init__(self, strategy: StagedStrategy, cluster: Cluster, num_stages: int | None) -> None:
        assert cluster.task is not None
        self.tasks = [str(task) for task in cluster.tasks]
        self.hosts = [split_address(cluster.address(task))[0] for task in cluster.tasks]
        size = len(self.tasks)
        self.num_stages = num_stages or size
        if size % self.num_stages:
            raise ConfigError(
                f"num_stages={self.num_stages} with {size} workers: they make no whole number of copies of the model; "
                f"give a multiple of {self.num_stages} workers."
            )
        self.num_copies = size // self.num_stages
        self.rank = cluster.tasks.index(cluster.task)
        self.copy, self.stage = divmod(self.rank, self.num_stages)
        self._strategy = strategy
        self._replicas = Replicas(strategy.workers)
        self._sums: dict[Any, Callable[[Any], Any]] = {}

    @property
    def is_last(self) -> bool:
        """Whether this stage computes the loss."""
        return self.stage == self.num_stages - 1

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the bytes of the process with that place on every process."""
        return self._replicas.broadcast(content, is_source=self.rank == source)

    def sum_all(self, values: np.ndarray) -> np.ndarray:
        """Returns the sums over all processes of an array `[n]`."""
        return self._replicas.sum_first(values)

    def sum_copies(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the sums of a tensor over this stage's processes of all copies; each of them must call it."""
        if self.num_copies == 1:
            return values
        key = values.dtype, tuple(values.shape)
        if key not in self._sums:
            # All of a group number alike, other models' sums and other stages' have other numbers.
            number = _COPY_KEYS * (1 + self.stage) + next(_NUMBERS)

            def add_up(own: tf.Tensor) -> tf.Tensor:
                return tf.raw_ops.CollectiveReduceV2(
                    input=own,
                    group_size=self.num_copies,
                    group_key=_COPY_KEYS + self.stage,
                    instance_key=number,
                    ordering_token=[],
                    merge_op="Add",
                    final_op="Id",
                    communication_hint="RING",
                )

            traced = tf.function(add_up, autograph=False)
            self._sums[key] = traced.get_concrete_function(tf.TensorSpec(values.shape, values.dtype))
        return self._sums[key](values)

    def from_last(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Returns the arrays of each copy's last stage on every process."""
        found = []
        for copy in range(self.num_copies):
            buffer = io.BytesIO()
            if self.is_last and self.copy == copy:
                np.savez(buffer, *arrays)
            content = self.broadcast(buffer.getvalue(), source=(copy + 1) * self.num_stages - 1)
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                found.append([stored[name] for name in stored.files])
        return found

    def meet(self) -> None:
        """Returns once every process has called it, and needs nothing of the others for what came before."""
        wait_for_workers(self._strategy)
