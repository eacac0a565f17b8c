"""One asynchronous step against shared variables: what Keras assigns is captured, and written so that nothing is lost.

Keras's `assign_add` reads and then assigns, so two workers stepping at once lose counts. Here a step runs in a
`keras.StatelessScope`: metric and seed state stay with the step (sums are returned), `iterations` and moving
statistics are written as atomic differences. The optimizer's own updates go to the parameter servers directly,
through TensorFlow's atomic `assign_add`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.training.accumulation import Accumulation
from tfdist.training.replica import returned_names, scalar_logs


class CapturingScope(keras.StatelessScope):
    """A stateless scope that counts how often each variable was assigned."""

    def __init__(self, state_mapping: list[tuple[keras.Variable, Any]]) -> None:
        super().__init__(state_mapping=state_mapping)
        self.num_updates: dict[int, int] = {}

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Captures one assignment."""
        key = id(update[0])
        self.num_updates[key] = self.num_updates.get(key, 0) + 1
        super().add_update(update)

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Returns the captured value, or the variable itself: regularizers ask for all of them here."""
        value = super().get_current_value(variable)
        return keras_internals.native(variable) if value is None else value


class SharedStep:
    """A model's step as a function of (batch, step number) against variables that others update meanwhile."""

    def __init__(self, *, model: keras.Model, metric_names: set[str]) -> None:
        self._model = model
        self._metric_names = metric_names
        self.returned: dict[str, list[str] | None] = {}
        self._optimizers = keras_internals.find_optimizers(model)
        self._metrics = list(model.metrics_variables)
        self._seeds = keras_internals.seed_states(model)
        self._draws: list[int] | None = None
        local = {id(v) for v in [*self._metrics, *self._seeds]}
        counters = [keras_internals.batch_counter(o) for o in self._optimizers]
        statistics = [v for v in model.non_trainable_variables if id(v) not in local]
        self._added = list({id(v): v for v in [*counters, *statistics]}.values())
        self._assigned = [
            v
            for v in keras_internals.all_variables(model, self._optimizers)
            if id(v) not in local | {id(a) for a in self._added}
        ]
        for optimizer in self._optimizers:
            _check_supported(optimizer, len(self._optimizers))
        accumulating = [o for o in self._optimizers if o.gradient_accumulation_steps]
        self._accumulating = accumulating[0] if accumulating else None
        self.accumulation_steps = self._accumulating.gradient_accumulation_steps if self._accumulating else 1

    def train(
        self, batches: Sequence[Any], step: Any, *, phase: int = 0
    ) -> list[tuple[list[Any], dict[str, Any]]]:
        """Runs a step for each batch: one, or those whose gradients are accumulated.

        Args:
            batches: Nests as `keras.Model.train_step` takes them.
            step: Steps before the first of them, int64 scalar: fixes the random streams.
            phase: How many batches of the accumulation came before the first one.

        Returns:
            For each batch its own metric state, and the logs that are no metrics.
        """
        if self._draws is None:
            self._draws = self._count_draws(batches[0])
        if self._accumulating is None:
            return [self._run("train", batch, step + i) for i, batch in enumerate(batches)]
        accumulation = Accumulation(self._accumulating, phase=phase)
        with keras_internals.accumulating_with(self._accumulating, accumulation.gather):
            results = [self._run("train", batch, step + i) for i, batch in enumerate(batches)]
        accumulation.keep()
        return results

    def test(self, batches: Sequence[Any], step: Any) -> list[tuple[list[Any], dict[str, Any]]]:
        """Returns for each batch its own metric state, and the logs that are no metrics."""
        return [self._run("test", batch, step) for batch in batches]

    def predict(self, batch: Any) -> Any:
        """Returns the model's outputs for a batch."""
        with tf.distribute.ReplicaContext(_DEFAULT_STRATEGY, 0), CapturingScope([]):
            return self._model.predict_step(batch)

    def _run(self, kind: str, batch: Any, step: Any) -> tuple[list[Any], dict[str, Any]]:
        added = [(v, tf.identity(keras_internals.native(v))) for v in self._added]
        scope = CapturingScope([*added, *self._local_state(step)])
        with self._as_single_device(), scope:
            outputs = getattr(self._model, f"{kind}_step")(batch)
        self._write(scope, added)
        self.returned[kind] = returned_names(outputs)
        state = [tf.identity(scope.get_current_value(v)) for v in self._metrics]
        return state, scalar_logs(outputs, self._metric_names)

    def _local_state(self, step: Any) -> list[tuple[keras.Variable, Any]]:
        state: list[tuple[keras.Variable, Any]] = [(v, tf.zeros(v.shape, v.dtype)) for v in self._metrics]
        for variable, draws in zip(self._seeds, self._draws or [0] * len(self._seeds), strict=True):
            start = tf.cast(keras_internals.native(variable), tf.int64)
            moved = start + tf.stack([tf.zeros([], tf.int64), tf.cast(step, tf.int64) * draws])
            state.append((variable, tf.cast(moved, variable.dtype)))
        return state

    def _write(self, scope: CapturingScope, added: list[tuple[keras.Variable, Any]]) -> None:
        for variable, before in added:
            if id(variable) in scope.num_updates:
                keras_internals.native(variable).assign_add(scope.get_current_value(variable) - before)
        for variable in self._assigned:
            if id(variable) in scope.num_updates:
                keras_internals.native(variable).assign(scope.get_current_value(variable))

    def _count_draws(self, batch: Any) -> list[int]:
        """Returns how far one step moves each seed generator, by tracing one that is thrown away."""
        scope = CapturingScope([])

        def throw_away(batch: Any) -> None:
            with contextlib.ExitStack() as stack:
                if self._accumulating is not None:
                    never = keras_internals.accumulating_with(self._accumulating, lambda *_: None)
                    stack.enter_context(never)
                stack.enter_context(self._as_single_device())
                stack.enter_context(scope)
                self._model.train_step(batch)

        specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, batch)
        tf.function(throw_away, autograph=False).get_concrete_function(specs)
        return [scope.num_updates.get(id(v), 0) for v in self._seeds]

    def _as_single_device(self) -> _SingleDevice:
        return _SingleDevice(self._optimizers)


class _SingleDevice:
    """Lets Keras see one replica, so that no loss is scaled and no gradient exchanged."""

    def __init__(self, optimizers: list[keras.optimizers.Optimizer]) -> None:
        self._context = tf.distribute.ReplicaContext(_DEFAULT_STRATEGY, 0)
        self._binding = keras_internals.ReplicaBinding(
            variables=[],
            optimizers=optimizers,
            apply=lambda optimizer, apply: apply,
            loss_correction=lambda *args: None,
        )

    def __enter__(self) -> None:
        self._context.__enter__()
        self._binding.install()

    def __exit__(self, *exc_info: Any) -> None:
        self._binding.remove()
        self._context.__exit__(*exc_info)


_DEFAULT_STRATEGY = tf.distribute.get_strategy()


def _check_supported(optimizer: keras.optimizers.Optimizer, num_optimizers: int) -> None:
    if optimizer.gradient_accumulation_steps and num_optimizers > 1:
        raise ConfigError(
            f"gradient_accumulation_steps={optimizer.gradient_accumulation_steps} with {num_optimizers} optimizers: "
            "under ps only a single optimizer may accumulate; raise global_batch_size by that factor instead."
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ConfigError(
            "mixed_float16 scales its loss by shared state, which asynchronous workers would corrupt; "
            "under ps use mixed_bfloat16, or a sync strategy."
        )
