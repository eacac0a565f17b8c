"""The step of a single device: Keras's own, untouched but for the check."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.training.metric_parts import start_state
from tfdist.training.metrics import metric_results, returned_names, scalar_logs
from tfdist.training.privacy.gradients import PrivateGradients
from tfdist.training.privacy.per_example import num_rows
from tfdist.training.step.compute import Compute, time_calls, touch
from tfdist.training.step.finite_check import UNCHECKED, StepCheck, run_if, side_variables
from tfdist.training.step.replica import after_reading


class SingleDeviceStep:
    """Runs a model's `train_step`, `test_step` or `predict_step` on the one device; the same face as `ReplicaStep`."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.private: PrivateGradients | None = None
        self.returned: dict[str, list[str] | None] = {}
        self.metrics = SingleDeviceMetrics(model)
        self.metric_names = set(metric_results(model, self.metrics.origins))

    def run(
        self, kind: str, parts: Any, global_size: Any, limit: Any = None, *, never_empty: bool = True
    ) -> Any:
        """Runs the step; see `ReplicaStep.run`.

        Returns:
            As there, but for `train` the logs that are no metrics, the check's verdict and the loss (`[2]` float32),
            and a tensor that is there when the step is computed.
        """
        del global_size, never_empty
        if kind == "train":
            return self._train(parts[0], limit)
        outputs = getattr(self._model, f"{kind}_step")(parts[0])
        return outputs if kind == "predict" else self._logs(kind, outputs)

    def _train(self, part: Any, limit: Any) -> Any:
        check = None if limit is None else StepCheck(limit)
        side = [] if check is None else [keras_internals.native(v) for v in side_variables(self._model)]
        before = [tf.identity(v) for v in side]
        is_plain = check is None and self.private is None
        binding: contextlib.AbstractContextManager[None] = (
            contextlib.nullcontext() if is_plain else self._bind(check, part)
        )
        with binding, after_reading(part):
            outputs = self._model.train_step(part)
        logs = self._logs("train", outputs)
        if check is not None:
            check.undo(side, before)
            return logs, check.verdict, check.verdict
        weights = [keras_internals.native(v) for v in self._model.trainable_variables]
        smallest = min(weights, key=lambda v: math.prod(v.shape), default=tf.constant(0.0))
        return logs, tf.constant(UNCHECKED), tf.identity(smallest)

    def _bind(self, check: StepCheck | None, part: Any) -> keras_internals.ReplicaBinding:
        def wrap(optimizer: keras.optimizers.Optimizer, apply: Any) -> Any:
            def apply_sound(grads: Sequence[Any], trainable_variables: Any = None) -> None:
                if self.private is not None:
                    size = num_rows(part)
                    grads = self.private.contribute(
                        grads, part, num_examples=size, batch_size=size, is_first=True
                    )
                if check is None:
                    apply(grads, trainable_variables)
                    return
                is_sound = check.judge(optimizer, grads, check.own_loss)
                run_if(is_sound, lambda: apply(grads, trainable_variables))

            return apply_sound

        return keras_internals.ReplicaBinding(
            optimizers=keras_internals.find_optimizers(self._model),
            apply=wrap,
            model=self._model,
            note_loss=None if check is None else check.note_loss,
        )

    def time_compute(self, compute: Compute, parts: Sequence[Any], *, jit: bool) -> float:
        """Returns the seconds of a forward and backward pass that changes nothing; see `ReplicaStep`."""
        side = [keras_internals.native(v) for v in side_variables(self._model)]

        def run(part: Any) -> Any:
            before = [tf.identity(v) for v in side]
            found = compute.run(
                part, variables=[], loss_correction=lambda *args: None, note_loss=None, jit=jit
            )
            for variable, value in zip(side, before, strict=True):
                variable.assign(value)
            return touch(found.gradients)

        compiled = tf.function(run, autograph=False)
        return time_calls(lambda: compiled(parts[0]).numpy())

    def _logs(self, kind: str, logs: Any) -> dict[str, Any]:
        self.returned[kind] = returned_names(logs)
        return scalar_logs(logs, self.metric_names)

    def spread_seeds(self) -> None:
        """One replica keeps the model's seeds."""

    def average_statistics(self) -> None:
        """One replica has one set of statistics."""


class SingleDeviceMetrics:
    """The state of a model's metrics, of which the one device has all; the same face as `ReplicatedMetrics`.

    Attributes:
        origins: What the state starts from.
    """

    def __init__(self, model: keras.Model) -> None:
        self.origins = start_state(model)
        self._model = model

    def reset(self) -> None:
        """Lets the metrics begin anew."""
        self._model.reset_metrics()

    def state(self) -> list[Any]:
        """Returns the metric variables' values."""
        return [v.numpy() for v in self._model.metrics_variables]

    def own(self) -> list[Any]:
        """Returns what was added to the state that the metrics start from."""
        return [value - origin for value, origin in zip(self.state(), self.origins, strict=True)]

    def set_state(self, state: Sequence[Any]) -> None:
        """Assigns them."""
        for variable, value in zip(self._model.metrics_variables, state, strict=True):
            variable.assign(value)
