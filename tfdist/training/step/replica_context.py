"""One replica's step: Keras runs as if it were alone, and only sums cross to the other replicas.

Inside `KerasReplicaContext` TensorFlow reports a single replica and each Keras variable *is* this replica's own
copy, so `train_step` (Keras's or the model's own), clipping, accumulation, averaging and loss scaling do
what they do on one device. The one place where replicas meet is `exchange`: gradients are weighted by
the replica's share of the global batch, summed over replicas, and handed to the optimizer. All replicas
then apply the same update to equal copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives import Communicator, gather_all, reduce_all
from tfdist.training.monitoring.clock import on_host, step_time_after
from tfdist.training.step.finite_check import StepCheck, current_graph, on_values


# Wide: all that Keras's code asks of a replica in a step.
class KerasReplicaContext(tf.distribute.ReplicaContext):
    """The replica context that Keras sees during a step: a strategy of one replica, with a real `all_reduce`."""

    def __init__(
        self,
        *,
        outer: tf.distribute.ReplicaContext,
        local_index: int,
        local_size: Any,
        global_size: Any,
        check: StepCheck | None = None,
        communicator: Communicator | None = None,
        never_empty: bool = False,
        is_local: bool = False,
    ) -> None:
        super().__init__(keras_internals.DEFAULT_STRATEGY, local_index)
        self.check = check
        self._communicator = communicator
        # Whether this replica is sure to have an example.
        self.never_empty = never_empty or (isinstance(local_size, int) and local_size > 0)
        self.is_local = is_local
        self.outer = outer
        self.local_size = local_size
        self.global_size = global_size
        self.share = tf.cast(local_size, tf.float32) / tf.cast(global_size, tf.float32)
        self.binding: keras_internals.ReplicaBinding  # by whoever makes it, before it is entered
        self.num_applied = 0
        self.bound: list[tuple[keras.Variable, tf.Variable]] = []
        # Makes what this replica adds to the sums, of its gradients, where that is not their share.
        self.private: Callable[[Sequence[Any]], list[Any]] | None = None
        self._graph = current_graph()
        with on_host():
            self.ready_at = self.exchanged_at = tf.constant(0.0, tf.float64)

    def __enter__(self) -> KerasReplicaContext:
        super().__enter__()
        self.binding.install()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.binding.remove()
        super().__exit__(*exc_info)

    @contextlib.contextmanager
    def guarding(self, ids: set[int]) -> Iterator[None]:
        """Keeps variables, given by the ids of Keras's, as they are if this replica has no examples."""
        guarded = [] if self.never_empty else [own for variable, own in self.bound if id(variable) in ids]
        before = [tf.identity(v) for v in guarded]
        yield
        for variable, old in zip(guarded, before, strict=True):
            variable.assign(tf.where(self.local_size > 0, variable, old))

    def through(self, function: Callable[[tf.distribute.ReplicaContext], Any]) -> Any:
        """Calls a function that exchanges with the other replicas, by the context that the strategy gave."""
        # MirroredStrategy lets the other replicas' threads run inside such a call: they bind their own.
        self.binding.remove()
        try:
            return function(self.outer)
        finally:
            self.binding.install()

    def exchange(self, values: Sequence[Any]) -> list[Any]:
        """Sums each tensor over all replicas; not differentiable."""

        def add_up(outer: tf.distribute.ReplicaContext) -> list[Any]:
            if self._communicator is not None:
                return [self._communicator.sum(value, outer) for value in values]
            with outer:
                return reduce_all(outer, tf.distribute.ReduceOp.SUM, values)

        return list(self.through(add_up))

    def gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns the examples of all replicas, in their order."""
        own = tensor[: self.local_size]

        def gather(outer: tf.distribute.ReplicaContext) -> tf.Tensor:
            with outer:
                return gather_all(outer, own)

        return self.through(gather)

    def note_ready(self, gradients: Sequence[Any]) -> None:
        """Notes when the first gradients to cross, those of the last layer, are there."""
        # Out of a branch of the step's own no time could be brought.
        if current_graph() is self._graph:
            self.ready_at = step_time_after(gradients[-1:])

    def note_exchanged(self, sums: Sequence[Any]) -> None:
        """Notes when all sums are there."""
        if current_graph() is self._graph:
            self.exchanged_at = step_time_after(list(sums))

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        """Sums (or averages) over all replicas, differentiably: what `BatchNormalization(synchronized=True)` calls.

        The backward pass weights each replica's upstream gradient by its share of the batch, since the
        shares are applied to the gradients only after it.
        """
        del options
        mean = "MEAN" in str(reduce_op).upper()
        replicas = self.outer.num_replicas_in_sync

        @tf.custom_gradient
        def reduce(*tensors: Any) -> Any:
            # A replica without examples holds one of zeros (see _at_least_one): it must not be counted.
            present = [t * tf.cast(self.share > 0, t.dtype) for t in tensors]
            sums = self.exchange(present)
            outputs = [s / replicas for s in sums] if mean else sums

            def grad(*upstream: Any) -> list[Any]:
                shares = [tf.cast(self.share, g.dtype) for g in upstream]
                total = self.exchange([g * s for g, s in zip(upstream, shares, strict=True)])
                scale = 1 / replicas if mean else 1.0
                return [tf.math.divide_no_nan(t, s) * scale for t, s in zip(total, shares, strict=True)]

            return outputs, grad

        return tf.nest.pack_sequence_as(value, tf.nest.flatten(reduce(*tf.nest.flatten(value))))

    def weighted(self, grad: Any) -> Any:
        """Returns a gradient times this replica's share of the batch."""
        # multiply_no_nan: a replica without examples contributes zero, whatever its model made of padding.
        return on_values(lambda v: tf.math.multiply_no_nan(v, tf.cast(self.share, v.dtype)), grad)

    def contributions(self, gradients: Sequence[Any]) -> list[Any]:
        """Returns what this replica adds to the sum of each gradient; None where there is none."""
        if self.private is not None:
            return self.private(gradients)
        return [None if g is None else self.weighted(g) for g in gradients]

    def loss_correction(self, values: Any, sample_weight: Any, mask: Any, reduction: str | None) -> Any:
        """Returns the factor that makes Σ share·loss over replicas the loss of the whole batch.

        Keras divides by what this replica holds; where that is not its number of examples (a sum, valid
        elements under a mask, a sum of weights) the global count takes its place.
        """
        if reduction in (None, "none"):
            return None
        grow = tf.math.divide_no_nan(1.0, self.share)
        if reduction == "sum":
            return grow
        local = own_divisor(sample_weight, mask, reduction)
        if local is None or self.is_local:  # Keras's own mean over this replica's valid elements.
            return None
        local *= tf.cast(self.share > 0, local.dtype)  # An example of padding is none.
        (total,) = self.exchange([local])
        return tf.math.divide_no_nan(local, total) * grow


def own_divisor(sample_weight: Any, mask: Any, reduction: str | None) -> Any:
    """Returns by what Keras divides a loss where that is not the number of examples, a float32 scalar; else None."""
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        return tf.reduce_sum(tf.cast(sample_weight, tf.float32))
    if mask is not None and reduction not in (None, "none", "sum"):
        return tf.reduce_sum(tf.cast(mask, tf.float32))
    return None
