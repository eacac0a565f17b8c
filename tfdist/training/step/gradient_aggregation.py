"""What a replica does with its gradients: add them up with the others' at once or a step later, or keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives import GradientExchange
from tfdist.training.step.finite_check import run_if, zero_unless
from tfdist.training.step.replica_context import KerasReplicaContext

Apply = Callable[..., Any]


class AllReducedGradients:
    """Every step: the sum over all replicas, each weighted by its share of the batch, applied by all alike.

    Args:
        gradients: Adds them up; None: the strategy does, as they are.
        variables: Keras variables in the order that `gradients` knows.
    """

    is_local = False

    def __init__(
        self, gradients: GradientExchange | None = None, variables: Sequence[keras.Variable] = ()
    ) -> None:
        self._gradients = gradients
        self._places = {id(v): place for place, v in enumerate(variables)}

    def wrap_apply(
        self, sole: KerasReplicaContext, optimizer: keras.optimizers.Optimizer, apply: Apply
    ) -> Apply:
        """Returns `optimizer.apply` with the exchange in front of it."""

        def apply_global(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            grads = list(grads)
            present = [i for i, g in enumerate(grads) if g is not None]
            # The loss travels with the gradients: one exchange, after which all replicas decide alike.
            loss = tf.constant(0.0) if sole.check is None else sole.weighted(sole.check.own_loss)
            contributions = sole.contributions(grads)
            weighted = [contributions[i] for i in present]
            sole.note_ready(weighted)
            variables = trainable_variables or keras_internals.trainable_variables_of(optimizer)
            sums, total = self._sum(sole, weighted, [variables[i] for i in present], loss)
            sole.note_exchanged(sums)
            for i, value in zip(present, sums, strict=True):
                grads[i] = value
            sole.num_applied += 1
            # Nothing moves, no counter either, before all gradients are here: a peer that dies leaves every copy whole.
            with tf.control_dependencies(tf.nest.flatten(sums, expand_composites=True)):
                return apply_checked(sole, optimizer, apply, grads, trainable_variables, total)

        return apply_global

    def _sum(
        self, sole: KerasReplicaContext, tensors: list[Any], variables: Sequence[Any], loss: Any
    ) -> tuple[list[Any], Any]:
        if self._gradients is None:
            *sums, total = sole.exchange([*tensors, loss])
            return sums, total
        places = [self._places[id(v)] for v in variables]
        return sole.through(lambda outer: self._gradients.sum(tensors, places, loss, outer))  # type: ignore[union-attr]


class LocalGradients:
    """Each replica steps by itself, on the mean over its own part of the batch; `LocalSteps` brings them together."""

    is_local = True

    def wrap_apply(
        self, sole: KerasReplicaContext, optimizer: keras.optimizers.Optimizer, apply: Apply
    ) -> Apply:
        """Returns `optimizer.apply`, with the check in front of it."""

        def apply_own(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            # A replica without examples has computed on padding.
            grads = [zero_unless(sole.share > 0, g) for g in grads]
            present = [g for g in grads if g is not None]
            sole.note_ready(present)
            sole.note_exchanged(present)
            sole.num_applied += 1
            loss = tf.constant(0.0) if sole.check is None else sole.check.own_loss
            loss = tf.where(sole.share > 0, loss, 0.0)
            return apply_checked(sole, optimizer, apply, grads, trainable_variables, loss)

        return apply_own


class AccumulatedGradients:
    """Sums each worker's own gradients over several batches, and exchanges the sums once for each update.

    What was summed before all workers last agreed lies in the optimizer's own accumulators, where Keras keeps it and a
    checkpoint holds it: the sum over all workers.

    Args:
        gradients: Adds them up over the workers.
        optimizer: One with `gradient_accumulation_steps`.
        variables: Keras variables in the order that `gradients` knows.
        agreed: This worker's copies of the optimizer's accumulators, by the id of the Keras variable.

    Attributes:
        updates: Whether the next batch is the last before an update.
    """

    is_local = False

    def __init__(
        self,
        gradients: GradientExchange,
        optimizer: keras.optimizers.Optimizer,
        variables: Sequence[keras.Variable],
        agreed: dict[int, tf.Variable],
    ) -> None:
        self._gradients = gradients
        self._num_batches = optimizer.gradient_accumulation_steps
        self._variables = list(variables)
        self._agreed = agreed
        self._own = {id(v): tf.Variable(tf.zeros(v.shape), trainable=False) for v in variables}
        self.updates = False

    def wrap_apply(
        self, sole: KerasReplicaContext, optimizer: keras.optimizers.Optimizer, apply: Apply
    ) -> Apply:
        """Returns an `apply` that takes one batch's gradients."""

        def apply_batch(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            sole.num_applied += 1
            variables = trainable_variables or self._variables
            pairs = [
                (sole.weighted(tf.convert_to_tensor(g)), v)
                for g, v in zip(grads, variables, strict=True)
                if g is not None
            ]
            own, present = [g for g, _ in pairs], [v for _, v in pairs]
            loss = tf.constant(0.0) if sole.check is None else sole.weighted(sole.check.own_loss)
            sole.note_ready(own)
            if self.updates:
                return self._update(sole, optimizer, apply, own, present, loss)
            if sole.check is not None:
                # All must leave the batch out, or none: one number crosses instead of the gradients.
                is_finite = tf.math.is_finite(tf.add_n([tf.reduce_sum(tf.cast(g, tf.float32)) for g in own]))
                (loss,) = sole.exchange([tf.where(is_finite, loss, float("nan"))])
            sole.note_exchanged([loss])

            def gather(grads: Sequence[Any], variables: Sequence[keras.Variable]) -> None:
                for grad, variable in zip(grads, variables, strict=True):
                    self._own[id(variable)].assign_add(grad)

            def apply_none(grads: Sequence[Any], variables: Any = None) -> Any:
                with keras_internals.accumulating_with(optimizer, gather):
                    return apply(grads, variables)

            with tf.control_dependencies([loss]):
                return apply_checked(sole, optimizer, apply_none, own, present, loss)

        return apply_batch

    def _update(
        self,
        sole: KerasReplicaContext,
        optimizer: keras.optimizers.Optimizer,
        apply: Apply,
        own: list[Any],
        present: list[keras.Variable],
        loss: Any,
    ) -> Any:
        sums, total = self._sum(
            sole, [g + self._own[id(v)] for g, v in zip(own, present, strict=True)], present, loss
        )
        sums = [s + self._agreed[id(v)] for s, v in zip(sums, present, strict=True)]
        sole.note_exchanged(sums)

        def gather(grads: Sequence[Any], variables: Sequence[keras.Variable]) -> list[Any]:
            for variable in variables:
                self._own[id(variable)].assign(tf.zeros(variable.shape))
                self._agreed[id(variable)].assign(tf.zeros(variable.shape))
            return [g / self._num_batches for g in grads]

        def apply_mean(grads: Sequence[Any], variables: Any = None) -> Any:
            with keras_internals.accumulating_with(optimizer, gather):
                return apply(grads, variables)

        with tf.control_dependencies(sums):
            return apply_checked(sole, optimizer, apply_mean, sums, present, total)

    def _sum(
        self, sole: KerasReplicaContext, tensors: list[Any], variables: Sequence[keras.Variable], scalar: Any
    ) -> tuple[list[Any], Any]:
        places = [next(i for i, own in enumerate(self._variables) if own is v) for v in variables]
        return sole.through(lambda outer: self._gradients.sum(tensors, places, scalar, outer))

    def forget(self) -> None:
        """Drops what this worker has summed by itself."""
        for own in self._own.values():
            own.assign(tf.zeros_like(own))

    def agree_in(self, outer: tf.distribute.ReplicaContext) -> Any:
        """Moves what workers have summed by themselves into the optimizer's accumulators; all workers run it."""
        own = [self._own[id(v)] for v in self._variables]
        places = range(len(own))
        sums, _ = self._gradients.sum([v.read_value() for v in own], places, tf.constant(0.0), outer)
        for variable, total in zip(self._variables, sums, strict=True):
            self._agreed[id(variable)].assign_add(total)
            self._own[id(variable)].assign(tf.zeros(variable.shape))
        return tf.constant(0)


class DelayedGradients:
    """Each step applies the sum of the gradients of the step before, which cross while the new ones are computed.

    Args:
        gradients: Adds them up.
        variables: Keras variables in the order that `gradients` knows.
    """

    is_local = False

    def __init__(self, gradients: GradientExchange, variables: Sequence[keras.Variable]) -> None:
        self._gradients = gradients
        self._variables = list(variables)
        self._waiting = [tf.Variable(tf.zeros(v.shape), trainable=False) for v in variables]
        self._loss = tf.Variable(0.0, trainable=False)
        self.is_waiting = False
        self._arrived: tuple[list[Any], Any] = ([], None)

    def begin_step(self, sole: KerasReplicaContext) -> None:
        """Starts the exchange of what waits; called before the step computes anything."""
        if self.is_waiting:
            places = range(len(self._variables))
            own = [v.read_value() for v in self._waiting]
            self._arrived = sole.through(
                lambda outer: self._gradients.sum(own, places, self._loss.read_value(), outer)
            )

    def wrap_apply(
        self, sole: KerasReplicaContext, optimizer: keras.optimizers.Optimizer, apply: Apply
    ) -> Apply:
        """Returns an `apply` that keeps these gradients for the next step, and applies those that waited."""

        def apply_waiting(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            sole.num_applied += 1
            own = [sole.weighted(g) for g in grads if g is not None]
            sole.note_ready(own)
            sums, loss = self._arrived
            sole.note_exchanged(sums)
            if self.is_waiting:
                apply_checked(sole, optimizer, apply, sums, self._variables, loss)
            kept = {id(v): g for v, g in zip(trainable_variables or self._variables, grads, strict=True)}
            for variable, waiting in zip(self._variables, self._waiting, strict=True):
                grad = kept.get(id(variable))
                waiting.assign(
                    tf.zeros(waiting.shape) if grad is None else sole.weighted(tf.convert_to_tensor(grad))
                )
            if sole.check is not None:
                self._loss.assign(sole.weighted(sole.check.own_loss))

        return apply_waiting

    def apply_rest(
        self, sole: KerasReplicaContext, optimizer: keras.optimizers.Optimizer, apply: Apply
    ) -> None:
        """Applies what still waits, without a step."""
        self.begin_step(sole)
        sums, loss = self._arrived
        apply_checked(sole, optimizer, apply, sums, self._variables, loss)


GradientAggregation = AllReducedGradients | AccumulatedGradients | LocalGradients | DelayedGradients


def apply_checked(
    sole: KerasReplicaContext,
    optimizer: keras.optimizers.Optimizer,
    apply: Apply,
    grads: Sequence[Any],
    trainable_variables: Any,
    loss: Any,
) -> Any:
    """Applies gradients, unless the step is checked and they or the loss are not sound."""
    if sole.check is None:
        return apply(grads, trainable_variables)
    is_sound = sole.check.judge(optimizer, grads, loss)
    return run_if(is_sound, lambda: apply(grads, trainable_variables))
