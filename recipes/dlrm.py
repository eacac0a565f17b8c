"""DLRM on a click log of Criteo's form, 13 columns of numbers and 26 of ids: one made up, or the real one.

    python -m tfdist.train --recipe=dlrm --strategy=ps
    python -m tfdist.train --recipe=dlrm --data_dir=criteo --set num_rows=1000000

500,000 examples, of which one in thirteen is a click, four fifths to train on; their ids follow a power law, as many in
each column as Criteo's, up to `num_rows`. No download. `--data_dir` is a folder of Criteo's own `train.txt` or
`day_0`, `day_1`, ….
Two CPU cores: one epoch in half a minute as one process, in a minute as a cluster; a second one would only learn the
examples by heartbeat. Test AUC: at least 0.84, mostly 0.855, where who knows the law reaches 0.89; at least 0.75 with
`--set num_examples=100000`.

Clicks are rare: `--set imbalance=class_weight` lets clicks and the others count alike, `--set imbalance=resample` keeps
only as many of the others as there are clicks. Either lifts the predicted probabilities. The test AUC stays what it is
with weights (250,000 examples: 0.831 for 0.830), and falls with so many examples gone (0.765), for a sixth of the time.

Source: Naumov et al. 2019.
"""

from __future__ import annotations

from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from tfdist.data import build_source
from tfdist.errors import ConfigError
from tfdist.layers import Embedding
from tfdist.optimizers import LazyAdam
from tfdist.recipe import Recipe

from ._clicks import make_clicks
from ._criteo import NUM_IDS, NUM_NUMBERS, read_criteo

Imbalance = Literal["none", "class_weight", "resample"]

NUM_ROWS = 1_000
# How many ids each column of the challenge's train.txt has.
NUM_VALUES = (1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194) + (
    (27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572)
)
NUM_COUNTED = 10_000  # first examples of a stream, in which clicks are counted


def build_model(
    *,
    num_rows: int = NUM_ROWS,
    width: int = 8,
    bottom: tuple[int, ...] = (32,),
    top: tuple[int, ...] = (32,),
    learning_rate: float = 5e-3,
) -> keras.Model:
    """Builds the compiled network: embeddings, and the numbers as one vector more; what counts is how pairs match.

    Args:
        num_rows: Rows of the table for each column of ids; the data takes the same.
        width: Features of each id's embedding.
        bottom: Widths of the layers through which the numbers go first.
        top: Widths of the layers behind the matches.
        learning_rate: Of `LazyAdam`, which touches only the table's rows that a step needs.

    Returns:
        A model from `{"numbers": [batch, 13], "ids": [batch, 26]}` to one logit each, `[batch, 1]`.
    """
    layers = keras.layers
    numbers = keras.Input((NUM_NUMBERS,), name="numbers")
    ids = keras.Input((NUM_IDS,), dtype="int32", name="ids")

    # Counts, a few of which are huge, and -1 or -2 for what has none.
    dense = keras.ops.log1p(keras.ops.maximum(numbers, 0.0))
    for units in (*bottom, width):
        dense = layers.Dense(units, activation="gelu")(dense)

    # One table for all columns: one lookup a step, and equal shards.
    spread = keras.initializers.RandomNormal(stddev=0.05)
    rows = Embedding(NUM_IDS * num_rows, width, embeddings_initializer=spread, name="ids_table")(ids)
    vectors = layers.Concatenate(axis=1)([layers.Reshape((1, width))(dense), rows])
    matches = layers.Flatten()(layers.Dot(axes=2)([vectors, vectors]))
    num_vectors = NUM_IDS + 1
    pairs = [i * num_vectors + j for i in range(num_vectors) for j in range(i)]
    hidden = layers.Concatenate()([dense, keras.ops.take(matches, pairs, axis=1)])
    for units in top:
        hidden = layers.Dense(units, activation="gelu")(hidden)
    logit = layers.Dense(1, name="logit")(hidden)

    model = keras.Model({"numbers": numbers, "ids": ids}, logit, name="dlrm")
    model.compile(
        optimizer=LazyAdam(learning_rate),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.AUC(from_logits=True, name="auc")],
    )
    return model


