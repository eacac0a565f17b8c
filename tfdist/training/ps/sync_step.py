"""One synchronous step over parameter servers: the gradients of a batch's parts are added up, and applied once.

Each part's gradient, weighted by the part's share of the batch, lies in a slot of its own beside the weight that it
belongs to: a worker that dies and whose part is computed again overwrites it, and the sum does not depend on who comes
first. The chief then has the parameter servers add the slots up and apply the sum, once.

With backup workers a step is that of the parts that have come, as if the others were not in the batch.

Source: Chen et al. 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.layers.embedding import shards_of
from tfdist.optimizers.sparse import with_summed_rows
from tfdist.training.capturing import CapturingScope
from tfdist.training.metrics import returned_names, scalar_logs
from tfdist.training.ps.async_step import AsyncPsStep, as_single_device
from tfdist.training.step.finite_check import UNCHECKED, StepCheck, on_values, run_if


class _Slot:
    """Where one part's number for one variable lies, beside the variable: a tensor, or some rows."""

    def __init__(self, variable: keras.Variable, *, has_rows: bool) -> None:
        native = keras_internals.native(variable)
        self._shape, self._dtype = native.shape, native.dtype
        self.has_rows = has_rows
        with tf.device(native.device):
            if has_rows:
                # As bytes: workers cannot be sent a handle to a variable whose number of rows is open.
                no_rows = tf.zeros([0, *self._shape[1:]], self._dtype), tf.zeros([0], tf.int64)
                self._variables = [
                    tf.Variable(tf.io.serialize_tensor(tensor), trainable=False) for tensor in no_rows
                ]
            else:
                self._variables = [tf.Variable(tf.zeros(self._shape, self._dtype), trainable=False)]

    def write(self, number: Any) -> None:
        if not self.has_rows:
            self._variables[0].assign(tf.convert_to_tensor(number))
            return
        tensors = number.values, tf.cast(number.indices, tf.int64)
        for variable, tensor in zip(self._variables, tensors, strict=True):
            variable.assign(tf.io.serialize_tensor(tensor))

    def read(self) -> list[tf.Tensor]:
        """Returns the tensor, or the values and indices of the rows."""
        if not self.has_rows:
            return [self._variables[0].read_value()]
        values, indices = (variable.read_value() for variable in self._variables)
        return [
            tf.ensure_shape(tf.io.parse_tensor(values, self._dtype), [None, *self._shape[1:]]),
            tf.ensure_shape(tf.io.parse_tensor(indices, tf.int64), [None]),
        ]


