"""What tfdist costs over plain Keras, and how long its commands take to answer.

    python benchmarks/overhead.py [--rounds=7] [--write=docs/benchmarks.md]

Every round times each contender once, in turn; figures are ratios of medians with the spread of the rounds, since
machines are shared and noisy. The first epochs, which trace and compile, are left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

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
) -> tuple[list[float], list[float]]:
    """Returns seconds per epoch of `keras.Model.fit` and of `run.fit` under one_device, one pair a round."""
    run = tfdist.initialize(strategy="one_device")
    plain, ours = build_model(), build_model()
    source = build_source(data)

    def time_plain() -> float:
        start = time.perf_counter()
        plain.fit(*data, batch_size=64, epochs=1, verbose=0)
        return time.perf_counter() - start

    def time_ours() -> float:
        start = time.perf_counter()
        run.fit(ours, source, global_batch_size=64, epochs=1, verbose=0)
        return time.perf_counter() - start

    time_plain(), time_ours()
    keras_secs, our_secs = [], []
    for turn in range(rounds):
        # A B, B A, …: neither always runs after the other.
        for contender in (0, 1) if turn % 2 == 0 else (1, 0):
            (keras_secs if contender == 0 else our_secs).append((time_plain, time_ours)[contender]())
    return keras_secs, our_secs


def time_command(command: Sequence[str], rounds: int) -> list[float]:
    """Returns seconds from the start of a command to its end."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def render_spread(values: Sequence[float], unit: str = "") -> str:
    """Returns `median (minimum–maximum)`."""
    middle = statistics.median(values)
    return f"{middle:.3f}{unit} ({min(values):.3f}–{max(values):.3f})"


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, help="Keep the table in this file.")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (6_400, 8, 8, 1)).astype(np.uint8)
    vectors = rng.normal(size=(64_000, 64)).astype(np.float32)
    contests = {
        "digits_cnn": (digits_cnn.build_model, (images, rng.integers(0, 10, len(images)))),
        "MLP with steps of about 1 ms": (build_mlp, (vectors, rng.integers(0, 10, len(vectors)))),
    }
    rows = []
    for name, (build_model, data) in contests.items():
        plain, ours = compare_epochs(build_model, data, options.rounds)
        ratio = statistics.median(ours) / statistics.median(plain)
        rows.append((f"`fit` ÷ `keras.Model.fit` per epoch, {name}", f"{ratio:.3f}", "≤ 1.03"))
        rows.append(
            (
                f"… seconds, tfdist; Keras; {len(data[0]) // 64} steps",
                f"{render_spread(ours)}; {render_spread(plain)}",
                "",
            )
        )
    python = sys.executable
    launch = time_command([python, "-m", "tfdist.launch", "--num_workers=1", "--", "true"], options.rounds)
    usage = time_command([python, "-m", "tfdist.train", "--help"], options.rounds)
    rows.append(("`python -m tfdist.launch -- true`, start to end", render_spread(launch, " s"), "< 0.5 s"))
    rows.append(("`python -m tfdist.train --help`", render_spread(usage, " s"), "< 1 s"))
    table = ["| figure | measured | wanted |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    text = "\n".join(table)
    print(text)
    if options.write:
        how = f"{os.cpu_count()} cores, median (spread) of {options.rounds} rounds"
        title = f"## Overhead\n\n`python benchmarks/overhead.py`, {how}.\n"
        options.write.parent.mkdir(exist_ok=True)
        options.write.write_text(f"# Benchmarks\n\n{title}\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
