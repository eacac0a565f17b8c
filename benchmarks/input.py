"""What input costs: seeking, reading shuffled batches, and what of it a training run feels.

    python benchmarks/input.py [--rounds=5] [--write=docs/benchmarks.md]

Every round times each contender once, in turn, the order reversed every other time; figures are ratios of medians with
the spread of the rounds, since machines are shared and noisy.
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from figures import divide, parse_options, render_spread, show, take_turns

import tfdist
from recipes import digits_cnn
from tfdist.data import build_source
from tfdist.data.batches import local_batches
from tfdist.data.segment import Segment
from tfdist.training.plan import BatchPlan

BATCH = 64
# A call of a function costs more than a batch: several are read in one.
READ_CALLS, READS_PER_CALL = 100, 20
# Enough that opening an epoch, which is measured by itself, is no part of it.
TRAIN_STEPS = 600


class Rows:
    """The arrays' examples one by one, as a PyTorch dataset gives them."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        return tuple(array[place] for array in self._arrays)


class Numbers:
    """Ten million examples that take no room."""

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, place: int) -> np.int64:
        return np.int64(place)


def open_epoch(source: Any, *, first_step: int = 0, num_steps: int | None = None) -> Segment:
    """Returns the shuffled batches of a process that is alone."""
    plan = BatchPlan(global_batch_size=BATCH, shuffle=True, first_step=first_step, num_steps=num_steps)
    return local_batches(build_source(source), plan.share(1, [0]))[0]


def time_seek(source: Any) -> float:
    """Returns seconds to the first batch of an epoch's second half."""
    half = len(Numbers()) // BATCH // 2
    start = time.perf_counter()
    next(open_epoch(source, first_step=half, num_steps=half + 10).open())
    return time.perf_counter() - start


def time_reading(dataset: tf.data.Dataset) -> float:
    """Returns examples per second over many batches, the first call's left out."""

    @tf.function(autograph=False)
    def read(iterator: Any) -> Any:
        batches: list[Any] = []
        for _ in range(READS_PER_CALL):
            with tf.control_dependencies(tf.nest.flatten(batches[-1:])):
                batches.append(next(iterator))
        return batches[-1]

    iterator = iter(dataset)
    read(iterator)
    start = time.perf_counter()
    for _ in range(READ_CALLS):
        read(iterator)
    return READ_CALLS * READS_PER_CALL * BATCH / (time.perf_counter() - start)


def compare_training(data: tuple[np.ndarray, np.ndarray], rounds: int) -> dict[str, list[float]]:
    """Returns examples per second of `fit` on one batch again and again, and on all the data."""
    run = tfdist.initialize(strategy="one_device")
    batch = tuple(array[:BATCH] for array in data)
    sources = {
        "synthetic": lambda context: tf.data.Dataset.from_tensors(batch).repeat(),
        "real": build_source(data),
    }
    contenders = {}
    for name, source in sources.items():
        model = digits_cnn.build_model()
        options = {"batch_size": BATCH, "steps_per_epoch": TRAIN_STEPS, "verbose": 0}

        def train(model: Any = model, source: Any = source, options: Any = options) -> float:
            start = time.perf_counter()
            run.fit(model, source, **options)
            return TRAIN_STEPS * BATCH / (time.perf_counter() - start)

        train()
        contenders[name] = train
    return take_turns(contenders, rounds)


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    options = parse_options(str(__doc__), rounds=5)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (1_000_000, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(0, 10, len(images))
    whole = build_source((images, labels))
    rows = []
    numbers = {"arrays": build_source(np.arange(len(Numbers()))), "an object": build_source(Numbers())}
    for name, source in numbers.items():
        seeks = [time_seek(source) for _ in range(options.rounds)]
        rows.append(
            (f"seek to the middle of 10,000,000 examples, {name}, s", render_spread(seeks, 3), "≤ 0.1")
        )
    plain = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(10_000).batch(BATCH).prefetch(-1)
    indexed = build_source(Rows(images, labels))
    datasets = {
        "`tf.data` shuffle + batch": plain,
        "addressed arrays": open_epoch(whole).build(),
        "a Python object, one example at a time": open_epoch(indexed).build(),
    }
    read = take_turns(
        {name: lambda d=d: time_reading(d) for name, d in datasets.items()},  # type: ignore[misc]
        options.rounds,
    )
    rows += [(f"{name}, examples/s", render_spread(figures, 0), "") for name, figures in read.items()]
    base, arrays, one_by_one = read
    rows.append((f"{arrays} ÷ shuffle + batch", f"{divide(read[arrays], read[base]):.2f}", "≥ 1.0"))
    rows.append((f"{one_by_one} ÷ shuffle + batch", f"{divide(read[one_by_one], read[base]):.2f}", ""))
    trained = compare_training((images, labels), options.rounds)
    ratio = divide(trained["synthetic"], trained["real"])
    rows.append(("synthetic ÷ real input, digits_cnn on 1,000,000 examples", f"{ratio:.3f}", "≤ 1.03"))
    rows.append(("… examples/s", "; ".join(render_spread(f, 0) for f in trained.values()), ""))
    show("Input", rows, options)


if __name__ == "__main__":
    main()
