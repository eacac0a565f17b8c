"""Layers that lie in blocks in several processes: stock Keras layers, which say that they must.

    hidden = tfdist.layers.ColumnDense(4 * width, activation="gelu")(x)
    x = x + tfdist.layers.RowDense(width)(hidden)

Under `--tensor_parallel=2` each of two processes has half of the columns of the first kernel and half of the rows of
the second (Shoeybi et al. 2019, Megatron-LM). Stock layers are divided as well where they can be; one that is made here
is refused where it cannot. What is returned is the stock layer, so that a saved model loads in plain Keras, and one
device computes what it always would.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import keras

Kind = Literal["columns", "rows", "heads", "vocabulary"]
_marks: weakref.WeakKeyDictionary[keras.Layer, Kind] = weakref.WeakKeyDictionary()


def ColumnDense(units: int, **options: Any) -> keras.layers.Dense:  # noqa: N802
    """Returns a `keras.layers.Dense` that must be divided by its columns: each process has some of the units.

    What it makes stays divided: a `RowDense` takes it, or, as logits of a large vocabulary, the loss
    `SparseCategoricalCrossentropy(from_logits=True)`. Between them only what treats each unit for itself.

    Args:
        units: Of the whole.
        **options: As for `keras.layers.Dense`.

    Examples:
        >>> import tfdist.layers
        >>> tfdist.layers.ColumnDense(8, activation="relu").get_config()["units"]
        8
    """
    return _mark(keras.layers.Dense(units, **options), "columns")


def RowDense(units: int, **options: Any) -> keras.layers.Dense:  # noqa: N802
    """Returns a `keras.layers.Dense` that must be divided by its rows: each process takes some of the inputs.

    Args:
        units: Of the output, which every process has whole.
        **options: As for `keras.layers.Dense`.

    Examples:
        >>> import keras, tfdist.layers
        >>> x = keras.Input((4,))
        >>> hidden = tfdist.layers.ColumnDense(16, activation="relu")(x)
        >>> tfdist.layers.RowDense(4)(hidden).shape
        (None, 4)
    """
    return _mark(keras.layers.Dense(units, **options), "rows")


def MultiHeadAttention(num_heads: int, key_dim: int, **options: Any) -> keras.layers.MultiHeadAttention:  # noqa: N802
    """Returns a `keras.layers.MultiHeadAttention` that must be divided by its heads.

    Args:
        num_heads: Of the whole.
        key_dim: Of each head.
        **options: As for `keras.layers.MultiHeadAttention`.

    Examples:
        >>> import tfdist.layers
        >>> type(tfdist.layers.MultiHeadAttention(8, 64)).__module__.split(".")[0]
        'keras'
    """
    return _mark(keras.layers.MultiHeadAttention(num_heads, key_dim, **options), "heads")


def VocabularyEmbedding(input_dim: int, output_dim: int, **options: Any) -> keras.layers.ReversibleEmbedding:  # noqa: N802
    """Returns a `keras.layers.ReversibleEmbedding` that must be divided by its rows, the vocabulary.

    Called with `reverse=True` it makes the model's output: logits, of which each process has those of its own words.
    The loss must be `SparseCategoricalCrossentropy(from_logits=True)`, which then adds up over the processes without
    anybody having all of the logits.

    Args:
        input_dim: Words in the vocabulary.
        output_dim: Features of each.
        **options: As for `keras.layers.ReversibleEmbedding`.

    Examples:
        >>> import keras, tfdist.layers
        >>> table = tfdist.layers.VocabularyEmbedding(50_000, 8)
        >>> x = table(keras.Input((5,), dtype="int32"))
        >>> table(x, reverse=True).shape
        (None, 5, 50000)
    """
    return _mark(keras.layers.ReversibleEmbedding(input_dim, output_dim, **options), "vocabulary")


def wanted_kind(layer: keras.Layer) -> Kind | None:
    """Returns how a layer must be divided; None if nobody said so."""
    return _marks.get(layer)


def _mark(layer: Any, kind: Kind) -> Any:
    _marks[layer] = kind
    return layer
