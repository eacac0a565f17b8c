"""SciPy's sparse matrices as data: rows are made dense batch by batch, as all of them might not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.errors import ConfigError


def is_sparse(array: Any) -> bool:
    """Tells whether something is a matrix of SciPy's, which need not be installed."""
    return type(array).__module__.startswith("scipy.sparse") and hasattr(array, "tocsr")


class SparseRows:
    """Arrays and sparse matrices, read by number.

    Args:
        data: Nest of both, with examples along the first axis.

    Raises:
        ConfigError: If they differ in length.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        # Of SciPy's forms the one that gives rows.
        self._parts = [part.tocsr() if is_sparse(part) else part for part in tf.nest.flatten(data)]
        lengths = {part.shape[0] for part in self._parts}
        if len(lengths) > 1:
            raise ConfigError(
                f"arrays have first axes of {', '.join(map(str, sorted(lengths)))} examples; they must all be the same."
            )
        (self._length,) = lengths

    def __len__(self) -> int:
        return int(self._length)

    def __getitem__(self, place: int) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        """Returns several examples."""
        columns = [
            part[places].toarray() if is_sparse(part) else [part[place] for place in places]
            for part in self._parts
        ]
        return [tf.nest.pack_sequence_as(self._data, row) for row in zip(*columns, strict=True)]