class SyncPsStep(AsyncPsStep):
    """A `AsyncPsStep` that can also make one step of several workers' parts of a batch."""

    def __init__(self, *, model: keras.Model, num_parts: int) -> None:
        super().__init__(model)
        self._num_parts = num_parts
        self._slots: dict[int, list[_Slot]] = {}
        self._with_gradients: list[keras.Variable] = []
        self._with_changes: list[keras.Variable] = []

    def check(self) -> None:
        """Checks that parts of a batch make what the whole would.

        Raises:
            ConfigError: If they do not.
        """
        remedy = "choose ps_mode='async' or strategy='multiworker'."
        if len(self._optimizers) > 1:
            raise ConfigError(
                f"ps_mode='sync' with {len(self._optimizers)} optimizers: the second could not see what the first has "
                f"changed; {remedy}"
            )
        for layer in keras_internals.find_layers(self._model, keras.layers.BatchNormalization):
            if layer.synchronized and self._num_parts > 1:
                raise ConfigError(
                    f"{layer.name!r} is synchronized, and ps_mode='sync' has no exchange inside a step; leave "
                    "synchronized=True out, or choose strategy='multiworker'."
                )

    def compute_part(
        self, batch: Any, part: Any, share: Any, step: Any
    ) -> tuple[list[Any], dict[str, Any], Any]:
        """Computes a part's gradients and leaves them in its slots; weights stay as they are.

        Args:
            batch: The part, as `keras.Model.train_step` takes it.
            part: Its place, int32 scalar.
            share: Its examples ÷ the whole batch's, float32 scalar.
            step: Steps before, int64 scalar: with `part` it fixes the random streams.

        Returns:
            The metric state, the logs that are no metrics, and the loss, the last two weighted by the share.

        Raises:
            ConfigError: If the model's step or loss cannot be divided.
        """
        if self._draws is None:
            self._draws = self._count_draws(batch)
        added = self._read_added()
        scope = CapturingScope([*added, *self._local_state(step, part)])
        check = StepCheck(float("inf"))
        applied: list[list[tuple[Any, keras.Variable]]] = []

        def capture(optimizer: keras.optimizers.Optimizer, apply: Any) -> Any:
            def keep(grads: Sequence[Any], trainable_variables: Any = None) -> None:
                variables = trainable_variables or self._model.trainable_variables
                applied.append([(g, v) for g, v in zip(grads, variables, strict=True) if g is not None])

            return keep

        def correct(values: Any, sample_weight: Any, mask: Any, reduction: str | None) -> Any:
            return self._loss_correction(share, sample_weight, mask, reduction)

        with (
            as_single_device(
                self._model,
                optimizers=self._optimizers,
                apply=capture,
                loss_correction=correct,
                note_loss=check.note_loss,
            ),
            scope,
        ):
            outputs = self._model.train_step(batch)
        self._check_step(applied, scope)
        counters = self._counter_ids
        changes = [
            (_weighted_change(scope.get_current_value(v) - before, share), v)
            for v, before in added
            if id(v) in scope.num_updates and id(v) not in counters
        ]
        gradients = [(_weighted(g, share), v) for g, v in applied[0]]
        self._with_gradients = [v for _, v in gradients]
        self._with_changes = [v for _, v in changes]
        self._write_slots(part, [*gradients, *changes])
        self.returned["train"] = returned_names(outputs)
        state = self._added_to_metrics(scope)
        extra = {k: v * tf.cast(share, v.dtype) for k, v in scalar_logs(outputs, self._metric_names).items()}
        return state, extra, tf.math.multiply_no_nan(check.own_loss, share)

    def apply_parts(self, num_parts: int, loss: Any, limit: Any = None, *, shares: Any = None) -> Any:
        """Adds the parts up and applies them once; one process calls it, when those that count are there.

        Args:
            num_parts: In how many slots, from the first on, there may be parts that count.
            loss: Of the batch, float32 scalar.
            limit: Largest loss that passes the check; None checks nothing.
            shares: Of each slot's part, `[num_parts]` float32; 0 where none counts. None: all count, and are the batch.

        Returns:
            The check's verdict.
        """
        (optimizer,) = self._optimizers
        gradients = [self._sum_slots(v, num_parts, shares) for v in self._with_gradients]
        changes = [(v, self._sum_slots(v, num_parts, shares)) for v in self._with_changes]

        def update() -> None:
            apply = with_summed_rows(optimizer, optimizer.apply, shards_of(self._model))
            with keras_internals.updating_with(optimizer, _beside_its_weight(optimizer.update_step)):
                apply(gradients, self._with_gradients)
            for variable, change in changes:
                keras_internals.native(variable).assign_add(change)

        with as_single_device(self._model, optimizers=self._optimizers):
            if limit is None:
                update()
                return tf.convert_to_tensor(UNCHECKED)
            check = StepCheck(limit)
            run_if(check.judge(optimizer, gradients, loss), update)
            return check.verdict

    def _loss_correction(self, share: Any, sample_weight: Any, mask: Any, reduction: str | None) -> Any:
        if self._num_parts == 1 or reduction in (None, "none"):
            return None
        if reduction == "sum":
            return 1.0 / share
        if mask is not None or (reduction == "mean_with_sample_weight" and sample_weight is not None):
            what = "a mask" if mask is not None else "reduction='mean_with_sample_weight'"
            raise ConfigError(
                f"a loss with {what} under ps_mode='sync': it divides by a number that only all parts together know; "
                "choose ps_mode='async' or strategy='multiworker'."
            )
        return None

    def _check_step(self, applied: Sequence[Any], scope: CapturingScope) -> None:
        if len(applied) != 1 or any(id(v) in scope.num_updates for v in self._assigned):
            raise ConfigError(
                f"{type(self._model).__name__}.train_step under ps_mode='sync' must change weights by one call of "
                f"optimizer.apply or apply_gradients, got {len(applied)} calls; change it, or choose ps_mode='async'."
            )

    def _write_slots(self, part: Any, numbers: Sequence[tuple[Any, keras.Variable]]) -> None:
        for number, variable in numbers:
            if id(variable) not in self._slots:
                # Variables cannot be made inside the function that is being traced.
                with tf.init_scope():
                    has_rows = isinstance(number, tf.IndexedSlices)
                    self._slots[id(variable)] = [
                        _Slot(variable, has_rows=has_rows) for _ in range(self._num_parts)
                    ]

        def write(place: int) -> Any:
            for number, variable in numbers:
                self._slots[id(variable)][place].write(number)
            return tf.constant(0)

        tf.switch_case(part, [lambda place=place: write(place) for place in range(self._num_parts)])

    def _sum_slots(self, variable: keras.Variable, num_parts: int, shares: Any) -> Any:
        slots = self._slots[id(variable)][:num_parts]
        with tf.device(keras_internals.native(variable).device):
            numbers = [slot.read() for slot in slots]
            if slots[0].has_rows:
                return _join_rows(numbers, variable, shares)
            tensors = [tensor for (tensor,) in numbers]
            if not tensors[0].dtype.is_floating:
                return (
                    tensors[0]
                    if shares is None
                    else tf.stack(tensors)[tf.argmax(tf.cast(shares > 0, tf.int32))]
                )
            if shares is None:
                return tf.add_n(tensors)
            # Not times 0: what a late part has left may be anything.
            tensors = [tf.where(shares[k] > 0, t, tf.zeros_like(t)) for k, t in enumerate(tensors)]
            return _weighted(tf.add_n(tensors), 1.0 / tf.reduce_sum(shares))


