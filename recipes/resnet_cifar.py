"""A residual network, ResNet-20 to -110, on images of CIFAR-10's form: made up, or the real ones.

    python -m tfdist.train --recipe=resnet_cifar --strategy=multiworker
    python -m tfdist.train --recipe=resnet_cifar --set depth=56 --data_dir=tensorflow_datasets --epochs=160 \
        --optimizer=momentum --learning_rate=0.1 --schedule=step --warmup_steps=400 --weight_decay=1e-4

5,000 images, four fifths of them to train on. No download. Two CPU cores, one process: 5 epochs in two minutes. Test
accuracy: at least 0.70, here 0.785, where guessing gives 0.10.

`--set normalization=` says what is normalised by what:

- `group` (the default): groups of 8 channels of each image by themselves. Exact: no example sees another one, so that
  the weights are those of one device, whatever the strategy and the number of replicas.
- `sync_batch`: each channel over the whole global batch, by an exchange in each of the layers at every step: exact too
  under `mirrored` and `multiworker`. Under `ps`, whose workers share no step, it is `batch`, and
  refused with `--ps_mode=sync`.
- `batch`: each channel over the replica's own part of the batch, as the paper's own training on two GPUs did: no
  exchange, and another result with another number of replicas. The moving statistics are averaged each epoch.

Source: He et al. 2016, sections 3.3 and 4.2 (shortcuts that change the shape are 1×1 convolutions, its option B);
groups: Wu and He 2018.
"""

from __future__ import annotations

from typing import Any, Literal

import keras
import numpy as np
from numpy.typing import NDArray

from tfdist.data import tfds_split
from tfdist.errors import ConfigError
from tfdist.recipe import Recipe

Normalization = Literal["group", "sync_batch", "batch"]

SIZE, NUM_CLASSES = 32, 10  # of CIFAR-10
CHANNELS_PER_GROUP = 8
MAX_SHIFT = 4 / SIZE  # as by 4 zeros on each side, and a crop
# Images made up: patterns of PATTERN × PATTERN cells of CELL pixels, on a ground of coarser cells.
PATTERN, CELL, GROUND_CELL = 4, 3, 4


