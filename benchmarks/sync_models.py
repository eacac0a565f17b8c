"""What the contenders of `sync.py` train: models, data and batches, the same for all; no framework is imported here."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

WARM_STEPS = 10  # after which losses are compared: rounding errors grow with every step of Adam
LEARNING_RATE = 1e-3
EPSILON = 1e-6  # of Adam; smaller ones make whole steps of rounding errors where gradients are almost 0


class Contest(NamedTuple):
    """A model's size.

    Attributes:
        shape: Of an example.
        global_batch: Examples of a step, over two workers; more workers take as much each.
        num_steps: That are timed.
    """

    shape: tuple[int, ...]
    global_batch: int
    num_steps: int


CONTESTS = {
    "cnn": Contest((28, 28, 1), 256, 60),
    "resnet": Contest((32, 32, 3), 64, 30),
    "mlp": Contest((1024,), 128, 30),
}
MLP_WIDTH, MLP_LAYERS = 3328, 3  # 25 M weights


def pin(rank: int) -> None:
    """Keeps this process to one core, by its rank; to be called before a framework is imported."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ |= {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "2"}


def build_data(contest: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and classes; the batches are taken in this order."""
    shape, batch, num_steps = CONTESTS[contest]
    rng = np.random.default_rng(0)
    count = batch * max(num_steps, WARM_STEPS)
    y = rng.integers(0, 10, count)
    means = rng.normal(size=(10, *shape)).astype(np.float32)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    return x + 0.5 * means[y], y
