"""From ids of any form to rows, or to bags: one row made of several, as `tf.nn.embedding_lookup_sparse` makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

LookUp = Callable[[tf.Tensor], tf.Tensor]


def ids_form(ids: Any) -> str:
    """Returns "dense", "ragged" or "sparse", of a tensor or a `keras.KerasTensor`."""
    if isinstance(ids, tf.SparseTensor) or getattr(ids, "sparse", False):
        return "sparse"
    return "ragged" if isinstance(ids, tf.RaggedTensor) or getattr(ids, "ragged", False) else "dense"


def embed(ids: Any, weights: Any, *, look_up: LookUp, combiner: str | None, skip_zero: bool) -> Any:
    """Looks ids up, and combines each bag's rows if there is a combiner.

    Args:
        ids: A tensor `[…, bag]`, a `tf.RaggedTensor`, or with a combiner a `tf.SparseTensor` `[batch, bag]`.
        weights: How much each id counts in its bag, in the same form, or None: 1.
        look_up: Ids `[n]` → rows `[n, features]`.
        combiner: None, "sum", "mean" (divided by the sum of weights) or "sqrtn" (by the root of the sum of squares).
        skip_zero: Whether id 0 counts for nothing in a bag.

    Returns:
        `[…, bag, features]`, or with a combiner `[…, features]`, with zeros for a bag in which nothing counts.
    """

    def by_bag(ids: Any, weights: Any, bags: Any, num_bags: Any) -> Any:
        rows = look_up(ids)
        counts = _counts(ids, weights, rows.dtype, skip_zero)
        return _combine(rows, counts, combiner, lambda x: tf.math.unsorted_segment_sum(x, bags, num_bags))

    def rows_of(ids: Any, weights: Any) -> Any:
        if isinstance(ids, tf.SparseTensor):
            rows = by_bag(ids.values, _part(weights, "values"), ids.indices[:, 0], ids.dense_shape[0])
            return tf.ensure_shape(rows, [ids.shape[0], *rows.shape[1:]])
        if not isinstance(ids, tf.RaggedTensor):
            flat = look_up(tf.reshape(ids, [-1]))
            rows = tf.reshape(flat, [*_sizes(ids), *flat.shape[1:]])
            if combiner is None:
                return rows
            counts = _counts(ids, weights, rows.dtype, skip_zero)
            bag_axis = ids.shape.rank - 1
            return _combine(rows, counts, combiner, lambda x: tf.reduce_sum(x, bag_axis))
        if combiner is None or ids.flat_values.shape.rank > 1:
            return ids.with_flat_values(rows_of(ids.flat_values, _part(weights, "flat_values")))
        if ids.ragged_rank > 1:
            return ids.with_values(rows_of(ids.values, _part(weights, "values")))
        return by_bag(ids.values, _part(weights, "values"), ids.value_rowids(), ids.nrows())

    return rows_of(ids, weights)


def _combine(rows: Any, counts: Any, combiner: str | None, add_up: Callable[[Any], Any]) -> Any:
    total = add_up(rows * counts[..., tf.newaxis])
    if combiner == "sum":
        return total
    size = add_up(counts) if combiner == "mean" else tf.sqrt(add_up(tf.square(counts)))
    return tf.math.divide_no_nan(total, size[..., tf.newaxis])


def _counts(ids: Any, weights: Any, dtype: Any, skip_zero: bool) -> Any:
    """Returns how much each id counts in its bag."""
    if weights is None:
        counts = tf.ones(tf.shape(ids), dtype)
    else:
        tf.debugging.assert_equal(tf.shape(weights), tf.shape(ids), "weights must be one number for each id")
        counts = tf.cast(weights, dtype)
    return counts * tf.cast(tf.not_equal(ids, 0), dtype) if skip_zero else counts


def _part(weights: Any, name: str) -> Any:
    return None if weights is None else getattr(weights, name)


def _sizes(tensor: Any) -> list[Any]:
    sizes = tf.shape(tensor)
    return [sizes[i] if size is None else size for i, size in enumerate(tensor.shape)]
