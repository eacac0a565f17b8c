"""A model's forward and backward pass alone, compiled by XLA where that is asked for or found to be faster.

XLA compiles neither collectives on CPUs nor reads of an iterator, so only this part of a step is given to it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.training.metrics import returned_names, scalar_logs
from tfdist.training.step.finite_check import StepCheck

_NUM_TRIES = 5


class Computed(NamedTuple):
    """What a forward and backward pass has found.

    Attributes:
        gradients: One for each variable, or None.
        variables: What they are of.
        logs: The step's that are no metrics.
        names: Of all its logs.
    """

    gradients: list[Any]
    variables: Sequence[Any]
    logs: dict[str, Any]
    names: list[str] | None


class Compute:
    """Runs `train_step` up to its one call of `optimizer.apply`, which it makes later, outside of what is compiled.

    Args:
        model: Built, with Keras's own `train_step`: one of its own may go on from what `apply` has changed.
        metric_names: Names of logs that are metrics.

    Attributes:
        optimizer: The model's.

    Raises:
        ConfigError: If the model's step cannot be divided so.
    """

    def __init__(self, model: keras.Model, metric_names: set[str]) -> None:
        optimizers = keras_internals.find_optimizers(model)
        if keras_internals.has_own_step(model) or len(optimizers) != 1:
            raise ConfigError(
                f"jit_compile with {type(model).__name__}, which has a train_step of its own or several optimizers: "
                "only Keras's own step can be divided into what XLA compiles and the rest; leave it out."
            )
        self._model = model
        self._optimizers = optimizers
        self.optimizer = optimizers[0]
        self._metric_names = metric_names

    def run(
        self,
        part: Any,
        *,
        variables: Sequence[tuple[keras.Variable, tf.Variable]],
        loss_correction: Callable[..., Any],
        note_loss: Callable[..., None] | None,
        jit: bool,
    ) -> Computed:
        """Computes the gradients of a part, which is as `train_step` takes it, by XLA if `jit`.

        `variables` and `loss_correction` are as `ReplicaBinding` takes them; `note_loss` is told of the total loss.
        """
        found: dict[str, Any] = {}

        def keep(optimizer: keras.optimizers.Optimizer, apply: Any) -> Any:
            def apply_later(grads: Sequence[Any], trainable_variables: Any = None) -> None:
                found["variables"] = trainable_variables or keras_internals.trainable_variables_of(optimizer)
                found["gradients"] = list(grads)

            return apply_later

        def compute(part: Any) -> Any:
            check = StepCheck(float("inf"))
            binding = keras_internals.ReplicaBinding(
                variables=variables,
                optimizers=self._optimizers,
                apply=keep,
                loss_correction=loss_correction,
                model=self._model,
                note_loss=check.note_loss,
            )
            with binding:
                logs = self._model.train_step(part)
            found["names"] = returned_names(logs)
            present = [g for g in found["gradients"] if g is not None]
            return present, check.own_loss, scalar_logs(logs, self._metric_names)

        compiled = tf.function(compute, autograph=False, jit_compile=True) if jit else compute
        present, loss, logs = compiled(part)
        gradients = iter(present)
        ordered = [None if g is None else next(gradients) for g in found["gradients"]]
        if note_loss is not None:
            note_loss(loss, is_total=True)
        return Computed(gradients=ordered, variables=found["variables"], logs=logs, names=found["names"])


def touch(gradients: Sequence[Any]) -> tf.Tensor:
    """Returns a number that is there when all gradients are, wherever they are computed."""
    present = tf.nest.flatten([g for g in gradients if g is not None], expand_composites=True)
    return tf.add_n([tf.cast(tf.reshape(t, [-1])[0], tf.float32) for t in present] or [tf.constant(0.0)])


def time_calls(function: Callable[[], Any]) -> float:
    """Returns the median seconds of a call, the first of which compiles and is left out; infinity if it fails."""
    secs = []
    try:
        for _ in range(1 + _NUM_TRIES):
            start = time.perf_counter()
            function()
            secs.append(time.perf_counter() - start)
    except (tf.errors.OpError, ValueError, TypeError, RuntimeError):  # XLA has no code for everything
        return float("inf")
    return statistics.median(secs[1:])
