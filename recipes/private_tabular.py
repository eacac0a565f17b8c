"""Breast cancer from 30 measurements, with differential privacy: what the model learns of one patient is bounded.

    python -m tfdist.train --recipe=private_tabular --dp_target_epsilon=3
    python -m tfdist.train --recipe=private_tabular --strategy=multiworker --num_workers=2 --dp_target_epsilon=1

569 patients' measurements from scikit-learn, four fifths to train on. No download. Without `--dp_target_epsilon` or
`--dp_noise_multiplier` it is trained without privacy. Measurements are scaled by the ranges that the data's
documentation states: a mean of these patients would tell of them, too.
Two CPU cores: 40 epochs in 8 seconds as one process. Test accuracy, mean of 5 divisions (lowest): 0.919 (0.895) at
ε = 1, 0.944 (0.912) at 3, 0.949 (0.930) at 8, and 0.949 (0.939) without privacy; ε with δ = 0.0012.
"""

from __future__ import annotations

import re

import keras
import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ConfigError
from tfdist.recipe import Recipe

NUM_MEASUREMENTS = 30
# "radius (mean):                        6.981  28.11"
_RANGE = re.compile(r"^.+\((?:mean|standard error|worst)\): +([0-9.]+) +([0-9.]+)$", re.MULTILINE)


def build_model(*, hidden: int = 16, learning_rate: float = 0.15) -> keras.Model:
    """Builds the compiled network.

    Args:
        hidden: Width of the one hidden layer. Noise is added to each weight: more of them are more noise.
        learning_rate: Of SGD with momentum.

    Returns:
        A model from `[batch, 30]` to one logit each, `[batch, 1]`.
    """
    model = keras.Sequential(
        [
            keras.Input((NUM_MEASUREMENTS,)),
            keras.layers.Dense(hidden, activation="tanh"),  # bounded, as gradients shall be
            keras.layers.Dense(1),
        ],
        name="private_tabular",
    )
    model.compile(
        optimizer=keras.optimizers.SGD(learning_rate, momentum=0.9),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.BinaryAccuracy("accuracy", threshold=0.0),
            keras.metrics.AUC(from_logits=True, name="auc"),
        ],
    )
    return model


def build_data(split: str, *, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gives one split of the patients: 80% to train on, 20% to test on.

    Args:
        split: "train" or "test".
        seed: Of the order in which they are divided.

    Returns:
        The measurements, `[patients, 30]`, from -1 to 1 in the documented ranges; and the labels `[patients, 1]`, 1 for
        a benign tumour.

    Raises:
        ConfigError: If the split is unknown.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"There is no split {split!r}; choose train or test.")
    # Here, so that listing recipes does not import scikit-learn.
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    low, high = np.array(_RANGE.findall(data.DESCR), float).T
    x = (2 * (data.data - low) / (high - low) - 1).astype(np.float32)
    y = data.target[:, None].astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(x))
    num_train = int(0.8 * len(x))
    chosen = order[:num_train] if split == "train" else order[num_train:]
    return x[chosen], y[chosen]


RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=128, epochs=40)
