"""Keras's objects bound to one replica's own variables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses import loss as keras_loss

from tfdist.keras_internals.attributes import ABSENT
from tfdist.keras_internals.losses import LossCorrection, reduce_weighted_values
from tfdist.keras_internals.optimizers import ApplyFn, inner_optimizers
from tfdist.keras_internals.strategies import DEFAULT_STRATEGY
from tfdist.keras_internals.variables import native


class ReplicaBinding:
    """Points Keras variables at one replica's own TensorFlow variables, and its optimizers at one gradient exchange.

    With it in force a Keras step reads and writes plain local variables, as on one device. It must be
    lifted whenever another replica's thread may run, that is, around every exchange.

    Layers keep the losses that they add (`add_loss`, activity regularizers) until the model is called again: each
    replica has its own list of them, or one that meets the others inside its step would count theirs.

    Leans on `Variable._value`, `Layer._losses`, `Optimizer._distribution_strategy`, `Optimizer._var_key`,
    `Optimizer._all_reduce_sum_gradients` and `keras.src.losses.loss.reduce_weighted_values`, in which every
    `keras.Loss` ends; and on Keras looking `compute_loss` up in the model itself.
    """

    def __init__(
        self,
        *,
        variables: Sequence[tuple[keras.Variable, tf.Variable]] = (),
        optimizers: Sequence[keras.optimizers.Optimizer] = (),
        apply: Callable[[keras.optimizers.Optimizer, ApplyFn], ApplyFn] = lambda _, apply: apply,
        loss_correction: LossCorrection = lambda *args: None,
        model: keras.Model | None = None,
        note_loss: Callable[..., None] | None = None,
        updates: Sequence[tuple[keras.metrics.Metric, Callable[..., Any]]] = (),
    ) -> None:
        """Prepares the binding.

        Args:
            variables: Keras variable and this replica's own TensorFlow variable.
            optimizers: Those whose `apply` a step may call.
            apply: `(optimizer, its apply) → the apply to use`.
            loss_correction: `(values, sample_weight, mask, reduction) → factor on the reduced loss, or None`.
            model: Whose layers keep their losses apart, and whose `compute_loss` is listened to.
            note_loss: `(loss, is_total=…)`, told of each reduced loss and each total; None: of none.
            updates: Metrics, and what stands for their `update_state`.
        """
        self._model = model
        self._note_loss = note_loss
        self._loss_correction = loss_correction
        self._variables = variables
        self._optimizers = [o for outer in optimizers for o in (outer, *inner_optimizers(outer))]
        self._applies = [(o, apply(o, o.apply)) for o in optimizers]
        self._updates = updates
        self._losses: list[tuple[Any, list[Any]]] = (
            [] if model is None else [(layer, []) for layer in model._flatten_layers()]
        )
        self._saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        self.install()

    def __exit__(self, *exc_info: Any) -> None:
        self.remove()

    def install(self) -> None:
        """Puts the binding in force."""
        for variable, local in self._variables:
            self._set(variable, "_value", local)
        for optimizer in self._optimizers:
            self._set(optimizer, "_distribution_strategy", DEFAULT_STRATEGY)
            self._set(optimizer, "_all_reduce_sum_gradients", list)
            self._set(optimizer, "_var_key", functools.partial(_key_of, optimizer))
        for optimizer, apply in self._applies:
            self._set(optimizer, "apply", apply)
        for metric, update in self._updates:
            self._set(metric, "update_state", update)
        for layer, losses in self._losses:
            self._set(layer, "_losses", losses)
        self._set(keras_loss, "reduce_weighted_values", self._reduced_loss)
        if self._model is not None and self._note_loss is not None:
            self._set(self._model, "compute_loss", self._total_loss)

    def remove(self) -> None:
        """Restores what `install` replaced."""
        for owner, name, value in reversed(self._saved):
            if value is ABSENT:
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
        loss = reduce_weighted_values(
            values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
        )
        factor = self._loss_correction(
            values, sample_weight, mask, keras_loss.standardize_reduction(reduction)
        )
        loss = loss if factor is None else loss * tf.cast(factor, loss.dtype)
        if self._note_loss is not None and len(loss.shape) == 0:
            self._note_loss(loss, is_total=False)
        return loss

    def _total_loss(self, *args: Any, **kwargs: Any) -> Any:
        assert self._model is not None and self._note_loss is not None
        loss = type(self._model).compute_loss(self._model, *args, **kwargs)
        self._note_loss(loss, is_total=True)
        return loss

    def _set(self, owner: Any, name: str, value: Any) -> None:
        # Straight into __dict__: Keras's __setattr__ would track the value as a part of the layer.
        self._saved.append((owner, name, owner.__dict__.get(name, ABSENT)))
        owner.__dict__[name] = value


def _key_of(optimizer: keras.optimizers.Optimizer, variable: Any) -> Any:
    """Returns by what an optimizer knows a variable, also after a step has assigned it and captured the value."""
    own = native(variable) if isinstance(variable, keras.Variable) else variable
    return type(optimizer)._var_key(optimizer, own)
