"""The sum of all replicas' gradients, in buckets; exact, unless a narrow type or thin factors are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.collectives.communicator import Communicator, join, split
from tfdist.collectives.power_sgd import PowerSgd
from tfdist.config.sync_options import SyncOptions


class GradientExchange:
    """Adds gradients up over the workers.

    What it remembers from step to step (what was left out so far) is this worker's own; `forget` drops it, at every
    checkpoint, so that a run that is resumed goes on as the one that was not stopped.

    Args:
        communicator: What carries them.
        options: In what form.
        variables: TensorFlow variables whose gradients there may be.

    Attributes:
        num_bytes: That one exchange hands to the communicator, as it was traced last.
    """

    def __init__(
        self, communicator: Communicator, options: SyncOptions, variables: Sequence[tf.Variable]
    ) -> None:
        self._communicator = communicator
        self._options = options
        self._shapes = [v.shape for v in variables]
        self.num_bytes = 0
        self._factors = (
            PowerSgd(self._shapes, options.compression_rank) if options.compression is not None else None
        )
        self._memories = (
            [tf.Variable(tf.zeros(shape), trainable=False) for shape in self._shapes]
            if options.error_feedback
            else []
        )

    def sum(
        self,
        tensors: Sequence[Any],
        places: Sequence[int],
        scalar: Any,
        outer: tf.distribute.ReplicaContext,
    ) -> tuple[list[Any], Any]:
        """Returns the sums over all replicas; every replica calls it with gradients of the same variables.

        Args:
            tensors: Gradients, dense or `tf.IndexedSlices`, in the order of the layers.
            places: Each one's variable.
            scalar: A float32 scalar that travels along.
            outer: The replica context that the strategy gave.
        """
        self.num_bytes = 0
        sums: list[Any] = [None] * len(tensors)
        sliced = [i for i, t in enumerate(tensors) if isinstance(t, tf.IndexedSlices)]
        if sliced:
            # Of rows each replica has others: they are gathered, not added up.
            with outer:
                gathered = outer.all_reduce(tf.distribute.ReduceOp.SUM, [tensors[i] for i in sliced])
            for i, total in zip(sliced, gathered, strict=True):
                sums[i] = total
        # The last layers' are ready first.
        dense = [i for i in reversed(range(len(tensors))) if i not in sliced]
        for i in dense:
            # A batch of unknown size leaves a gradient's shape open, too.
            tensors[i].set_shape(self._shapes[places[i]])
        total_scalar = None
        for bucket in self._split(dense, tensors):
            own = [tensors[i] for i in bucket]
            found, total_scalar = self._sum_bucket(own, [places[i] for i in bucket], scalar, outer)
            for i, value in zip(bucket, found, strict=True):
                sums[i] = value
        if total_scalar is None:
            total_scalar = self._communicator.sum(tf.reshape(scalar, [1]), outer)[0]
        return sums, total_scalar

    def forget(self) -> None:
        """Drops what was left out of the exchanges so far."""
        for memory in self._memories:
            memory.assign(tf.zeros_like(memory))
        if self._factors is not None:
            self._factors.forget()

    def _split(self, places: Sequence[int], tensors: Sequence[Any]) -> list[list[int]]:
        """Groups gradients of one type into runs of about a bucket's size."""
        most = self._options.bucket_mb * 2**20
        buckets: list[list[int]] = []
        room = 0.0
        for i in places:
            size = _count_bytes(tensors[i])
            if not buckets or size > room or tensors[buckets[-1][-1]].dtype != tensors[i].dtype:
                buckets.append([])
                room = most
            buckets[-1].append(i)
            room -= size
        return buckets

    def _sum_bucket(
        self, tensors: list[Any], places: list[int], scalar: Any, outer: tf.distribute.ReplicaContext
    ) -> tuple[list[Any], Any]:
        """Returns a bucket's sums, and the scalar's: each bucket takes it along, which costs nothing."""
        dtype = tensors[0].dtype
        if self._factors is not None and dtype == tf.float32:

            def carry(flat: Any) -> Any:
                self.num_bytes += _count_bytes(flat)
                return self._communicator.sum(flat, outer)

            return self._factors.sum([*tensors, scalar], places, carry)
        narrow = tf.as_dtype(self._options.exchange_dtype) if dtype == tf.float32 else dtype
        if self._memories and narrow != dtype:
            tensors = [t + self._memories[place] for t, place in zip(tensors, places, strict=True)]
            for tensor, place in zip(tensors, places, strict=True):
                self._memories[place].assign(tensor - tf.cast(tf.cast(tensor, narrow), dtype))
        own = [*tensors, tf.cast(scalar, dtype)]
        if narrow == dtype:
            self.num_bytes += sum(_count_bytes(tensor) for tensor in own)
            sums = self._communicator.sum_each(own, outer)
        else:
            flat = tf.cast(join(own), narrow)
            self.num_bytes += _count_bytes(flat)
            sums = split(tf.cast(self._communicator.sum(flat, outer), dtype), own)
        return sums[:-1], tf.cast(sums[-1], tf.float32)


def _count_bytes(tensor: Any) -> int:
    return tensor.shape.num_elements() * tensor.dtype.size
