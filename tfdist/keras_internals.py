"""Every touch of a private Keras or TensorFlow name, checked on Keras 3.15.1 and TensorFlow 2.21.0.

Nothing else in tfdist may name one. Each function says which private name it leans on;
`tests/unit/test_keras_internals.py` fails when a version changes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses import loss as keras_loss
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer

_DEFAULT_STRATEGY = tf.distribute.get_strategy()

_reduce_weighted_values = keras_loss.reduce_weighted_values
_ABSENT = object()

ApplyFn = Callable[..., Any]
LossCorrection = Callable[[Any, Any, Any, str | None], Any]


def build_model(model: keras.Model, batch: Any) -> None:
    """Creates every variable of a compiled model: layers, loss, metrics and optimizer slots.

    Leans on `Trainer._symbolic_build`.

    Args:
        model: A compiled model; call this inside the strategy's scope.
        batch: Nest `x`, `(x, y)` or `(x, y, sample_weight)` of tensors with a leading batch axis.
    """
    model._symbolic_build(data_batch=batch)
    for optimizer in find_optimizers(model):
        if not optimizer.built:
            # One that `train_step` uses for some weights only gets slots for all: Keras would build it at its
            # first step, when no variable can be made any more.
            optimizer.build(model.trainable_variables)


def set_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Replaces a compiled model's optimizer, also in what `model.save` writes.

    Leans on `Trainer._compile_config`.
    """
    model.optimizer = optimizer
    if model._compile_config is not None:
        model._compile_config.config["optimizer"] = keras.saving.serialize_keras_object(optimizer)


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the state variable of every seed generator in the model.

    Leans on `Layer._flatten_layers` and `Layer._seed_generators`.
    """
    found: dict[int, keras.Variable] = {}
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            found[id(generator.state)] = generator.state
    return list(found.values())


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


def is_compiled(model: keras.Model) -> bool:
    """Tells whether `compile` was called."""
    return bool(getattr(model, "compiled", False))


def all_variables(
    model: keras.Model, optimizers: Iterable[keras.optimizers.Optimizer]
) -> list[keras.Variable]:
    """Returns every Keras variable that a step may touch, each once: weights, seeds, metrics, slots."""
    found: dict[int, keras.Variable] = {}
    for variable in [*model.variables, *model.metrics_variables]:
        found[id(variable)] = variable
    for optimizer in optimizers:
        for variable in optimizer.variables:
            found[id(variable)] = variable
    return list(found.values())


def native(variable: keras.Variable) -> Any:
    """Returns the TensorFlow variable behind a Keras variable, free of casts and scopes.

    Leans on `Variable._value`.
    """
    return variable._value


class ReplicaBinding:
    """Points Keras variables at one replica's own TensorFlow variables, and its optimizers at one gradient exchange.

    With it in force a Keras step reads and writes plain local variables, as on one device. It must be
    lifted whenever another replica's thread may run, that is, around every exchange.

    Leans on `Variable._value`, `Optimizer._distribution_strategy`, `Optimizer._all_reduce_sum_gradients`
    and `keras.src.losses.loss.reduce_weighted_values`, in which every `keras.Loss` ends.
    """

    def __init__(
        self,
        *,
        variables: Sequence[tuple[keras.Variable, tf.Variable]],
        optimizers: Sequence[keras.optimizers.Optimizer],
        apply: Callable[[keras.optimizers.Optimizer, ApplyFn], ApplyFn],
        loss_correction: LossCorrection,
    ) -> None:
        """Prepares the binding.

        Args:
            variables: Keras variable and this replica's own TensorFlow variable.
            optimizers: Those whose `apply` a step may call.
            apply: `(optimizer, its apply) → the apply to use`.
            loss_correction: `(values, sample_weight, mask, reduction) → factor on the reduced loss, or None`.
        """
        self._loss_correction = loss_correction
        self._variables = variables
        self._optimizers = [o for outer in optimizers for o in (outer, *_inner_optimizers(outer))]
        self._applies = [(o, apply(o, o.apply)) for o in optimizers]
        self._saved: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Puts the binding in force."""
        for variable, local in self._variables:
            self._set(variable, "_value", local)
        for optimizer in self._optimizers:
            self._set(optimizer, "_distribution_strategy", _DEFAULT_STRATEGY)
            self._set(optimizer, "_all_reduce_sum_gradients", list)
        for optimizer, apply in self._applies:
            self._set(optimizer, "apply", apply)
        self._set(keras_loss, "reduce_weighted_values", self._reduced_loss)

    def remove(self) -> None:
        """Restores what `install` replaced."""
        for owner, name, value in reversed(self._saved):
            if value is _ABSENT:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = value
        self._saved.clear()

    def _reduced_loss(
        self,
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        loss = _reduce_weighted_values(
            values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
        )
        factor = self._loss_correction(
            values, sample_weight, mask, keras_loss.standardize_reduction(reduction)
        )
        return loss if factor is None else loss * tf.cast(factor, loss.dtype)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        # Straight into __dict__: Keras's __setattr__ would track the value as a part of the layer.
        self._saved.append((owner, name, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value


def _inner_optimizers(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    return [optimizer.inner_optimizer] if isinstance(optimizer, LossScaleOptimizer) else []


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

    Yields:
        While it is in force.
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

    # Straight into __dict__: Keras's __setattr__ would track the value.
    optimizer.__dict__["_backend_apply_gradients"] = apply
    try:
        yield
    finally:
        del optimizer.__dict__["_backend_apply_gradients"]


def creating_strategy(model: keras.Model) -> tf.distribute.Strategy | None:
    """Returns the strategy in whose scope the model was made, or None.

    Leans on `TensorFlowTrainer._distribute_strategy`.
    """
    return model._distribute_strategy
