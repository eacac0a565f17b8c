"""A small character transformer on the English text that Python itself carries: its language reference.

    python -m tfdist.train --recipe=text_lm --strategy=multiworker

400,000 characters of `pydoc_data.topics` to train on, the 40,000 after them to test on. No download.
Two CPU cores: 4 epochs in a minute as one process, in two as a cluster. Accuracy on the next test character: at least
0.52, mostly 0.55; under `ps`, whose workers do not wait for each other, at least 0.50.
"""

from __future__ import annotations

import functools
import string

import keras
import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ConfigError
from tfdist.recipe import Recipe

# Fixed, not read off the text: another Python version has other topics, and must give the same model. Id 0 is any
# character outside.
ALPHABET = "\n" + string.digits + string.ascii_letters + string.punctuation + " "
VOCABULARY_SIZE = len(ALPHABET) + 1
NUM_CHARACTERS = {
    "train": 400_000,
    "test": 40_000,
}  # of the 459,000 (Python 3.10) to 511,000 (3.13) there are


def build_model(
    *,
    num_layers: int = 2,
    width: int = 64,
    num_heads: int = 4,
    dropout: float = 0.05,
    learning_rate: float = 4e-3,
    sequence_length: int = 64,
    seed: int = 0,
) -> keras.Model:
    """Builds the compiled transformer: causal, normalised before each part, learned positions.

    Stock layers only, so that the saved file loads in plain Keras.

    Args:
        num_layers: Attention and feed-forward pairs.
        width: Features per character; the feed-forward part has four times as many inside.
        num_heads: Attention heads; must divide `width`.
        dropout: Share dropped after each part.
        learning_rate: Adam's rate.
        sequence_length: Characters per example; the data takes the same.
        seed: Of the dropout masks.

    Returns:
        A model from ids `[batch, sequence_length]` to the next character's logits
        `[batch, sequence_length, VOCABULARY_SIZE]`.

    Raises:
        ConfigError: If `num_heads` does not divide `width`.
    """
    if width % num_heads:
        raise ConfigError(f"width={width} with num_heads={num_heads}: the heads must divide the width.")
    layers = keras.layers
    ids = keras.Input((sequence_length,), dtype="int32", name="ids")
    positions = keras.ops.cumsum(keras.ops.ones_like(ids), axis=1) - 1
    # Characters stand well apart from the start, and count for more than where they stand: it learns twice as fast.
    spread = keras.initializers.RandomNormal(stddev=0.5)
    x = layers.Embedding(VOCABULARY_SIZE, width, embeddings_initializer=spread)(ids)
    x = x + layers.Embedding(sequence_length, width)(positions)
    for layer in range(num_layers):
        normed = layers.LayerNormalization()(x)
        # Without biases: a key bias has no influence on the result, and Adam would turn the rounding noise of its
        # gradient into whole steps.
        attention = layers.MultiHeadAttention(num_heads, width // num_heads, use_bias=False)
        attended = attention(normed, normed, use_causal_mask=True)
        x = x + layers.Dropout(dropout, seed=seed + 2 * layer)(attended)
        hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(dropout, seed=seed + 2 * layer + 1)(layers.Dense(width)(hidden))
    logits = layers.Dense(VOCABULARY_SIZE, name="logits")(layers.LayerNormalization()(x))
    model = keras.Model(ids, logits, name="text_lm")
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def build_data(split: str, *, sequence_length: int = 64) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cuts one part of the text into windows that do not overlap, in their order.

    Args:
        split: "train" or "test".
        sequence_length: Characters per example.

    Returns:
        Ids `[examples, sequence_length]`, and of each character the id of the next one, in the same shape.

    Raises:
        ConfigError: If the split is unknown, or no window fits.
    """
    if split not in NUM_CHARACTERS:
        raise ConfigError(f"There is no split {split!r}; choose one of {', '.join(NUM_CHARACTERS)}.")
    if not 1 <= sequence_length < NUM_CHARACTERS[split]:
        raise ConfigError(
            f"sequence_length={sequence_length}: it must be at least 1 and less than {NUM_CHARACTERS[split]}."
        )
    start = 0 if split == "train" else NUM_CHARACTERS["train"]
    ids = _encode_text()[start : start + NUM_CHARACTERS[split]]
    num_windows = (len(ids) - 1) // sequence_length  # the last window too needs the character that follows it
    end = num_windows * sequence_length
    return ids[:end].reshape(-1, sequence_length), ids[1 : end + 1].reshape(-1, sequence_length)


@functools.cache
def _encode_text() -> NDArray[np.int32]:
    # Here, not at the top: a megabyte of text that only this function needs.
    from pydoc_data.topics import topics

    text = "\n".join(topics[topic] for topic in sorted(topics))
    wanted = sum(NUM_CHARACTERS.values())
    if len(text) < wanted:
        raise ConfigError(
            f"This Python's pydoc_data.topics has {len(text)} characters; text_lm needs {wanted}."
        )
    table = np.zeros(0x110000, np.int32)
    table[[ord(character) for character in ALPHABET]] = np.arange(1, VOCABULARY_SIZE, dtype=np.int32)
    return table[np.frombuffer(text[:wanted].encode("utf-32-le"), np.uint32)]


RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=32, epochs=4)
