"""Optimizers: their slots, counters, clipping and decay."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.optimizers import base_optimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer

from tfdist.keras_internals.attributes import holding
from tfdist.keras_internals.variables import native

ApplyFn = Callable[..., Any]


def set_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Replaces a compiled model's optimizer, also in what `model.save` writes.

    Leans on `Trainer._compile_config`.
    """
    model.optimizer = optimizer
    if model._compile_config is not None:
        model._compile_config.config["optimizer"] = keras.saving.serialize_keras_object(optimizer)


def find_optimizers(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Returns the compiled optimizer and those that a model with its own `train_step` keeps as attributes.

    Leans on `Layer._flatten_layers`.
    """
    found: dict[int, keras.optimizers.Optimizer] = {}
    for layer in model._flatten_layers():
        for attribute in vars(layer).values():
            for value in attribute if isinstance(attribute, (list, tuple)) else [attribute]:
                if isinstance(value, keras.optimizers.Optimizer):
                    found[id(value)] = value
    return list(found.values())


def inner_optimizers(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizer that one with a scaled loss wraps, if it is one."""
    return [optimizer.inner_optimizer] if isinstance(optimizer, LossScaleOptimizer) else []


def trainable_variables_of(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Returns the weights that an optimizer was built for, in the order in which it takes their gradients.

    Leans on `Optimizer._trainable_variables`.
    """
    return list(optimizer._trainable_variables)


def batch_counter(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """Returns the variable that counts batches, those that were only accumulated too.

    Leans on `Optimizer._iterations`; the public `iterations` is no variable where gradients are accumulated.
    """
    return optimizer._iterations


def accumulators(optimizer: keras.optimizers.Optimizer) -> dict[int, Any]:
    """Returns the TensorFlow variables in which an optimizer sums gradients, by the id of the Keras variable.

    Leans on `Optimizer._accumulated_gradients` and `Optimizer._trainable_variables`.
    """
    pairs = zip(optimizer._trainable_variables, optimizer._accumulated_gradients, strict=True)
    return {id(v): native(a) for v, a in pairs if a is not None}


@contextlib.contextmanager
def accumulating_with(
    optimizer: keras.optimizers.Optimizer,
    gather: Callable[[Sequence[Any], Sequence[keras.Variable]], Sequence[Any] | None],
) -> Iterator[None]:
    """Lets `gather` decide, instead of a shared counter, when an optimizer that accumulates updates its weights.

    Leans on `Optimizer._backend_apply_gradients` and what it calls: `_clip_gradients`, `_apply_weight_decay`,
    `_backend_update_step`, `_update_model_variables_moving_average`, `_overwrite_model_variables_with_average_value`.

    Args:
        optimizer: One with `gradient_accumulation_steps`.
        gather: `(gradients, variables) → gradients to apply, or None: not yet`.
    """

    def apply(grads: Sequence[Any], variables: Sequence[keras.Variable]) -> None:
        ready = gather(grads, variables)
        if ready is not None:
            ready = optimizer._clip_gradients(ready)
            optimizer._apply_weight_decay(variables)
            optimizer._backend_update_step(ready, variables, optimizer.learning_rate)
        if optimizer.use_ema:
            everything = optimizer._trainable_variables
            optimizer._update_model_variables_moving_average(everything)
            if optimizer.ema_overwrite_frequency:
                keras.ops.cond(
                    (optimizer.iterations + 1) % optimizer.ema_overwrite_frequency == 0,
                    lambda: optimizer._overwrite_model_variables_with_average_value(everything),
                    lambda: None,
                )

    with holding(optimizer, _backend_apply_gradients=apply):
        yield


@contextlib.contextmanager
def updating_with(
    optimizer: keras.optimizers.Optimizer, update: Callable[[Any, Any, Any], None]
) -> Iterator[None]:
    """Lets `update` take the place of an optimizer's `update_step`, which Keras looks up in the optimizer itself.

    Args:
        optimizer: Any.
        update: `(gradient, TensorFlow variable, learning rate)`.
    """
    with holding(optimizer, update_step=update):
        yield


def adam_slots(optimizer: keras.optimizers.Adam, variable: Any) -> tuple[Any, Any]:
    """Returns the TensorFlow variables of a weight's two moments.

    Leans on `Adam._momentums`, `Adam._velocities` and `Optimizer._get_variable_index`.

    Args:
        optimizer: Built.
        variable: The TensorFlow variable of the weight.
    """
    index = optimizer._get_variable_index(variable)
    return native(optimizer._momentums[index]), native(optimizer._velocities[index])


@contextlib.contextmanager
def scaling_rate(optimizer: keras.optimizers.Optimizer, factor: Any) -> Iterator[None]:
    """Multiplies an optimizer's learning rate, a schedule's too.

    Leans on `Optimizer._get_current_learning_rate`, which `learning_rate` asks.
    """
    current = optimizer._get_current_learning_rate

    def scaled() -> Any:
        rate = tf.convert_to_tensor(current())
        return rate * tf.cast(factor, rate.dtype)

    with holding(optimizer, _get_current_learning_rate=scaled):
        yield


class ClipsSlices:
    """Mixed into an optimizer, clips row-sparse gradients as the dense ones that they stand for.

    Their rows must be unique: then the missing ones, which are zeros, change neither a norm nor what is clipped.

    Leans on `Optimizer._clip_gradients`.
    """

    def _clip_gradients(self, grads: Sequence[Any]) -> list[Any]:
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads]
        clipped = super()._clip_gradients(values)  # type: ignore[misc]
        return [
            tf.IndexedSlices(new, old.indices, old.dense_shape) if isinstance(old, tf.IndexedSlices) else new
            for old, new in zip(grads, clipped, strict=True)
        ]


class OptimizerView:
    """An optimizer as its own `update_step` sees it, but with other variables in place of its slots.

    Leans on `Optimizer._get_variable_index` and on slots being kept in lists, one entry for each weight.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, variable: Any, replace: Callable[[Any], Any]
    ) -> None:
        """Prepares the view.

        Args:
            optimizer: A built optimizer.
            variable: The TensorFlow variable of the weight that is updated.
            replace: `TensorFlow variable of a slot → what stands for it`.
        """
        self._optimizer = optimizer
        self._index = optimizer._get_variable_index(variable)
        self._replace = replace

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._optimizer, name)
        # Keras hands its lists back wrapped, as a kind of list too.
        return [self._replace(native(value[self._index]))] if isinstance(value, list) and value else value

    def _get_variable_index(self, variable: Any) -> int:
        del variable
        return 0  # The lists hold this weight's slot alone.