def _beside_its_weight(update_step: Callable[..., None]) -> Callable[..., None]:
    """Returns an optimizer's `update_step` that computes where the weight lies: it and its gradient stay there."""

    def update(gradient: Any, variable: Any, learning_rate: Any) -> None:
        with tf.device(variable.device):
            update_step(gradient, variable, learning_rate)

    return update


def _weighted(grad: Any, share: Any) -> Any:
    return on_values(lambda values: values * tf.cast(share, values.dtype), grad)


def _weighted_change(change: Any, share: Any) -> Any:
    """Moving statistics become the mean of the parts'; whole numbers, such as counts, move as the first part's."""
    return change * tf.cast(share, change.dtype) if change.dtype.is_floating else change


def _join_rows(numbers: Sequence[list[tf.Tensor]], variable: keras.Variable, shares: Any) -> tf.IndexedSlices:
    values, indices = (list(tensors) for tensors in zip(*numbers, strict=True))
    if shares is not None:
        # Not zeros in their place: a lazy optimizer moves every row that it is given.
        ends = [tf.where(shares[k] > 0, tf.shape(i)[0], 0) for k, i in enumerate(indices)]
        values = [v[:end] for v, end in zip(values, ends, strict=True)]
        indices = [i[:end] for i, end in zip(indices, ends, strict=True)]
    shape = tf.constant(list(variable.shape), tf.int64)
    slices = tf.IndexedSlices(tf.concat(values, 0), tf.concat(indices, 0), shape)
    return slices if shares is None else _weighted(slices, 1.0 / tf.reduce_sum(shares))
