"""A model's state as named arrays that do not know how a cluster holds it: a table is one, however many its shards."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.layers import Embedding
from tfdist.layers.partition import rows_inside

# Of so many bytes at a time a state is read, written and assigned if it is too large to be copied.
BLOCK_BYTES = 1 << 25


class Blocks(Protocol):
    """An array that is too large to be held, in runs of its rows."""

    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type, the same in every block."""

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields runs of rows, in order."""


class StateArray:
    """One array of a model's state, in a variable or in the shards of a table.

    Args:
        variables: Keras variables.
        rows: Which rows of the array each of them holds; None: the one variable holds all.
        num_rows: Of the array, if it is in shards.
    """

    def __init__(self, variables: list[Any], rows: list[slice] | None = None, num_rows: int = 0) -> None:
        self._variables = variables
        self._rows = rows
        own = tuple(variables[0].shape)
        self.shape: tuple[int, ...] = own if rows is None else (num_rows, *own[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """As it is kept: NumPy's files know no bfloat16, and float32 holds each of its values."""
        name = keras.backend.standardize_dtype(self._variables[0].dtype)
        return np.dtype("float32" if name == "bfloat16" else name)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite, found where the numbers are."""
        for variable in self._variables:
            copy = _copies(variable)[0]
            if copy.dtype.is_floating:
                with tf.device(copy.device):
                    if not tf.reduce_all(tf.math.is_finite(copy)):
                        return False
        return True

    def read(self) -> np.ndarray:
        """Returns the whole array as it is now, whatever is written afterwards; not to be written to.

        A single variable is not copied: TensorFlow never writes to memory that somebody else holds, and copies it at
        the next update instead.
        """
        if self._rows is None:
            return np.asarray(_value(self._variables[0])).astype(self.dtype, copy=False)
        whole = np.empty(self.shape, self.dtype)
        for variable, rows in zip(self._variables, self._rows, strict=True):
            whole[rows] = np.asarray(_value(variable))
        return whole

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields runs of rows, in order, each of which was read from where it is."""
        for start, stop in runs_of(self.shape, self.dtype):
            yield self.rows(start, stop)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns a run of rows; of a scalar the one that it is."""
        if not self.shape:
            return self.read()
        block = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for variable, inside, first, count in self._places(start, stop):
            copy = _copies(variable)[0]
            with tf.device(copy.device):
                block[inside] = tf.gather(copy, tf.range(first, first + count)).numpy()
        return block

    def assign(self, values: np.ndarray | Blocks) -> None:
        """Assigns the whole array, which has the same shape."""
        if not isinstance(values, np.ndarray):
            self.assign_blocks(values.blocks())
            return
        for variable, rows in zip(self._variables, self._rows or [slice(None)], strict=True):
            variable.assign(values[rows] if self._rows else values)

    def assign_blocks(self, blocks: Iterable[np.ndarray]) -> None:
        """Assigns the whole array, of which runs of rows come in order."""
        start = 0
        for block in blocks:
            if not self.shape:
                self._variables[0].assign(block)
                continue
            for variable, inside, first, count in self._places(start, start + len(block)):
                for copy in _copies(variable):
                    with tf.device(copy.device):
                        copy[first : first + count].assign(tf.cast(block[inside], copy.dtype))
            start += len(block)

    def _places(self, start: int, stop: int) -> Iterator[tuple[Any, slice, int, int]]:
        """Yields of a run of rows: a variable, which of the run it holds, the first as it counts, and how many."""
        for variable, rows in zip(self._variables, self._rows or [slice(0, self.shape[0], 1)], strict=True):
            inside = rows_inside(rows, start, stop)
            if inside is not None:
                first = (start + inside.start - rows.start) // rows.step
                yield variable, inside, first, len(range(inside.start, inside.stop, inside.step))


def runs_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[tuple[int, int]]:
    """Yields where the runs of an array's rows start and stop; a scalar is one row."""
    num_rows = shape[0] if shape else 1
    size = max(1, BLOCK_BYTES * num_rows // max(1, int(np.prod(shape)) * dtype.itemsize))
    for start in range(0, num_rows, size):
        yield start, min(start + size, num_rows)


def blocks_of_large(variable: Any) -> Iterator[np.ndarray] | None:
    """Returns a variable's runs of rows, or None if it is one block or NumPy does not know its type."""
    array = StateArray([variable])
    is_large = array.num_bytes > BLOCK_BYTES and array.dtype == variable.dtype
    return array.blocks() if is_large else None


# By the model: what stands for the variables whose value is not here, or not all of it.
_absent_arrays: weakref.WeakKeyDictionary[keras.Model, Callable[[Any], StateArray]] = (
    weakref.WeakKeyDictionary()
)


def set_absent_arrays(model: keras.Model, make: Callable[[Any], StateArray]) -> None:
    """Says what stands for a variable of a model whose value is not in this process, or not all of it."""
    _absent_arrays[model] = make


def state_array(model: keras.Model, variable: keras.Variable) -> StateArray:
    """Returns what holds a variable of a model, here or elsewhere."""
    return StateArray([variable]) if keras_internals.is_whole(variable) else _absent_arrays[model](variable)


def named_state(model: keras.Model, *, with_optimizers: bool = True) -> dict[str, StateArray]:
    """Returns a built model's weights, optimizer slots, counters and seed generators.

    Names hold place and path: paths alone need not be unique. The shards of a table are one array, and so are the slots
    of these shards.
    """
    optimizers = keras_internals.find_optimizers(model) if with_optimizers else []
    metrics = {id(v) for v in model.metrics_variables}
    kept = [v for v in keras_internals.all_variables(model, optimizers) if id(v) not in metrics]
    tables = keras_internals.find_layers(model, Embedding)
    sharded = [table for table in tables if table.built and len(table.shards) > 1]
    groups: dict[Any, list[Any]] = {}
    for variable in kept:
        groups.setdefault(_group(variable, sharded), []).append(variable)
    found = {}
    for place, (key, variables) in enumerate(groups.items()):
        table = key[0] if isinstance(key, tuple) else None
        if table is None:
            array = state_array(model, variables[0])
        else:
            array = StateArray(variables, table.rows_of_shards(), table.input_dim)
        found[f"{place:05d} {_plain_path(variables[0].path)}"] = array
    return found


def _group(variable: Any, tables: list[Embedding]) -> Any:
    """Returns what is equal for the variables that make one array."""
    for table in tables:
        for shard in table.shards:
            if variable is shard:
                return table, ""
            # Keras's name of a slot: "adagrad/table_embeddings_0_accumulator".
            of_optimizer, _, slot = variable.path.rpartition(f"/{shard.path.replace('/', '_')}_")
            if of_optimizer and variable.shape == shard.shape:
                return table, f"{of_optimizer} {slot}"
    return id(variable)


def _plain_path(path: str) -> str:
    # Without the numbers by which Keras tells the `dense_1` of a process's second model from that of its first; in a
    # slot they stand in the middle: "adam/sequential_1_dense_1_kernel_momentum". A shard's number goes as well.
    return re.sub(r"_[0-9]+(?=[_/]|$)", "", path)


def _value(variable: Any) -> tf.Tensor:
    """Returns what a Keras variable holds, as a tensor that shares its memory where it is this process's."""
    return keras_internals.native(variable).read_value()


def _copies(variable: Any) -> tuple[Any, ...]:
    """Returns TensorFlow's variables behind a Keras variable: this process's replicas' own, or the one."""
    native = keras_internals.native(variable)
    return tuple(getattr(native, "values", (native,)))