def build_data(
    split: str,
    *,
    data_dir: str | None = None,
    imbalance: Imbalance = "none",
    num_rows: int = NUM_ROWS,
    num_examples: int = 500_000,
    seed: int = 0,
) -> Any:
    """Gives one split of the log: four fifths of the one made up to train on, of a real one what `read_criteo` says.

    Args:
        split: "train" or "test".
        data_dir: Folder of Criteo's files; None makes a log up. `--data_dir` sets it.
        imbalance: What is done about clicks being rare, in training alone: nothing; examples weighted so that both
            classes count alike, and one on average; or of the others only as many as there are clicks, drawn once
            and the same in every epoch.
        num_rows: Ids of each column.
        num_examples: Of the log made up, both splits together.
        seed: Of the log made up, and of the draw.

    Returns:
        Examples of `{"numbers": [13] float32, "ids": [26] int32}`, the ids counted through over all columns, and the
        label, `[1]`, 0 or 1.

    Raises:
        ConfigError: If the split is unknown, there are too few examples, or one class has none.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"There is no split {split!r}; choose train or test.")
    if data_dir is not None:
        examples: Any = read_criteo(data_dir, split, num_rows=num_rows)
    else:
        examples = _make_log(split, num_examples, num_rows, seed)
    if split == "test" or imbalance == "none":
        return examples
    share = _click_share(examples)
    if imbalance == "class_weight":
        return build_source(examples, class_weight={0: 0.5 / (1 - share), 1: 0.5 / share})
    return _resample(examples, keep=share / (1 - share), seed=seed)


def _make_log(split: str, num_examples: int, num_rows: int, seed: int) -> Any:
    if num_examples < 5:
        raise ConfigError(
            f"num_examples={num_examples}: it must be at least 5, four to train on and one to test on."
        )
    num_values = [min(num, num_rows) for num in NUM_VALUES]
    numbers, ids, _, labels = make_clicks(
        num_examples, num_numbers=NUM_NUMBERS, num_values=num_values, intercept=-4.0, seed=seed
    )
    counts = np.floor(np.exp(numbers + 1.5))  # whole numbers, as the real ones
    ids += num_rows * np.arange(NUM_IDS, dtype=np.int32)
    at = num_examples * 4 // 5
    part = slice(at) if split == "train" else slice(at, None)
    return {"numbers": counts[part], "ids": ids[part]}, labels[part]


def _click_share(examples: Any) -> float:
    if isinstance(examples, tf.data.Dataset):
        examples = next(iter(examples.take(NUM_COUNTED).batch(NUM_COUNTED)))
    share = float(np.mean(examples[1]))
    if not 0 < share < 1:
        raise ConfigError(
            f"a share of {share:.0%} of clicks cannot be balanced: pass examples of both classes, or imbalance=none."
        )
    return share


def _resample(examples: Any, *, keep: float, seed: int) -> Any:
    """Keeps every click, and each other example with a probability: rejection sampling."""
    if not isinstance(examples, tf.data.Dataset):
        inputs, labels = examples
        kept = (labels[:, 0] > 0) | (np.random.default_rng(seed).random(len(labels)) < keep)
        return {name: column[kept] for name, column in inputs.items()}, labels[kept]

    def is_kept(place: tf.Tensor, example: Any) -> tf.Tensor:
        # By the example's place: a stream that goes on after a restart keeps what it would have kept.
        chance = tf.random.stateless_uniform([], seed=tf.stack([tf.cast(seed, tf.int64), place]))
        return tf.logical_or(example[1][0] > 0, chance < keep)

    return examples.enumerate().filter(is_kept).map(lambda _, example: example)


RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=512, epochs=1)
