"""Variables whose values are in other processes: the chief reads them there, block by block, when it saves."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from tfdist import keras_internals
from tfdist.training.checkpoint.state import StateArray, blocks_of_large, set_absent_arrays, state_array

_END = "end"


class Owners:
    """Who holds what of a model's state.

    Args:
        variables: All of the state's, in one order everywhere.
        ranks: Of those that not every process has, by their ids: whose value is read.
        rank: This process's; 0 is the chief.
        broadcast: `(content, source=rank) → that rank's content, on every process`.
        meet: Returns once every process has called it.
    """

    def __init__(
        self,
        variables: list[keras.Variable],
        ranks: Mapping[int, int],
        *,
        rank: int,
        broadcast: Callable[..., bytes],
        meet: Callable[[], None],
    ) -> None:
        self._variables = variables
        self._ranks = ranks
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
        """Yields another process's variable in runs of rows, on the chief."""
        source = self._request("blocks", variable)
        array = StateArray([variable])
        for shape in array.block_shapes():
            content = self._broadcast(b"", source=source)
            yield np.frombuffer(content, array.dtype).reshape(shape)

    def is_finite(self, variable: keras.Variable) -> bool:
        """Tells whether another process's variable holds finite numbers alone, on the chief."""
        source = self._request("is_finite", variable)
        return self._broadcast(b"", source=source) == b"1"

    def _request(self, what: str, variable: keras.Variable) -> int:
        if not self._is_shared:
            raise RuntimeError(f"{variable.path} is another stage's, and nobody hands it over now")
        place = next(i for i, known in enumerate(self._variables) if known is variable)
        self._ask(json.dumps([what, place]))
        return self._ranks[id(variable)]

    def _ask(self, request: str) -> None:
        self._broadcast(request.encode(), source=0)

    def _serve(self) -> None:
        while (request := self._broadcast(b"", source=0).decode()) != _END:
            what, place = json.loads(request)
            variable = self._variables[place]
            source, array = self._ranks[id(variable)], StateArray([variable])
            is_own = source == self._rank
            if what == "is_finite":
                self._broadcast(b"%d" % array.is_finite if is_own else b"", source=source)
                continue
            blocks = array.blocks() if is_own else iter(())
            for _ in array.block_shapes():
                self._broadcast(
                    np.ascontiguousarray(next(blocks)).tobytes() if is_own else b"", source=source
                )


class AbsentArray(StateArray):
    """One array of a model's state that another process holds."""

    def __init__(self, variable: keras.Variable, owners: Owners) -> None:
        super().__init__([variable])
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

    def assign(self, values: Any) -> None:
        """Does nothing: its owner assigns it."""


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
        if keras_internals.has_memory(variable):
            return blocks_of_large(variable)
        return state_array(model, variable).blocks()

    return blocks
