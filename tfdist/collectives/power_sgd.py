"""Gradients as products of two thin matrices: fewer bytes, and what is lost comes with the next step.

Source: Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.collectives.communicator import join, split


class PowerSgd:
    """One step of power iteration for each matrix, begun where the last one ended; vectors cross as they are.

    Args:
        shapes: Of each gradient that there may be. A kernel of a convolution is a matrix `[all but the last, last]`.
        rank: Columns of the factors.
    """

    def __init__(self, shapes: Sequence[tf.TensorShape], rank: int) -> None:
        self._sides = [_sides(shape, rank) for shape in shapes]
        self._rank = rank
        rng = np.random.default_rng(0)  # the same on every worker
        self._starts = [
            rng.normal(size=(sides[1], rank)).astype(np.float32) if sides else None for sides in self._sides
        ]
        self._bases: list[Any] = [
            None if s is None else tf.Variable(s, trainable=False) for s in self._starts
        ]
        self._memories: list[Any] = [
            None if sides is None else tf.Variable(tf.zeros(sides), trainable=False) for sides in self._sides
        ]

    def sum(
        self, tensors: Sequence[Any], places: Sequence[int], carry: Callable[[Any], Any]
    ) -> tuple[list[Any], Any]:
        """Returns about the sums over the workers, and the exact sum of the last tensor.

        Args:
            tensors: Gradients, and behind them a float32 scalar.
            places: Which of the shapes each gradient has.
            carry: Returns the sum of a flat tensor over the workers.
        """
        matrices: dict[int, Any] = {}
        for tensor, place in zip(tensors, places, strict=False):
            if (sides := self._sides[place]) is not None:
                matrices[place] = tf.reshape(tensor, sides) + self._memories[place]
        plain = [t for t, place in zip(tensors, places, strict=False) if self._sides[place] is None]
        plain.append(tensors[-1])
        projected = {place: tf.matmul(m, self._bases[place]) for place, m in matrices.items()}
        first = _sum_together([*projected.values(), *plain], carry)
        plain_sums = iter(first[len(projected) :])
        orthogonal = {place: tf.linalg.qr(value)[0] for place, value in zip(projected, first, strict=False)}
        own = {place: tf.matmul(m, orthogonal[place], transpose_a=True) for place, m in matrices.items()}
        rights = dict(zip(own, _sum_together(list(own.values()), carry), strict=True))
        sums = []
        for tensor, place in zip(tensors, places, strict=False):
            if place not in matrices:
                sums.append(next(plain_sums))
                continue
            basis = orthogonal[place]
            self._memories[place].assign(matrices[place] - tf.matmul(basis, own[place], transpose_b=True))
            self._bases[place].assign(rights[place])
            sums.append(tf.reshape(tf.matmul(basis, rights[place], transpose_b=True), tensor.shape))
        return sums, next(plain_sums)

    def forget(self) -> None:
        """Begins anew."""
        for memory, basis, start in zip(self._memories, self._bases, self._starts, strict=True):
            if memory is not None:
                memory.assign(tf.zeros_like(memory))
                basis.assign(start)


def _sides(shape: tf.TensorShape, rank: int) -> tuple[int, int] | None:
    """Returns a matrix's two sides; None for what two factors would not make smaller."""
    if shape.rank < 2:
        return None
    columns = int(shape[-1])
    rows = shape.num_elements() // columns
    return (rows, columns) if rank * (rows + columns) < rows * columns else None


def _sum_together(tensors: Sequence[Any], carry: Callable[[Any], Any]) -> list[Any]:
    """Returns the sums of several tensors, by one exchange."""
    return split(carry(join(tensors)), tensors) if tensors else []
