"""A U-Net that outlines lesions in grey images: made-up ones, or a folder of images and masks.

    python -m tfdist.train --recipe=medical_unet --strategy=multiworker
    python -m tfdist.train --recipe=medical_unet --data_dir=scans --set image_size=256 --set width=32

1,000 images, four fifths of them to train on. No download. Two CPU cores, one process: 10 epochs in two and a half
minutes. IoU on the test images: at least 0.55, here 0.61.

`--data_dir` has `images/NAME.png` and for each a `masks/NAME.png` of its size, 0 where nothing is; both are brought to
`image_size`. The last fifth of the names is tested on: let the slices of one patient begin alike.

The loss is each image's own Dice and cross-entropy, averaged over the images: the answer is that of one device, however
the batch is divided. `keras.losses.Dice()` makes one number of all the batch's pixels, which no split over replicas
gives, and with `axis=(1, 2, 3)` has no gradient at an image without a lesion; here one pixel is added above and below.
IoU is counted over all test pixels, and so exact too. Plain Keras loads `model.keras` with `compile=False`: the loss is
not its own.

Source: Ronneberger et al. 2015; Milletari et al. 2016; both losses together: Isensee et al. 2021.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ConfigError
from tfdist.recipe import Recipe

from ._masked_images import find_masked_images, read_masked_images

CHANNELS_PER_GROUP = 8


@keras.saving.register_keras_serializable(package="tfdist_recipes")
def dice_loss(y_true: Any, y_pred: Any) -> Any:
    """Returns 1 - Dice of each image.

    Args:
        y_true: `[batch, height, width, 1]`, 0 or 1.
        y_pred: Of the same shape, 0 to 1.

    Returns:
        `[batch]`, from 0 (the same) to almost 1 (nothing in common).
    """
    y_true = keras.ops.cast(y_true, y_pred.dtype)
    axes = (1, 2, 3)
    common = keras.ops.sum(y_true * y_pred, axis=axes)
    both = keras.ops.sum(y_true, axis=axes) + keras.ops.sum(y_pred, axis=axes)
    # The 1: of an image without a lesion, every pixel that is taken for one still costs something.
    return 1 - (2 * common + 1) / (both + 1)


@keras.saving.register_keras_serializable(package="tfdist_recipes")
def dice_and_crossentropy(y_true: Any, y_pred: Any) -> Any:
    """Returns 1 - Dice of each image and its mean cross-entropy, `[batch]`; arguments as those of `dice_loss`.

    Dice alone has hardly a gradient left once nothing is taken for a lesion, and a run that gets there stays there.
    """
    y_true = keras.ops.cast(y_true, y_pred.dtype)
    crossentropy = keras.ops.mean(keras.ops.binary_crossentropy(y_true, y_pred), axis=(1, 2, 3))
    return dice_loss(y_true, y_pred) + crossentropy


def build_model(
    *, image_size: int = 64, width: int = 16, depth: int = 3, learning_rate: float = 1e-3
) -> keras.Model:
    """Builds the compiled network. Each image is normalised by itself, so that replicas change nothing.

    Args:
        image_size: Height and width in pixels; the data takes the same.
        width: Channels at full size, a multiple of 8; twice as many at half the size, and so on.
        depth: How often the size is halved; `image_size` must be a multiple of 2 to its power.
        learning_rate: Adam's rate.

    Returns:
        A model from images `[batch, image_size, image_size, 1]`, values 0 to 1, to each pixel's probability of a
        lesion, in the same shape.

    Raises:
        ConfigError: If the sizes do not fit each other.
    """
    if depth < 0 or image_size < 1 or image_size % 2**depth:
        raise ConfigError(
            f"image_size={image_size} with depth={depth}: give a multiple of {2 ** max(depth, 0)}."
        )
    if width < 1 or width % CHANNELS_PER_GROUP:
        raise ConfigError(f"width={width}: give a multiple of {CHANNELS_PER_GROUP}, such as 16.")
    layers = keras.layers
    image = keras.Input((image_size, image_size, 1), name="image")
    x = _convolve_twice(layers.Rescaling(2.0, offset=-1)(image), width)
    skipped = []
    for level in range(1, depth + 1):
        skipped.append(x)
        x = _convolve_twice(layers.AveragePooling2D(2)(x), width * 2**level)
    for level, skip in reversed(list(enumerate(skipped))):
        x = layers.Conv2DTranspose(width * 2**level, 2, strides=2)(x)
        x = _convolve_twice(layers.Concatenate()([skip, x]), width * 2**level)
    lesion = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32", name="lesion")(x)
    model = keras.Model(image, lesion, name="medical_unet")
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=dice_and_crossentropy,
        metrics=[keras.metrics.BinaryIoU(target_class_ids=[1], threshold=0.5, name="iou")],
    )
    return model


def build_data(
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int = 64,
    num_examples: int = 1_000,
    seed: int = 0,
) -> Any:
    """Gives one split of the images, four fifths of them to train on.

    Args:
        split: "train" or "test".
        data_dir: Folder of `images/*.png` and `masks/*.png`; None makes images up. `--data_dir` sets it.
        image_size: Height and width in pixels to which images are brought, or in which they are made up.
        num_examples: Of the images made up, both splits together.
        seed: Of the images made up.

    Returns:
        Examples of an image, `[image_size, image_size, 1]` float32, 0 to 1, and its mask, in the same shape, 0 or 1.

    Raises:
        ConfigError: If the split is unknown, there are too few images, or one does not fit its mask.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"There is no split {split!r}; choose train or test.")
    files = None if data_dir is None else find_masked_images(Path(data_dir))
    count = num_examples if files is None else len(files)
    if count < 5:
        raise ConfigError(f"{count} images: there must be at least 5, four to train on and one to test on.")
    at = count * 4 // 5
    part = slice(at) if split == "train" else slice(at, None)
    if files is None:
        images, masks = make_lesions(num_examples, image_size=image_size, seed=seed)
        return images[part], masks[part]
    return read_masked_images(files[part], image_size=image_size)


