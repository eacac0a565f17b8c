"""Models whose layers can be divided in blocks, run as `cases.py` runs its own, by Python.

`block_cases.py OUT.npz STRATEGY [REPLICAS]`. Sizes that two does not divide: blocks differ.
"""

from __future__ import annotations

import sys
from typing import Any

import cases
import keras
import numpy as np
from cases import COUNT, IDS, Case

import tfdist.layers
from tfdist.optimizers import LazyAdam

layers, optimizers, ops = keras.layers, keras.optimizers, keras.ops
rng = np.random.default_rng(1)
WORDS = 11
TEXT = rng.integers(0, WORDS, (COUNT, 5))
NEXT = rng.integers(0, WORDS, (COUNT, 5))
SIGNALS = rng.normal(size=(COUNT, 5, 6)).astype(np.float32)
WEIGHTS = rng.uniform(0.5, 2, (COUNT, 5)).astype(np.float32)


def language(*, ignored: int | None = None, dropout: float = 0.0, metric: bool = True) -> keras.Model:
    """Returns a language model with all that can be divided, by names that ask for it."""
    ids = keras.Input((5,), dtype="int32")
    table = tfdist.layers.VocabularyEmbedding(WORDS, 6)
    x = table(ids) * 6**0.5
    attend = tfdist.layers.MultiHeadAttention(3, 4, dropout=dropout, seed=7, kernel_regularizer="l2")
    normed = layers.LayerNormalization()(x)
    x = x + attend(normed, normed, use_causal_mask=True)
    normed = layers.LayerNormalization()(x)
    gate = tfdist.layers.ColumnDense(13, activation="silu", kernel_regularizer=keras.regularizers.L1(1e-3))(
        normed
    )
    hidden = gate * tfdist.layers.ColumnDense(13)(normed)
    hidden = layers.Dropout(dropout, seed=8)(hidden)
    x = x + tfdist.layers.RowDense(6)(hidden)
    model = keras.Model(ids, table(layers.LayerNormalization()(x), reverse=True))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=ignored)
    optimizer = optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.3)
    model.compile(optimizer, loss, metrics=["accuracy"] if metric else None)
    return model


def stock() -> keras.Model:
    """Returns a model of stock layers, whose logits a `Dense` makes, with attention to another input."""
    signals, ids = keras.Input((5, 6)), keras.Input((5,), dtype="int32")
    x = layers.Dense(8, activation="tanh")(signals)
    x = layers.MultiHeadAttention(2, 4, value_dim=3)(x, layers.Embedding(20, 8, mask_zero=True)(ids))
    x = layers.Dense(9, activation="gelu")(layers.LayerNormalization()(x))
    x = layers.Dense(7, activation="tanh", bias_regularizer="l2")(layers.Activation("tanh")(x))
    model = keras.Model([signals, ids], layers.Dense(WORDS, kernel_constraint="non_neg")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # An epsilon above the rounding errors of gradients, which Adam would enlarge.
    model.compile(optimizers.AdamW(1e-2, epsilon=1e-3, weight_decay=0.1), loss, weighted_metrics=["accuracy"])
    return model


def averaged(kind: Any = optimizers.Adam, **options: Any) -> keras.Model:
    """Returns a model of one pair, whose optimizer may keep averages and sums, and a table that is long enough."""
    ids = keras.Input((5,), dtype="int32")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(30_001, 9)(ids))
    x = layers.Dense(3)(layers.Dense(5, activation="tanh")(x))
    model = keras.Model(ids, x)
    model.compile(kind(1e-2, epsilon=1e-3, **options), "mse", metrics=["mae"])
    return model


CASES = {
    "language": Case(language, (TEXT, NEXT)),
    "ignored": Case(lambda: language(ignored=2), (TEXT, NEXT)),
    "weights": Case(lambda: language(metric=False), (TEXT, NEXT[..., None], WEIGHTS)),
    "dropout": Case(lambda: language(dropout=0.3), (TEXT, NEXT)),
    "stock": Case(stock, ((SIGNALS, IDS), NEXT)),
    "averaged": Case(
        lambda: averaged(use_ema=True, ema_overwrite_frequency=2, gradient_accumulation_steps=2),
        (1500 * IDS, SIGNALS[:, 0, :3]),
    ),
    # Moves the rows that a batch asks for, and those alone.
    "rows": Case(lambda: averaged(LazyAdam), (1500 * IDS, SIGNALS[:, 0, :3])),
}


if __name__ == "__main__":
    cases.main(*sys.argv[1:], cases=CASES)
