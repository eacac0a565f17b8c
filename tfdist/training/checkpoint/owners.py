"""Variables whose values are in other processes: the chief reads them there, block by block, when it saves."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np

from tfdist import keras_internals
from tfdist.data.order import part_slice
from tfdist.training.checkpoint.state import (
    Blocks,
    StateArray,
    blocks_of_large,
    runs_of,
    set_absent_arrays,
    state_array,
)

_END = "end"


class Holding(NamedTuple):
    """Who holds a variable's value.

    Attributes:
        ranks: One process, or those that hold a part each, in their order.
        axis: Along which it is divided.
    """

    ranks: Sequence[int]
    axis: int = 0


class Owners:
    """Who holds what of a model's state.

    Args:
        variables: All of the state's, in one order everywhere.
        holdings: Of those that not every process has whole, by their ids.
        rank: This process's; 0 is the chief.
        broadcast: `(content, source=rank) → that rank's content, on every process`.
        meet: Returns once every process has called it.
    """

    def __init__(
        self,
        variables: list[keras.Variable],
        holdings: Mapping[int, Holding],
        *,
        rank: int,
        broadcast: Callable[..., bytes],
        meet: Callable[[], None],
    ) -> None:
        self._variables = variables
        self._holdings = holdings
        self._rank = rank
        self._broadcast = broadcast
        self._meet = meet
        self._is_shared = False

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Lets the chief read inside what others hold, who wait meanwhile; every process enters it."""
        if self._rank != 0:
            self._serve()
            yield
        else:
            self._is_shared = True
            try:
                yield
            finally:
                self._is_shared = False
                self._ask(_END)
        self._meet()  # Nobody leaves while another still takes part in the last exchange.

    def blocks(self, variable: keras.Variable) -> Iterator[np.ndarray]:
        """Yields a variable in runs of rows, on the chief."""
        self._request("blocks", variable)
        yield from self._cross(variable)

    def is_finite(self, variable: keras.Variable) -> bool:
        """Tells whether a variable holds finite numbers alone, on the chief."""
        self._request("is_finite", variable)
        return self._ask_owners(variable)

    def _request(self, what: str, variable: keras.Variable) -> None:
        if not self._is_shared:
            raise RuntimeError(f"{variable.path} is another process's, and nobody hands it over now")
        place = next(i for i, known in enumerate(self._variables) if known is variable)
        self._ask(json.dumps([what, place]))

    def _ask(self, request: str) -> None:
        self._broadcast(request.encode(), source=0)

    def _serve(self) -> None:
        while (request := self._broadcast(b"", source=0).decode()) != _END:
            what, place = json.loads(request)
            variable = self._variables[place]
            if what == "is_finite":
                self._ask_owners(variable)
            else:
                for _ in self._cross(variable):
                    pass

    # What follows every process calls alike.

    def _ask_owners(self, variable: keras.Variable) -> bool:
        answers = []
        for rank in self._holdings[id(variable)].ranks:
            own = b"%d" % StateArray([variable]).is_finite if rank == self._rank else b""
            answers.append(self._broadcast(own, source=rank) == b"1")
        return all(answers)

    def _cross(self, variable: keras.Variable) -> Iterator[np.ndarray]:
        ranks, axis = self._holdings[id(variable)]
        whole, dtype = keras_internals.whole_shape(variable), StateArray([variable]).dtype
        shapes = [whole]
        if len(ranks) > 1:
            sizes = (part_slice(whole[axis], place, len(ranks)) for place in range(len(ranks)))
            shapes = [(*whole[:axis], high - low, *whole[axis + 1 :]) for low, high in sizes]
        if axis == 0:
            for rank, shape in zip(ranks, shapes, strict=True):
                for run in runs_of(shape, dtype):
                    yield self._send(variable, rank, shape, run=run)
            return
        for run in runs_of(whole, dtype):
            parts = [self._send(variable, *held, run=run) for held in zip(ranks, shapes, strict=True)]
            yield np.concatenate(parts, axis)

    def _send(
        self, variable: keras.Variable, rank: int, shape: tuple[int, ...], *, run: tuple[int, int]
    ) -> np.ndarray:
        """Returns a run of rows of what a process holds, on every process."""
        array = StateArray([variable])
        own = np.ascontiguousarray(array.rows(*run)).tobytes() if rank == self._rank else b""
        content = np.frombuffer(self._broadcast(own, source=rank), array.dtype)
        return content.reshape((run[1] - run[0], *shape[1:]) if shape else ())


class AbsentArray(StateArray):
    """One array of a model's state that other processes hold, whole or in parts, of which one may be this one's."""

    def __init__(self, variable: keras.Variable, owners: Owners) -> None:
        super().__init__([variable])
        self.shape = keras_internals.whole_shape(variable)
        self._owners = owners

    @property
    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite, found where the numbers are."""
        return self._owners.is_finite(self._variables[0])

    def read(self) -> np.ndarray:
        """Returns the whole array."""
        blocks = list(self.blocks())
        return np.concatenate(blocks) if self.shape else blocks[0]

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields runs of rows."""
        return self._owners.blocks(self._variables[0])

    def assign(self, values: np.ndarray | Blocks) -> None:
        """Assigns what this process has of it, if any."""
        part = keras_internals.own_part(self._variables[0])
        if part is None:
            return
        rows, others = slice(*part[0].indices(self.shape[0])), (slice(None), *part[1:])
        own = StateArray(self._variables, [rows], self.shape[0])
        if isinstance(values, np.ndarray):
            own.assign(values[others])
        else:
            own.assign_blocks(block[others] for block in values.blocks())


_of_model: weakref.WeakKeyDictionary[keras.Model, Owners] = weakref.WeakKeyDictionary()


def set_owners(model: keras.Model, owners: Owners) -> None:
    """Says who holds the variables that not every process has."""
    _of_model[model] = owners
    set_absent_arrays(model, lambda variable: AbsentArray(variable, owners))


def sharing_state(model: keras.Model) -> contextlib.AbstractContextManager[None]:
    """Lets the chief read all of a model's state inside, wherever it is; every process enters it."""
    owners = _of_model.get(model)
    return contextlib.nullcontext() if owners is None else owners.sharing()


def blocks_to_save(model: keras.Model) -> Callable[[keras.Variable], Iterator[np.ndarray] | None]:
    """Returns what gives a variable of a model in runs of rows, None where it is here and small."""

    def blocks(variable: keras.Variable) -> Iterator[np.ndarray] | None:
        array = state_array(model, variable)
        return array.blocks() if isinstance(array, AbsentArray) else blocks_of_large(variable)

    return blocks
