"""Grey images with a mask each, as two folders of PNG files: what segmentation is trained on."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf

from tfdist.data.sources.indexed import IndexedSource, build_indexed
from tfdist.errors import ConfigError

_NUM_PARALLEL_READS = 4
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def find_masked_images(folder: Path) -> list[tuple[str, str]]:
    """Finds images and their masks.

    Args:
        folder: With `images/*.png` and `masks/*.png`.

    Returns:
        The paths of each image and its mask, in the order of their names.

    Raises:
        ConfigError: If a mask is missing, a file is no PNG, or an image and its mask differ in size.
    """
    pairs = []
    for image in sorted((folder / "images").glob("*.png")):
        mask = folder / "masks" / image.name
        if not mask.is_file():
            raise ConfigError(f"{image} has no mask; put one into {mask}, 0 where nothing is.")
        sizes = [_read_size(path) for path in (image, mask)]
        if sizes[0] != sizes[1]:
            (width, height), (mask_width, mask_height) = sizes
            raise ConfigError(
                f"{image} is {width}×{height} and its mask {mask_width}×{mask_height}; they must be of one size."
            )
        pairs.append((str(image), str(mask)))
    if not pairs:
        raise ConfigError(
            f"data_dir={str(folder)!r} holds no images/*.png; put them there, and their masks/*.png."
        )
    return pairs


def read_masked_images(files: Sequence[tuple[str, str]], *, image_size: int) -> IndexedSource:
    """Reads images and masks when they are asked for.

    Args:
        files: Paths of an image and its mask, PNG of 8 or 16 bits; colours become grey.
        image_size: Height and width in pixels to which both are brought.

    Returns:
        Examples of an image, `[image_size, image_size, 1]` float32, 0 to 1, and its mask, in the same shape, 0 or 1.
    """
    spec = tf.TensorSpec([image_size, image_size, 1], tf.float32)

    def read_batch(image_files: tf.Tensor, mask_files: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.map_fn(
            lambda pair: _read_pair(*pair, image_size=image_size),
            (image_files, mask_files),
            fn_output_signature=(spec, spec),
        )

    source = build_indexed(_Pairs(files))
    return dataclasses.replace(source, map_batch=read_batch, num_parallel_reads=_NUM_PARALLEL_READS)


def _read_pair(
    image_file: tf.Tensor, mask_file: tf.Tensor, *, image_size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    # 16 bits hold both kinds; in 8, a mask of ones in 16 bits would be empty.
    image, mask = (
        tf.cast(tf.io.decode_png(tf.io.read_file(file), channels=1, dtype=tf.uint16), tf.float32)
        for file in (image_file, mask_file)
    )
    size = [image_size, image_size]
    image = tf.image.resize(image / (2**16 - 1), size, antialias=True)
    return image, tf.image.resize(tf.cast(mask > 0, tf.float32), size, method="nearest")


class _Pairs:
    """Paths, by number."""

    def __init__(self, files: Sequence[tuple[str, str]]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: int) -> tuple[str, str]:
        return self._files[place]


def _read_size(path: Path) -> tuple[int, int]:
    """Reads width and height, which stand in a PNG's first 24 bytes."""
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or not head.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ConfigError(f"{path} is no PNG, whatever its name; convert it.")
    return struct.unpack(">II", head[16:])