def build_model(
    *,
    depth: int = 20,
    width: int = 16,
    normalization: Normalization = "group",
    augment: bool = True,
    learning_rate: float = 3e-3,
) -> keras.Model:
    """Builds the compiled network.

    Shifts and flips are layers: what they draw is part of the model's state, so that a resumed run draws on as if
    nothing had happened, and each replica draws its own.

    Args:
        depth: Layers with weights, 6n + 2: 20, 32, 44, 56, 110.
        width: Channels of the first third; the others have twice and four times as many.
        normalization: What is normalised by what; see above.
        augment: Whether training images are shifted by up to 4 pixels each way and half of them mirrored.
        learning_rate: Adam's rate.

    Returns:
        A model from uint8 images `[batch, 32, 32, 3]` to logits `[batch, 10]`.

    Raises:
        ConfigError: If there is no network of that depth, or `group` finds no groups in that width.
    """
    num_blocks, rest = divmod(depth - 2, 6)
    if num_blocks < 1 or rest:
        raise ConfigError(f"depth={depth}: it must be 6n + 2, such as 8, 20, 32, 44, 56 or 110.")
    if width < 1 or (normalization == "group" and width % CHANNELS_PER_GROUP):
        raise ConfigError(
            f"width={width} with normalization={normalization}: give a multiple of 8, such as 16."
        )
    layers = keras.layers
    images = keras.Input((SIZE, SIZE, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1)(images)
    if augment:
        # By whole pixels, since the nearest one is taken.
        x = layers.RandomTranslation(MAX_SHIFT, MAX_SHIFT, fill_mode="constant", interpolation="nearest")(x)
        x = layers.RandomFlip("horizontal")(x)
    x = _convolve(x, width, normalization)
    for stage in range(3):
        for block in range(num_blocks):
            strides = 2 if stage and not block else 1
            x = _add_block(x, width * 2**stage, normalization, strides)
    x = layers.GlobalAveragePooling2D()(x)
    # Logits in float32 whatever the rest computes in: their differences are what the loss is made of.
    model = keras.Model(
        images, layers.Dense(NUM_CLASSES, dtype="float32", name="logits")(x), name=f"resnet_{depth}"
    )
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def build_data(split: str, *, data_dir: str | None = None, num_examples: int = 5_000, seed: int = 0) -> Any:
    """Gives one split of the images: four fifths of those made up to train on, or CIFAR-10's own splits.

    Args:
        split: "train" or "test".
        data_dir: Folder of TFDS datasets, where cifar10 is or shall be prepared; None makes images up. `--data_dir`
            sets it.
        num_examples: Of the images made up, both splits together.
        seed: Of the images made up.

    Returns:
        Examples of an image, `[32, 32, 3]` uint8, and its label, 0 to 9.

    Raises:
        ConfigError: If the split is unknown, or there are too few examples.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"There is no split {split!r}; choose train or test.")
    if data_dir is not None:
        return tfds_split("cifar10", split, data_dir=data_dir)
    if num_examples < 5:
        raise ConfigError(
            f"num_examples={num_examples}: it must be at least 5, four to train on and one to test on."
        )
    images, labels = make_images(num_examples, seed=seed)
    at = num_examples * 4 // 5
    part = slice(at) if split == "train" else slice(at, None)
    return images[part], labels[part]


def make_images(num_examples: int, *, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Makes images up: each class has a coloured pattern, which lies anywhere, mirrored or not, on a motley ground.

    Args:
        num_examples: How many.
        seed: Of everything drawn.

    Returns:
        Images `[num_examples, 32, 32, 3]`, and the classes of their patterns, `[num_examples]`.
    """
    truth, draws = np.random.default_rng(seed).spawn(2)
    patterns = _enlarge(truth.standard_normal((NUM_CLASSES, PATTERN, PATTERN, 3)), CELL)
    labels = draws.integers(NUM_CLASSES, size=num_examples)
    grid = SIZE // GROUND_CELL
    images = _enlarge(draws.standard_normal((num_examples, grid, grid, 3), np.float32), GROUND_CELL)
    images *= 0.5
    images += 0.3 * draws.standard_normal(images.shape, np.float32)
    extent = PATTERN * CELL
    places = draws.integers(SIZE - extent + 1, size=(num_examples, 2))
    gains = draws.uniform(0.8, 1.6, num_examples)
    directions = draws.choice([-1, 1], num_examples)
    for image, label, (top, left), gain, direction in zip(
        images, labels, places, gains, directions, strict=True
    ):
        image[top : top + extent, left : left + extent] += gain * patterns[label, :, ::direction]
    return np.clip(128 + 40 * images, 0, 255).astype(np.uint8), labels


def _enlarge(cells: NDArray[Any], factor: int) -> NDArray[Any]:
    return cells.repeat(factor, axis=1).repeat(factor, axis=2)


def _add_block(x: Any, channels: int, normalization: Normalization, strides: int) -> Any:
    inner = _convolve(x, channels, normalization, strides)
    inner = _convolve(inner, channels, normalization, activation="linear")
    if strides > 1 or x.shape[-1] != channels:
        x = _convolve(x, channels, normalization, strides, kernel_size=1, activation="linear")
    return keras.layers.Activation("relu")(keras.layers.Add()([inner, x]))


def _convolve(
    x: Any,
    channels: int,
    normalization: Normalization,
    strides: int = 1,
    *,
    kernel_size: int = 3,
    activation: str = "relu",
) -> Any:
    layers = keras.layers
    x = layers.Conv2D(
        channels,
        kernel_size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )(x)
    if normalization == "group":
        x = layers.GroupNormalization(channels // CHANNELS_PER_GROUP)(x)
    else:
        x = layers.BatchNormalization(synchronized=normalization == "sync_batch")(x)
    return layers.Activation(activation)(x)


RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=64, epochs=5)
