"""Whether something treats each part of a tensor for itself: found by trying, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals

_SIZE = 4


def maps_by_parts(function: Callable[[Any], Any], *, shape: tuple[int, ...], axis: int) -> bool:
    """Tells whether a function of a tensor makes of its halves along an axis the halves of what it makes of it."""
    whole, halves = _draw(shape, axis)
    try:
        made = [np.asarray(function(half)) for half in halves]
        wanted = np.asarray(function(whole))
    except (ValueError, TypeError, tf.errors.OpError):  # A half has no shape for it.
        return False
    return _is_close(np.concatenate(made, axis), wanted)


def adds_by_parts(function: Callable[[Any], Any], *, shape: tuple[int, ...], axis: int) -> bool:
    """Tells whether a function's number for a tensor is the sum of those for its halves."""
    whole, (first, second) = _draw(shape, axis)
    return _is_close(np.asarray(function(first)) + np.asarray(function(second)), np.asarray(function(whole)))


def updates_by_parts(optimizer: keras.optimizers.Optimizer) -> bool:
    """Tells whether an optimizer changes each number by its own gradients; a global norm, which is told it, aside."""
    results = []
    whole, halves = _draw((_SIZE, _SIZE), 0)
    for values in ([whole], halves):
        own = {"learning_rate": 0.1, "global_clipnorm": None, "gradient_accumulation_steps": None}
        copy = type(optimizer).from_config(optimizer.get_config() | own)
        variables = [keras.Variable(value) for value in values]
        copy.build(variables)
        for scale in (3.0, -1.0):
            # Not what is proportional to the weights: a norm would cancel out.
            copy.apply([tf.constant(scale * value**2 + 1) for value in values], variables)
        moved = np.concatenate([variable.numpy() for variable in variables]) - whole
        results.append(moved / np.abs(moved).max())
    return _is_close(*results)


def is_divisible(variable: keras.Variable, axis: int) -> bool:
    """Tells whether a weight's regularizer and constraint are the same for parts of it."""
    shape = tuple(_SIZE for _ in variable.shape)
    regularizer, constraint = variable.regularizer, variable.constraint
    return (regularizer is None or adds_by_parts(regularizer, shape=shape, axis=axis)) and (
        constraint is None or maps_by_parts(constraint, shape=shape, axis=axis)
    )


def acts_by_parts(call: keras_internals.LayerCall) -> bool:
    """Tells whether a call in a model treats each feature of what it takes, the last axis, for itself."""
    (output,) = call.outputs if len(call.outputs) == 1 else (None,)
    shapes = [tuple(size or 2 for size in tensor.shape) for tensor in call.inputs]
    if (
        output is None
        or getattr(call.operation, "variables", None)
        or any(len(shape) < 2 for shape in shapes)
    ):
        return False
    if getattr(call.operation, "activity_regularizer", None) is not None:
        return False
    drawn = [_draw((1, *shape[1:]), len(shape) - 1) for shape in shapes]

    def run(values: list[Any]) -> Any:
        known = {
            id(tensor): tf.cast(v, t.dtype)
            for tensor, v, t in zip(call.inputs, values, call.inputs, strict=True)
        }
        call.run(known)
        return np.asarray(tf.cast(known[id(output)], "float32"))

    try:
        wanted = run([whole for whole, _ in drawn])
        made = [run([halves[part] for _, halves in drawn]) for part in (0, 1)]
    except (ValueError, TypeError, tf.errors.OpError):
        return False
    return wanted.ndim > 1 and _is_close(np.concatenate(made, -1), wanted)


def _draw(shape: tuple[int, ...], axis: int) -> tuple[Any, list[Any]]:
    """Returns a tensor, and its halves along an axis; one half may be longer."""
    # Large enough for limits to be felt.
    whole = (3 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    return whole, np.array_split(whole, 2, axis)


def _is_close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-3, atol=1e-5)