def make_lesions(
    num_examples: int, *, image_size: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Makes images up: an oval body of uneven grey with bright vessels, and in it no to three blurred, ragged lesions.

    Args:
        num_examples: How many.
        image_size: Height and width in pixels.
        seed: Of everything drawn.

    Returns:
        Images, 0 to 1, and masks, 0 or 1, both `[num_examples, image_size, image_size, 1]`.
    """
    axis = np.linspace(-1, 1, image_size, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"))
    pairs = [_make_lesion(grid, np.random.default_rng((seed, place))) for place in range(num_examples)]
    images, masks = zip(*pairs, strict=True)
    return np.stack(images)[..., np.newaxis], np.stack(masks)[..., np.newaxis]


def _make_lesion(
    grid: NDArray[np.float32], draws: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    radii = draws.uniform(0.7, 0.95, (2, 1, 1))
    body = ((grid / radii) ** 2).sum(axis=0) < 1
    grey = np.full(grid.shape[1:], draws.uniform(0.3, 0.5))
    for _ in range(4):  # slow waves
        wave = draws.normal(0, 3, (2, 1, 1))
        grey += 0.05 * np.sin((wave * grid).sum(axis=0) + draws.uniform(0, 2 * np.pi))
    for _ in range(3):  # vessels: as bright as lesions, but thin
        normal = draws.standard_normal((2, 1, 1))
        normal /= np.linalg.norm(normal)
        distance = (normal * grid).sum(axis=0) + 0.1 * np.sin(4 * grid[0]) - draws.uniform(-0.5, 0.5)
        grey += draws.uniform(0.1, 0.25) * np.exp(-((distance / 0.03) ** 2))
    mask = np.zeros(grey.shape, bool)
    for _ in range(draws.integers(4)):
        center = draws.uniform(-0.5, 0.5, (2, 1, 1))
        away = grid - center
        angle = np.arctan2(away[0], away[1])
        ragged = (
            1 + 0.2 * np.sin(3 * angle + draws.uniform(0, 7)) + 0.1 * np.sin(5 * angle + draws.uniform(0, 7))
        )
        inside = draws.uniform(0.1, 0.25) * ragged - np.sqrt((away**2).sum(axis=0))
        grey += draws.uniform(0.12, 0.25) / (1 + np.exp(-inside / 0.02))
        mask |= inside > 0
    image = np.where(body, grey, 0.05) + draws.normal(0, 0.06, grey.shape)
    return np.clip(image, 0, 1).astype(np.float32), (mask & body).astype(np.float32)


def _convolve_twice(x: Any, channels: int) -> Any:
    for _ in range(2):
        x = keras.layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = keras.layers.GroupNormalization(channels // CHANNELS_PER_GROUP)(x)
        x = keras.layers.Activation("silu")(x)
    return x


RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=16, epochs=10)
