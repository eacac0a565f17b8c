"""A small convolutional network on 1,797 real handwritten digits; the default recipe.

    python -m tfdist.train --recipe=digits_cnn --strategy=ps

Scikit-learn's digits, 8×8 grey values, through a TFDS builder: 1,437 to train on, 360 to test on. No download.
Two CPU cores, one process: 15 epochs in about 6 seconds. Test accuracy: at least 0.97, usually 0.99.
"""

from __future__ import annotations

from typing import Any

import keras

from tfdist.data import tfds_split
from tfdist.recipe import Recipe


def build_model(*, filters: int = 24, learning_rate: float = 2e-3, dropout: float = 0.4) -> keras.Model:
    """Builds the compiled network.

    Smooth activations and average pooling: with ReLU and max pooling rounding decides which side of a kink a value is
    on, and two runs that should agree drift apart. Each example is normalised by itself: the statistics of a batch
    would depend on how it is divided among replicas.

    Args:
        filters: Channels of the first two convolutions; the third has twice as many.
        learning_rate: Adam's rate at the start; it halves every 200 steps.
        dropout: Share of the features dropped before the last layer.

    Returns:
        A model from uint8 images `[batch, 8, 8, 1]`, values 0..16, to logits `[batch, 10]`.
    """
    layers = keras.layers
    images = keras.Input((8, 8, 1), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 8, offset=-1)(images)
    x = _convolve(x, filters)
    x = _convolve(x, filters)
    x = layers.AveragePooling2D(2)(x)
    x = _convolve(x, 2 * filters)
    x = layers.Flatten()(x)
    x = layers.Dropout(dropout)(x)
    model = keras.Model(images, layers.Dense(10, name="logits")(x), name="digits_cnn")
    schedule = keras.optimizers.schedules.ExponentialDecay(learning_rate, decay_steps=200, decay_rate=0.5)
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def build_data(split: str) -> Any:
    """Gives the digits.

    Args:
        split: "train" or "test".

    Returns:
        Examples of an image, `[8, 8, 1]` uint8, and its label, int64.
    """
    return tfds_split("digits", split)


def _convolve(x: Any, filters: int) -> Any:
    x = keras.layers.Conv2D(filters, 3, padding="same")(x)
    x = keras.layers.LayerNormalization()(x)
    return keras.layers.Activation("gelu")(x)


RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=64, epochs=15)