def decays(optimizer: keras.optimizers.Optimizer, variable: Any) -> bool:
    """Tells whether an optimizer's weight decay reaches a variable.

    Leans on `Optimizer._use_weight_decay`.
    """
    return optimizer.weight_decay is not None and bool(optimizer._use_weight_decay(variable))


@contextlib.contextmanager
def updating_only(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable], *, norm: Any = None
) -> Iterator[None]:
    """Lets an optimizer that was built for all weights of a model update some, as if there were no others.

    Leans on `Optimizer._trainable_variables`, `._accumulated_gradients` and `._model_variables_moving_average`, lists
    of which Keras walks through all, and on `base_optimizer.global_norm`.

    Args:
        optimizer: Built for all.
        variables: Those that have their values here, in their order.
        norm: Of the gradients by all weights, by which a global norm is clipped; None: of those that are updated.
    """
    wanted = {id(v) for v in variables}
    is_kept = [id(v) in wanted for v in optimizer._trainable_variables]
    names = ("_trainable_variables", "_accumulated_gradients", "_model_variables_moving_average")
    saved = {name: optimizer.__dict__[name] for name in names if name in optimizer.__dict__}
    found = {name: list(itertools.compress(values, is_kept)) for name, values in saved.items()}
    if (
        "_accumulated_gradients" in saved
    ):  # Keras finds these by a weight's place among all, and passes over None
        pairs = zip(saved["_accumulated_gradients"], is_kept, strict=False)
        found["_accumulated_gradients"] = [value if kept else None for value, kept in pairs]
    norms = {} if norm is None else {"global_norm": lambda gradients: norm}
    with holding(optimizer, **found), holding(base_optimizer, **norms):
        yield


def square_norm(gradients: Sequence[Any]) -> Any:
    """Returns the sum of the squares of gradients, as an optimizer that clips by the global norm counts them.

    Leans on `base_optimizer.global_norm`.
    """
    return tf.square(base_optimizer.global_norm(list(gradients))) if gradients else tf.constant(0.0)
