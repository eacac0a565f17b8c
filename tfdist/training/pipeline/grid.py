"""Which block of which stage of which copy of the model each process is, and what the processes tell each other."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfdist.cluster.spec import Cluster, split_address
from tfdist.config.pipeline_options import Layout
from tfdist.runtime.strategies import StagedStrategy, wait_for_workers
from tfdist.training.step.replicas import Replicas
from tfdist.training.tensor_parallel.group import ProcessGroup


class Grid:
    """The processes of a run: copies of the model side by side, each a line of stages, of blocks each.

    Args:
        strategy: The run's.
        cluster: With this process's task.
        layout: Of the processes.

    Attributes:
        rank: This process's place in the cluster, in which neighbours are blocks of a stage before all.
        num_stages: Of each copy.
        num_blocks: Of each stage.
        num_copies: Of the model.
        stage: This process's, zero-based.
        block: Of that stage.
        copy: Which it is a part of.
        blocks: The processes that have the other blocks of its layers.
    """

    def __init__(self, strategy: StagedStrategy, cluster: Cluster, layout: Layout) -> None:
        assert cluster.task is not None
        self.num_copies, self.num_stages, self.num_blocks, _ = layout
        self.rank = cluster.tasks.index(cluster.task)
        line, self.block = divmod(self.rank, self.num_blocks)
        self.copy, self.stage = divmod(line, self.num_stages)
        # Those that add up: for each stage's block its copies, for each stage of each copy its blocks.
        copies = ProcessGroup(self.num_copies, self.stage * self.num_blocks + self.block)
        self.blocks = ProcessGroup(self.num_blocks, self.num_stages * self.num_blocks + line)
        self._cluster = cluster
        self._strategy = strategy
        self._replicas = Replicas(strategy.workers)
        self._sum_copies = tf.function(copies.sum, autograph=False)

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of their places."""
        return [str(task) for task in self._cluster.tasks]

    @property
    def hosts(self) -> list[str]:
        """The hosts of its processes, by rank."""
        return [split_address(self._cluster.address(task))[0] for task in self._cluster.tasks]

    def rank_of(self, *, stage: int, copy: int = 0, block: int = 0) -> int:
        """Returns a process's place in the cluster."""
        return (copy * self.num_stages + stage) * self.num_blocks + block

    @property
    def neighbours(self) -> tuple[int | None, int | None]:
        """Places of the processes that have the stage before and the next one of the same copy, in the same block."""
        before = None if self.stage == 0 else self.rank - self.num_blocks
        return before, None if self.stage == self.num_stages - 1 else self.rank + self.num_blocks

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the bytes of the process with that place on every process."""
        return self._replicas.broadcast(content, is_source=self.rank == source)

    def sum_all(self, values: np.ndarray) -> np.ndarray:
        """Returns the sums over all processes of an array `[n]`."""
        return self._replicas.sum_first(values)

    def sum_copies(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the sums of a tensor over the processes of all copies that are as this one; each must call it."""
        if self.num_copies == 1:
            return values
        # By its shape, for each of which there is a trace: called by itself it would warn of tracing often.
        return self._sum_copies.get_concrete_function(tf.TensorSpec(values.shape, values.dtype))(values)

    def from_last(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Returns the arrays of each copy's last stage on every process."""
        found = []
        for copy in range(self.num_copies):
            buffer = io.BytesIO()
            source = self.rank_of(copy=copy, stage=self.num_stages - 1)
            if self.rank == source:
                np.savez(buffer, *arrays)
            content = self.broadcast(buffer.getvalue(), source=source)
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                found.append([stored[name] for name in stored.files])
        return found

    def meet(self) -> None:
        """Returns once every process has called it, and needs nothing of the others for what came before."""
        wait_for_workers(self._strategy)
