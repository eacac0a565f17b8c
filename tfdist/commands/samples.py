"""Some test images, with what a model makes of them, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfdist.api.run import Run
from tfdist.config.run_dir import open_atomically
from tfdist.data.sources.source import Source

# Looked at, and shown of those that were right and wrong each.
_NUM_LOOKED_AT, _NUM_SHOWN = 256, 12


def predict_samples(run: Run, model: keras.Model, test: Source) -> dict[str, np.ndarray] | None:
    """Predicts the first test images; every process must call it.

    Returns:
        `images` `[n, height, width, channels]`, `labels` `[n]` and `predicted` `[n]`, the wrong ones first; None if the
        examples are no images with a class each.
    """
    inputs, labels, _ = keras.utils.unpack_x_y_sample_weight(test.sample_batch(_NUM_LOOKED_AT))
    if not _are_images(inputs) or labels is None or not hasattr(labels, "numpy"):
        return None
    images, classes = inputs.numpy(), np.squeeze(labels.numpy())
    outputs = run.predict(model, images, batch_size=_NUM_LOOKED_AT)
    if not isinstance(outputs, np.ndarray) or outputs.ndim != 2 or outputs.shape[1] < 2 or classes.ndim != 1:
        return None
    predicted = outputs.argmax(axis=1)
    is_wrong = predicted != classes
    places = np.concatenate([np.flatnonzero(chosen)[:_NUM_SHOWN] for chosen in (is_wrong, ~is_wrong)])
    return {"images": images[places], "labels": classes[places], "predicted": predicted[places]}


def write_samples(path: Path, samples: Mapping[str, Any]) -> None:
    """Writes what `predict_samples` returned; the whole file or none."""
    with open_atomically(path) as file:
        np.savez_compressed(file, **samples)


def _are_images(inputs: Any) -> bool:
    shape: Any = getattr(inputs, "shape", ())
    return len(shape) == 4 and shape[-1] in (1, 3) and min(shape[1:3]) > 1 and hasattr(inputs, "numpy")
