"""What callbacks remember from one epoch to the next, so that a resumed run's go on as if it had never stopped."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

# What Keras's own remember: History, EarlyStopping, ReduceLROnPlateau, ModelCheckpoint. A callback of one's own lists
# the attributes in `state_names`; they must be what JSON can hold, or lists of arrays.
_STATE_NAMES = (
    "history", "epoch", "best", "best_weights", "wait", "best_epoch", "stopped_epoch", "cooldown_counter",
)  # fmt: skip


def take_callbacks(
    callbacks: keras.callbacks.CallbackList,
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Returns callbacks' state: what JSON can hold, by class and place among those of the class; and arrays by name."""
    states: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    for key, callback in _by_class(callbacks):
        own = states[key] = {}
        for name in getattr(callback, "state_names", _STATE_NAMES):
            value = vars(callback).get(name)
            if _is_arrays(value):
                arrays |= {f"{key} {name} {place:05d}": array for place, array in enumerate(value)}
            elif name in vars(callback):
                own[name] = _plain(value)
    return states, arrays


def restore_callbacks(
    callbacks: keras.callbacks.CallbackList,
    states: Mapping[str, Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Gives callbacks back what `take_callbacks` took of the same classes in the same order.

    After `on_train_begin`, which would reset it.
    """
    for key, callback in _by_class(callbacks):
        for name, value in states.get(key, {}).items():
            setattr(callback, name, value)
        for name in getattr(callback, "state_names", _STATE_NAMES):
            found = [arrays[each] for each in sorted(arrays) if each.startswith(f"{key} {name} ")]
            if found:
                setattr(callback, name, found)


def _by_class(callbacks: keras.callbacks.CallbackList) -> Iterator[tuple[str, Any]]:
    # Workers leave the chief's writers out of their lists: a place in the whole list would not be the same everywhere.
    seen: collections.Counter[str] = collections.Counter()
    for callback in callbacks.callbacks:
        name = type(callback).__name__
        yield f"{name} {seen[name]}", callback
        seen[name] += 1


def _is_arrays(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, np.ndarray) for item in value)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # A metric of several numbers (`F1Score`) logs an array.
    return value.tolist() if hasattr(value, "tolist") else value
