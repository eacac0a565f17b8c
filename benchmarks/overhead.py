"""What tfdist costs over plain Keras, and how long its commands take to answer.

    python benchmarks/overhead.py [--rounds=7] [--write=docs/benchmarks.md]

Every round times each contender once, in turn; figures are ratios of medians with the spread of the rounds, since
machines are shared and noisy. The first epochs, which trace and compile, are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from figures import divide, parse_options, render_spread, show, take_turns

import tfdist
from recipes import digits_cnn
from tfdist.data import build_source


def build_mlp() -> keras.Model:
    """Returns a model whose step takes about a millisecond."""
    layers = keras.layers
    model = keras.Sequential([keras.Input((64,)), layers.Dense(256, activation="tanh"), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


def compare_epochs(
    build_model: Callable[[], keras.Model], data: tuple[np.ndarray, np.ndarray], rounds: int
) -> dict[str, list[float]]:
    """Returns seconds per epoch of `keras.Model.fit` and of `run.fit` under one_device."""
    run = tfdist.initialize(strategy="one_device")
    plain, ours = build_model(), build_model()
    source = build_source(data)

    def time_plain() -> float:
        start = time.perf_counter()
        plain.fit(*data, batch_size=64, epochs=1, verbose=0)
        return time.perf_counter() - start

    def time_ours() -> float:
        start = time.perf_counter()
        run.fit(ours, source, batch_size=64, epochs=1, verbose=0)
        return time.perf_counter() - start

    time_plain(), time_ours()
    return take_turns({"Keras": time_plain, "tfdist": time_ours}, rounds)


def time_command(command: Sequence[str], rounds: int) -> list[float]:
    """Returns seconds from the start of a command to its end."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    options = parse_options(str(__doc__), rounds=7)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (6_400, 8, 8, 1)).astype(np.uint8)
    vectors = rng.normal(size=(64_000, 64)).astype(np.float32)
    contests = {
        "digits_cnn": (digits_cnn.build_model, (images, rng.integers(0, 10, len(images)))),
        "MLP with steps of about 1 ms": (build_mlp, (vectors, rng.integers(0, 10, len(vectors)))),
    }
    rows = []
    for name, (build_model, data) in contests.items():
        secs = compare_epochs(build_model, data, options.rounds)
        ratio = divide(secs["tfdist"], secs["Keras"])
        rows.append((f"`fit` ÷ `keras.Model.fit` per epoch, {name}", f"{ratio:.3f}", "≤ 1.03"))
        spreads = "; ".join(render_spread(values) for values in (secs["tfdist"], secs["Keras"]))
        rows.append((f"… seconds, tfdist; Keras; {len(data[0]) // 64} steps", spreads, ""))
    python = sys.executable
    launch = time_command([python, "-m", "tfdist.launch", "--num_workers=1", "--", "true"], options.rounds)
    usage = time_command([python, "-m", "tfdist.train", "--help"], options.rounds)
    rows.append(("`python -m tfdist.launch -- true`, start to end, s", render_spread(launch), "< 0.5"))
    rows.append(("`python -m tfdist.train --help`, s", render_spread(usage), "< 1"))
    show("Overhead", rows, options)


if __name__ == "__main__":
    main()
