"""One asynchronous step against shared variables: what Keras assigns is captured, and written so that nothing is lost.

Keras's `assign_add` reads and then assigns, so two workers stepping at once lose counts. Here a step runs in a
`keras.StatelessScope`: metric and seed state stay with the step (sums are returned), `iterations` and moving
statistics are written as atomic differences. The optimizer's own updates go to the parameter servers directly,
through TensorFlow's atomic `assign_add`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.training.capturing import CapturingScope
from tfdist.training.metric_parts import start_state
from tfdist.training.metrics import metric_results, returned_names, scalar_logs
from tfdist.training.ps.accumulation import Accumulation
from tfdist.training.ps.staleness import StepStaleness
from tfdist.training.step.finite_check import UNCHECKED, StepCheck, run_if, zero_unless
from tfdist.training.step.replica import SEED_STRIDE


# Wide: what a closure reads is made once.
class AsyncPsStep:
    """A model's step as a function of (batch, step number) against variables that others update meanwhile.

    Attributes:
        metric_origins: What the metrics' states start from, and what steps add is counted from.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.metric_origins = start_state(model)
        self._metric_names = set(metric_results(model, self.metric_origins))
        self.returned: dict[str, list[str] | None] = {}
        self._optimizers = keras_internals.find_optimizers(model)
        self._metrics = list(model.metrics_variables)
        self._seeds = keras_internals.seed_states(model)
        self._draws: list[int] | None = None
        local = {id(v) for v in [*self._metrics, *self._seeds]}
        counters = [keras_internals.batch_counter(o) for o in self._optimizers]
        statistics = [v for v in model.non_trainable_variables if id(v) not in local]
        self._counter_ids = {id(v) for v in counters}
        self._added = list({id(v): v for v in [*counters, *statistics]}.values())
        self._shared = [
            v for v in keras_internals.all_variables(model, self._optimizers) if id(v) not in local
        ]
        self._assigned = [v for v in self._shared if id(v) not in {id(a) for a in self._added}]
        for optimizer in self._optimizers:
            _check_supported(optimizer, len(self._optimizers))
        accumulating = [o for o in self._optimizers if o.gradient_accumulation_steps]
        self._accumulating = accumulating[0] if accumulating else None
        self.accumulation_steps = self._accumulating.gradient_accumulation_steps if self._accumulating else 1

    def train(
        self,
        batches: Sequence[Any],
        step: Any,
        limit: Any = None,
        *,
        phase: int = 0,
        sums_states: bool = False,
        scales_by_staleness: bool = False,
    ) -> tuple[list[Any], dict[str, Any], Any]:
        """Runs a step for each batch.

        Args:
            batches: Nests as `keras.Model.train_step` takes them.
            step: Steps before the first of them, int64 scalar: fixes the random streams.
            limit: Largest loss that passes the check; None checks nothing.
            phase: How many batches of the accumulation came before the first one.
            sums_states: Nobody asks for the metrics between two of the steps.
            scales_by_staleness: Multiply the learning rate by `1 / (1 + staleness)`.

        Returns:
            What was added to the metrics' states, the logs that are no metrics, and `[steps, 3]` float32: the check's
            verdict, the loss, and the staleness. Each has one row a step, but summed states have one.
        """
        if self._draws is None:
            self._draws = self._count_draws(batches[0])
        size = self.accumulation_steps - phase
        run: Callable[..., Any] = functools.partial(self._train_run, phase=phase, scales=scales_by_staleness)
        if len(batches) > size:
            # Traced once for all of them, and called: copies would each be divided among the machines, by every worker.
            run = tf.function(run, autograph=False, experimental_attributes={"_noinline": True})
        results = []
        for first in range(0, len(batches), size):
            results += run(batches[first : first + size], step + first, limit)
        states, extras, reports = zip(*results, strict=True)
        rows = [tf.stack(values) for values in zip(*states, strict=True)]
        if sums_states:
            rows = [tf.reduce_sum(row, axis=0, keepdims=True) for row in rows]
        extra = {name: tf.stack([e[name] for e in extras]) for name in extras[0]}
        return rows, extra, tf.stack(reports)

    def _train_run(
        self, batches: Sequence[Any], step: Any, limit: Any, *, phase: int, scales: bool
    ) -> list[tuple[list[Any], dict[str, Any], Any]]:
        """Takes the batches whose gradients make one update."""
        if self._accumulating is None:
            return self._train_each(batches, step, limit, phase, scales)
        accumulation = Accumulation(self._accumulating, phase=phase)
        with keras_internals.accumulating_with(self._accumulating, accumulation.gather):
            results = self._train_each(batches, step, limit, phase, scales)
        accumulation.keep()
        return results

    def _train_each(
        self, batches: Sequence[Any], step: Any, limit: Any, phase: int, scales: bool
    ) -> list[tuple[list[Any], dict[str, Any], Any]]:
        period = self.accumulation_steps
        results = []
        read: dict[int, Any] = {}
        num_own = 0
        for i, batch in enumerate(batches):
            added = self._read_added()
            if (phase + i) % period == 0 or not read:
                read, num_own = {id(v): value for v, value in added if id(v) in self._counter_ids}, 0
            staleness = StepStaleness(
                before=read,
                num_own=num_own,
                period=period,
                applies=(phase + i + 1) % period == 0,
                inverse=scales,
            )
            state, extra, verdict = self._run("train", batch, step + i, limit, added, staleness)
            results.append((state, extra, tf.concat([verdict, [staleness.value]], axis=0)))
            num_own += 1
        return results

    def test(self, batches: Sequence[Any], step: Any) -> list[tuple[list[Any], dict[str, Any]]]:
        """Returns for each batch its own metric state, and the logs that are no metrics."""
        return [self._run("test", batch, step, None, self._read_added())[:2] for batch in batches]

    def predict(self, batch: Any) -> Any:
        """Returns the model's outputs for a batch."""
        with tf.distribute.ReplicaContext(keras_internals.DEFAULT_STRATEGY, 0), CapturingScope([]):
            return self._model.predict_step(batch)

    def _read_added(self) -> list[tuple[keras.Variable, Any]]:
        return [(v, tf.identity(keras_internals.native(v))) for v in self._added]

    def _run(
        self,
        kind: str,
        batch: Any,
        step: Any,
        limit: Any,
        added: list[tuple[keras.Variable, Any]],
        staleness: StepStaleness | None = None,
    ) -> tuple[list[Any], dict[str, Any], Any]:
        check = None if limit is None else StepCheck(limit)
        # What may have to be undone is captured.
        written = self._model.trainable_variables if check is None else []
        scope = CapturingScope([*added, *self._local_state(step)], written=written)
        with self._readable(kind):
            with self._as_single_device(check, scope, staleness), scope:
                outputs = getattr(self._model, f"{kind}_step")(batch)
            self._write(scope, added, check)
        self.returned[kind] = returned_names(outputs)
        state = self._added_to_metrics(scope)
        if check is not None:
            state = [tf.where(check.is_sound, value, tf.zeros_like(value)) for value in state]
        # No None: a closure's results must be tensors.
        verdict = UNCHECKED if check is None else check.verdict
        return state, scalar_logs(outputs, self._metric_names), tf.convert_to_tensor(verdict)

    @contextlib.contextmanager
    def _readable(self, kind: str) -> Iterator[None]:
        """Says in one line where a model's own step does what works on variables alone: values stand for them here."""
        try:
            yield
        except (AttributeError, TypeError, ValueError) as error:
            said = str(error)
            if "object has no attribute 'handle'" in said:
                what = "asks for the gradient of a weight that it has assigned before, which on_nan could not undo"
            elif "out of scope" in said:
                what = "assigns variables inside a tf.cond or a loop"
            else:
                raise
            raise ConfigError(
                f"under ps {type(self._model).__name__}.{kind}_step {what}: assign in every step, with tf.where, and "
                "before it none of the weights; or choose another strategy, or on_nan='ignore'."
            ) from error

    def _added_to_metrics(self, scope: CapturingScope) -> list[Any]:
        """Returns what a step has added to the state that metrics start from."""
        return [
            tf.convert_to_tensor(scope.get_current_value(v)) - start
            for v, start in zip(self._metrics, self.metric_origins, strict=True)
        ]

    def _local_state(self, step: Any, part: Any = 0) -> list[tuple[keras.Variable, Any]]:
        state: list[tuple[keras.Variable, Any]] = list(zip(self._metrics, self.metric_origins, strict=True))
        for variable, draws in zip(self._seeds, self._draws or [0] * len(self._seeds), strict=True):
            start = tf.cast(keras_internals.native(variable), tf.int64)
            shift = tf.stack([tf.cast(part, tf.int64) * SEED_STRIDE, tf.cast(step, tf.int64) * draws])
            moved = tf.math.floormod(start + shift, 2**32)
            state.append((variable, tf.cast(moved, variable.dtype)))
        return state

    def _write(
        self, scope: CapturingScope, added: list[tuple[keras.Variable, Any]], check: StepCheck | None
    ) -> None:
        for variable, before in added:
            if id(variable) in scope.num_updates:
                change = scope.get_current_value(variable) - before
                # Whoever accumulates counts every batch: the chief says by it which batches belong together.
                if check is not None and not (self._accumulating and id(variable) in self._counter_ids):
                    change = tf.where(check.is_sound, change, tf.zeros_like(change))
                keras_internals.native(variable).assign_add(change)
        assigned = [v for v in self._assigned if id(v) in scope.num_updates]

        def assign() -> None:
            for variable in assigned:
                keras_internals.native(variable).assign(scope.get_current_value(variable))

        if check is None:
            assign()
        elif assigned:
            run_if(check.is_sound, assign)

    def _count_draws(self, batch: Any) -> list[int]:
        """Returns how far one step moves each seed generator, by tracing one that is thrown away."""
        scope = CapturingScope([], written=self._model.trainable_variables)

        def throw_away(batch: Any) -> None:
            with contextlib.ExitStack() as stack:
                if self._accumulating is not None:
                    never = keras_internals.accumulating_with(self._accumulating, lambda *_: None)
                    stack.enter_context(never)
                stack.enter_context(self._as_single_device(None, scope, None))
                stack.enter_context(scope)
                stack.enter_context(self._readable("train"))
                self._model.train_step(batch)

        specs = tf.nest.map_structure(tf.type_spec_from_value, batch)
        tf.function(throw_away, autograph=False).get_concrete_function(specs)
        return [scope.num_updates.get(id(v), 0) for v in self._seeds]

    def _as_single_device(
        self, check: StepCheck | None, scope: CapturingScope, staleness: StepStaleness | None
    ) -> contextlib.AbstractContextManager[None]:
        def wrap(optimizer: keras.optimizers.Optimizer, apply: Callable[..., Any]) -> Callable[..., Any]:
            inner = apply if check is None else self._checked(optimizer, apply, check, scope)
            if staleness is None:
                return inner

            def apply_measured(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
                grads = list(grads)
                with staleness.measure(optimizer, grads):
                    return inner(grads, trainable_variables)

            return apply_measured

        note_loss = None if check is None else check.note_loss
        return as_single_device(self._model, optimizers=self._optimizers, apply=wrap, note_loss=note_loss)

    def _checked(
        self,
        optimizer: keras.optimizers.Optimizer,
        apply: Callable[..., Any],
        check: StepCheck,
        scope: CapturingScope,
    ) -> Callable[..., Any]:
        def apply_sound(grads: Sequence[Any], trainable_variables: Any = None) -> None:
            is_sound = check.judge(optimizer, grads, check.own_loss)
            if self._accumulating is not None:
                # Which batches are summed is fixed when the step is traced: one that is left out adds zeros.
                apply([zero_unless(is_sound, g) for g in grads], trainable_variables)
                return
            assigned: list[keras.Variable] = []

            def run() -> list[Any]:
                inner = CapturingScope([], outer=scope)
                with inner:
                    apply(grads, trainable_variables)
                assigned.extend(v for v in self._shared if id(v) in inner.num_updates)
                return [tf.convert_to_tensor(inner.get_current_value(v)) for v in assigned]

            # What Keras assigns in a branch leaves it as the branch's result.
            keep = lambda: [tf.convert_to_tensor(scope.get_current_value(v)) for v in assigned]  # noqa: E731
            values = tf.cond(is_sound, run, keep)
            for variable, value in zip(assigned, tf.nest.flatten(values), strict=True):
                scope.add_update((variable, value))

        return apply_sound


@contextlib.contextmanager
def as_single_device(model: keras.Model, **parts: Any) -> Iterator[None]:
    """Lets Keras see one replica, so that it scales no loss and exchanges no gradient by itself.

    `parts` are those of a `ReplicaBinding`.
    """
    with (
        tf.distribute.ReplicaContext(keras_internals.DEFAULT_STRATEGY, 0),
        keras_internals.ReplicaBinding(model=model, **parts),
    ):
        yield


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
