"""scikit-learn's 1,797 handwritten digits as a TFDS dataset: real images without a download."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

_NUM_TEST = 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """`image` `[8, 8, 1]` uint8, values 0..16, and `label` 0..9; 1,437 for training, 360 for testing."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "A stratified split with a fixed seed."}
    pkg_dir_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 43 people (Alpaydin and Kaynak 1998), as scikit-learn ships them.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        # Here: scikit-learn takes a second to import, and is needed only once.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = digits.images.astype(np.uint8)[..., None]
        rows = np.arange(len(images))
        train, test = train_test_split(rows, test_size=_NUM_TEST, random_state=0, stratify=digits.target)
        return {
            name: self._generate_examples(images, digits.target, sorted(part))
            for name, part in (("train", train), ("test", test))
        }

    def _generate_examples(self, images: Any, labels: Any, rows: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows:
            yield int(row), {"image": images[row], "label": int(labels[row])}
