"""A small character transformer on the English text that Python itself carries: its language reference.

    python -m tfdist.train --recipe=text_lm --strategy=multiworker

400,000 characters of `pydoc_data.topics` to train on, the 40,000 after them to test on. No download.
Two CPU cores, one process: 5 epochs in three minutes. Accuracy on the next test character: at least 0.50, here 0.53; it
is still rising. `--mixed_precision=bfloat16` pays off where the hardware has it.
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
    num_layers: int = 4,
    width: int = 128,
    num_heads: int = 4,
    dropout: float = 0.05,
    learning_rate: float = 3e-3,
    sequence_length: int = 128,
    seed: int = 0,
) -> keras.Model:
    """Builds the compiled transformer: a small GPT.

    Blocks that normalise before each part, causal attention, learned positions, and one table that says both what a
    character is and how likely it comes next. Stock layers only, so that the saved file loads in plain Keras.

    Args:
        num_layers: Blocks of attention and a feed-forward part.
        width: Features per character; the feed-forward part has four times as many inside.
        num_heads: Attention heads; must divide `width`.
        dropout: Share dropped of what each part adds, and of the first block's input.
        learning_rate: AdamW's rate.
        sequence_length: Characters per example, of which each sees those before it; the data takes the same.
        seed: Of the dropout masks.

    Returns:
        A model from ids `[batch, sequence_length]` to the next character's logits
        `[batch, sequence_length, VOCABULARY_SIZE]`, in float32 whatever the rest computes in.

    Raises:
        ConfigError: If `num_heads` does not divide `width`.
    """
    if num_heads < 1 or width % num_heads:
        raise ConfigError(f"width={width} with num_heads={num_heads}: the heads must divide the width.")
    layers = keras.layers
    ids = keras.Input((sequence_length,), dtype="int32", name="ids")
    positions = keras.ops.cumsum(keras.ops.ones_like(ids), axis=1) - 1
    # Rows of length 1 give logits of a moderate size; as the input they are enlarged, so that characters stand well
    # apart from the start, and count for more than where they stand.
    spread = keras.initializers.RandomNormal(stddev=width**-0.5)
    characters = layers.ReversibleEmbedding(
        VOCABULARY_SIZE, width, embeddings_initializer=spread, reverse_dtype="float32", name="characters"
    )
    x = characters(ids) * width**0.5 + layers.Embedding(sequence_length, width)(positions)
    x = layers.Dropout(dropout, seed=seed)(x)
    # What every block adds is added up: the more there are, the less each adds at first (Radford et al. 2019).
    quiet = {"scale": 1 / (2 * num_layers), "mode": "fan_avg", "distribution": "uniform"}
    for layer in range(num_layers):
        normed = layers.LayerNormalization()(x)
        # Without biases: a key bias has no influence on the result, and Adam would turn the rounding noise of its
        # gradient into whole steps.
        attention = layers.MultiHeadAttention(num_heads, width // num_heads, use_bias=False)
        attended = attention(normed, normed, use_causal_mask=True)
        x = x + layers.Dropout(dropout, seed=seed + 2 * layer + 1)(attended)
        hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        hidden = layers.Dense(width, kernel_initializer=keras.initializers.VarianceScaling(**quiet))(hidden)
        x = x + layers.Dropout(dropout, seed=seed + 2 * layer + 2)(hidden)
    logits = characters(layers.LayerNormalization()(x), reverse=True)
    model = keras.Model(ids, logits, name="text_lm")
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def build_data(split: str, *, sequence_length: int = 128) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
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


RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=16, epochs=5)
