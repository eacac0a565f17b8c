"""Keras variables: their TensorFlow ones, their values that come later, and parts of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.saving import saving_lib

from tfdist.keras_internals.attributes import holding


def native(variable: keras.Variable) -> Any:
    """Returns the TensorFlow variable behind a Keras variable, free of casts and scopes.

    Leans on `Variable._value`.
    """
    return variable._value


@contextlib.contextmanager
def saving_in_blocks(blocks_of: Callable[[keras.Variable], Iterator[Any] | None]) -> Iterator[None]:
    """Within it `Model.save` holds a block of a variable at a time; Keras gathers the whole model if it may fit.

    Leans on `saving_lib._MEMORY_UPPER_BOUND` (the share of the free memory that a model may take), on
    `H5IOStore.__setitem__` and what it makes a group with, and on numbers as keys in `Optimizer.save_own_variables`.

    Args:
        blocks_of: Returns a large variable's runs of rows, in order; None for a small one.
    """
    set_item = saving_lib.H5IOStore.__setitem__

    def set_in_blocks(store: Any, key: str, value: Any) -> None:
        blocks = blocks_of(value) if isinstance(value, keras.Variable) else None
        if blocks is None:
            set_item(store, key, value)
            return
        if not store._h5_entry_initialized:
            store._create_h5_group(store._h5_entry_path)
        dataset = store._h5_entry_group.create_dataset(key, whole_shape(value), value.dtype)
        if not value.shape:
            (dataset[()],) = blocks
            return
        start = 0
        for block in blocks:
            dataset[start : start + len(block)] = block
            start += len(block)

    def save_own_variables(optimizer: keras.optimizers.Optimizer, store: Any) -> None:
        for place, variable in enumerate(optimizer.variables):
            store[str(place)] = variable if blocks_of(variable) is not None else variable.numpy()

    with (
        holding(saving_lib, _MEMORY_UPPER_BOUND=0),
        holding(saving_lib.H5IOStore, __setitem__=set_in_blocks),
        holding(keras.optimizers.Optimizer, save_own_variables=save_own_variables),
    ):
        yield


@contextlib.contextmanager
def deferring_variables() -> Iterator[list[tuple[keras.Variable, keras.Variable]]]:
    """Lets variables that have an initializer be made without memory: `materialize` gives them their first value.

    It is the one that they would have had, since every initializer has a seed of its own. An optimizer's slots need not
    lie beside a weight, which has no place yet.

    Leans on `Variable._initialize_with_initializer`, `._deferred_initialize`, `._initializer` and `._value`, and on
    what `TFOptimizer` asks of a weight when it is built: `_var_key`, `add_variable_from_reference`.

    Yields:
        The optimizers' slots that are made while it is in force, each with its weight.
    """
    slots: list[tuple[keras.Variable, keras.Variable]] = []
    create = {
        "_initialize_with_initializer": _keep_initializer,
        "_deferred_initialize": lambda variable: None,
    }
    add = {"_var_key": _key_of_any(TFOptimizer._var_key), "add_variable_from_reference": _add_slot(slots)}
    with holding(keras.Variable, **create), holding(TFOptimizer, **add):
        yield slots


def _keep_initializer(variable: keras.Variable, initializer: Callable[..., Any]) -> None:
    variable._value = None
    variable._initializer = initializer
    variable._was_deferred = True


def _key_of_any(var_key: Callable[..., Any]) -> Callable[..., Any]:
    def key_of(optimizer: keras.optimizers.Optimizer, variable: Any) -> Any:
        is_absent = isinstance(variable, keras.Variable) and variable._value is None
        return id(variable) if is_absent else var_key(optimizer, variable)

    return key_of


def _add_slot(slots: list[tuple[keras.Variable, keras.Variable]]) -> Callable[..., Any]:
    def add(optimizer: Any, reference_variable: Any, *args: Any, **kwargs: Any) -> Any:
        slot = super(TFOptimizer, optimizer).add_variable_from_reference(reference_variable, *args, **kwargs)
        slots.append((slot, reference_variable))
        return slot

    return add


def was_deferred(variable: keras.Variable) -> bool:
    """Tells whether a variable was made within `deferring_variables`."""
    return getattr(variable, "_was_deferred", False)


def has_memory(variable: keras.Variable) -> bool:
    """Tells whether a variable has its value here, or a part of it. Leans on `Variable._value`."""
    return variable._value is not None


def own_part(variable: keras.Variable) -> tuple[slice, ...] | None:
    """Returns what of a variable's value is here, as `materialize` was told; None: all, or nothing."""
    return getattr(variable, "_own_part", None)


def whole_shape(variable: keras.Variable) -> tuple[int, ...]:
    """Returns the shape of all of a variable's value, of which a part may be here."""
    return getattr(variable, "_whole_shape", tuple(variable.shape))


def is_whole(variable: keras.Variable) -> bool:
    """Tells whether all of a variable's value is here."""
    return has_memory(variable) and own_part(variable) is None


def count_parameters(model: keras.Model) -> int:
    """Returns the numbers in a built model's weights, wherever they are."""
    return sum(math.prod(whole_shape(weight)) for weight in model.weights)


def materialize(
    variable: keras.Variable,
    part: tuple[slice, ...] | None = None,
    *,
    beside: keras.Variable | None = None,
) -> None:
    """Gives a variable that was made within `deferring_variables` its first value; one that has it keeps it.

    Leans on `Variable._deferred_initialize`, `._initializer` and `._shape`.

    Args:
        variable: It.
        part: What of its value is to be here, with a slice for each of its first axes; its `shape` is that part's from
            now on.
        beside: The weight for which an optimizer keeps it, if it was made in the shape of the weight's part.
    """
    if variable._value is not None:
        return
    if part is not None:
        whole, shape = variable._initializer, tuple(variable.shape)
        variable._initializer = lambda own_shape, dtype: whole(shape, dtype=dtype)[part]
        variable._own_part, variable._whole_shape = part, shape
        cuts = (len(range(size)[cut]) for size, cut in zip(shape, part, strict=False))
        variable._shape = (*cuts, *shape[len(part) :])
    elif beside is not None and own_part(beside) is not None and variable.shape == beside.shape:
        variable._own_part, variable._whole_shape = own_part(beside), whole_shape(beside)
    variable._deferred_initialize()


class _Refusing:
    """An initializer that computes nothing but what is built, or traced to see shapes."""

    def __init__(self, initializer: Callable[..., Any], why: str) -> None:
        self._initializer = initializer
        self._why = why

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if keras.Variable._initialize_with_initializer is not _keep_initializer:
            raise RuntimeError(self._why)
        return self._initializer(*args, **kwargs)


def refuse_reading(variable: keras.Variable, why: str) -> None:
    """Lets whoever reads a variable that has no value be told so; Keras would make up its first value.

    Leans on `Variable._initializer`.
    """
    if not isinstance(variable._initializer, _Refusing):
        variable._initializer = _Refusing(variable._initializer, why)


@contextlib.contextmanager
def loading_present() -> Iterator[None]:
    """Lets each variable keep what it has of what is assigned to it, as when a whole model's file is read.

    Leans on `Variable._value`, and on Keras assigning by `Variable.assign`.
    """
    assign = keras.Variable.assign

    def assign_if_present(variable: keras.Variable, value: Any) -> Any:
        if variable._value is not None:
            assign(variable, value if own_part(variable) is None else value[own_part(variable)])
        return value

    with holding(keras.Variable, assign=assign_if_present):
        yield
