"""What `ps_embedding.py` runs in its clusters, on every task of one: `ps_programs.py NAME OUT.json [ARGUMENT]`.

The chief writes what it measured. Ids are drawn evenly from the rows, the hardest case: there are few repeated ones.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from figures import take_turns

import tfdist
from tfdist.data import build_source
from tfdist.layers import Embedding

WIDTH = 16
BATCH, IDS_PER_EXAMPLE = 512, 26
STEPS = 80  # of an epoch
# Several steps a closure from the start, as `tf_keras` is told; left alone, `fit` finds out that they are worth it.
OPTIONS = {"batch_size": BATCH, "steps_per_loop": 10, "verbose": 0}


def draw(num_ids: int, *, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and labels of an epoch."""
    shape = (BATCH * steps, IDS_PER_EXAMPLE)
    labels = np.random.default_rng(0).integers(0, 2, (shape[0], 1)).astype(np.float32)
    return np.random.default_rng(1).integers(0, num_ids, shape).astype(np.int32), labels


def build_model(layer: keras.layers.Layer, *, is_pooled: bool = False) -> keras.Model:
    """Returns a model of one table under a dense part, a small one or hardly any, with Adagrad."""
    ids = keras.Input((IDS_PER_EXAMPLE,), dtype="int32")
    if is_pooled:
        hidden = keras.layers.GlobalAveragePooling1D()(layer(ids))
    else:
        hidden = keras.layers.Dense(64, activation="relu")(keras.layers.Flatten()(layer(ids)))
    model = keras.Model(ids, keras.layers.Dense(1, activation="sigmoid")(hidden))
    model.compile(keras.optimizers.Adagrad(0.05), "binary_crossentropy")
    return model


class Dispatch(keras.callbacks.Callback):
    """Keeps each epoch's share of time in which workers have no closure, and of the cores' in which they are idle."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []
        self.idle: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins to measure."""
        self.before = _read_cores()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Asks for it."""
        self.shares.append(self.params["measures"]()["dispatch_share"])
        idle, total = (after - before for after, before in zip(_read_cores(), self.before, strict=True))
        self.idle.append(idle / total)


def _read_cores() -> tuple[int, int]:
    """Returns the ticks in which the machine's cores were idle, and all."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def time_layers(run: tfdist.Run, rounds: int) -> dict[str, list[float]]:
    """Returns seconds per epoch of tables small and large, ours and Keras's."""

    def epoch_of(build: Callable[[], Any], num_ids: int) -> Callable[[], float]:
        with run.strategy.scope():
            model = build_model(build())
        source = build_source(draw(num_ids))

        def epoch() -> float:
            start = time.perf_counter()
            run.fit(model, source, **OPTIONS)
            return time.perf_counter() - start

        # The first epochs trace, and choose the steps of a closure.
        for _ in range(3):
            epoch()
        return epoch

    few, many = 10_000, 1_000_000
    contenders = {
        "10,000 rows": epoch_of(lambda: Embedding(few, WIDTH), few),
        "10,000,000 rows": epoch_of(lambda: Embedding(10_000_000, WIDTH), few),
        "tfdist": epoch_of(lambda: Embedding(many, WIDTH), many),
        "Keras": epoch_of(lambda: keras.layers.Embedding(many, WIDTH), many),
    }
    return take_turns(contenders, rounds)


def watch_dispatch(run: tfdist.Run, rounds: int) -> dict[str, list[float]]:
    """Returns what of the workers' time no closure fills, how idle the cores are then, and ms per empty closure.

    Of closures of 16 steps, the most that `fit` chooses by itself, and of 64, which a long epoch may be told to have.
    """
    found: dict[str, list[float]] = {}
    for steps_per_loop, steps in ((16, 6 * STEPS), (64, 24 * STEPS)):
        with run.strategy.scope():
            model = build_model(Embedding(1_000_000, WIDTH))
        source = build_source(draw(1_000_000, steps=steps))
        dispatch = Dispatch()
        options = OPTIONS | {"steps_per_loop": steps_per_loop}
        run.fit(model, source, epochs=2 + rounds, callbacks=[dispatch], **options)
        found |= {f"share {steps_per_loop}": dispatch.shares[2:], f"idle {steps_per_loop}": dispatch.idle[2:]}
    return found | {"empty": [_time_empty_closures(run) for _ in range(rounds)]}


def _time_empty_closures(run: tfdist.Run, count: int = 300) -> float:
    coordinator = tf.distribute.coordinator.ClusterCoordinator(run.strategy)
    empty = tf.function(lambda: tf.constant(0.0), autograph=False)
    for number in (20, count):
        start = time.perf_counter()
        for _ in range(number):
            coordinator.schedule(empty)
        coordinator.join()
    return 1e3 * (time.perf_counter() - start) * run.cluster.num_workers / count


def time_ours(run: tfdist.Run, rounds: int) -> dict[str, list[float]]:
    """Returns seconds per epoch of a table of 1,000,000 rows."""
    with run.strategy.scope():
        model = build_model(Embedding(1_000_000, WIDTH))
    source = build_source(draw(1_000_000))
    secs = []
    for _ in range(3 + rounds):
        start = time.perf_counter()
        run.fit(model, source, **OPTIONS)
        secs.append(time.perf_counter() - start)
    return {"secs": secs[3:]}


def count_bytes(run: tfdist.Run, rounds: int) -> dict[str, list[float]]:
    """Returns bytes over loopback in an epoch ÷ those of its unique rows: pulled, pushed, and their ids both times."""
    num_rows = 1_000_000
    with run.strategy.scope():
        model = build_model(Embedding(num_rows, WIDTH), is_pooled=True)
    ids, labels = draw(num_rows)
    source = build_source((ids, labels))
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    for _ in range(3):
        run.fit(model, source, **options)
    unique = sum(len(np.unique(ids[start : start + BATCH])) for start in range(0, len(ids), BATCH))
    row_bytes = 2 * (WIDTH * 4 + 4)
    ratios = []
    for _ in range(rounds):
        before = _read_loopback()
        run.fit(model, source, **options)
        ratios.append((_read_loopback() - before) / (unique * row_bytes))
    return {"ratio": ratios}


def _read_loopback() -> int:
    line = next(
        line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")
    )
    return int(line.split(":")[1].split()[0])


def watch_memory(run: tfdist.Run, rounds: int) -> dict[str, list[float]]:
    """Returns the chief's peak over its idle memory, in GB, while it trains and saves a table of 2 GB."""
    del rounds
    idle = _peak_gb()
    num_rows = 2**31 // (WIDTH * 4)
    with run.strategy.scope():
        model = build_model(Embedding(num_rows, WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        kept = tfdist.Checkpoints(directory=folder)
        run.fit(model, draw(num_rows), batch_size=BATCH, verbose=0, checkpoints=kept)
        trained = _peak_gb()
        size = sum(path.stat().st_size for path in Path(folder).glob("*.npz")) / 2**30
        run.save(model, Path(folder) / "model.keras")
        return {"trained": [trained - idle], "saved": [_peak_gb() - idle], "checkpoint": [size]}


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train_with_a_slow_worker(run: tfdist.Run, rounds: int) -> dict[str, list[float]]:
    """Returns examples/s and final losses, asynchronous and synchronous, one seed a round."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9_216, 256)).astype(np.float32)
    y = (x @ rng.normal(size=(256, 1)) > 0).astype(np.float32)
    found: dict[str, list[float]] = {}
    for seed in range(rounds):
        for mode in ("async", "sync")[:: 1 if seed % 2 == 0 else -1]:
            keras.utils.set_random_seed(seed)
            with run.strategy.scope():
                layers = [keras.layers.Dense(512, activation="relu") for _ in range(3)]
                model = keras.Sequential([keras.Input((256,)), *layers, keras.layers.Dense(1)])
                model.compile(keras.optimizers.SGD(0.02), keras.losses.BinaryCrossentropy(from_logits=True))
            options = {"batch_size": 384, "verbose": 0, "ps": mode}
            run.fit(model, (x, y), epochs=1, **options)
            start = time.perf_counter()
            run.fit(model, (x, y), initial_epoch=1, epochs=4, **options)
            found.setdefault(f"{mode} rate", []).append(3 * len(x) / (time.perf_counter() - start))
            found.setdefault(f"{mode} loss", []).append(
                run.evaluate(model, (x, y), batch_size=384, verbose=0, return_dict=True)["loss"]
            )
    return found


PROGRAMS = {
    "layers": time_layers,
    "dispatch": watch_dispatch,
    "ours": time_ours,
    "bytes": count_bytes,
    "memory": watch_memory,
    "slow": train_with_a_slow_worker,
}


def main(name: str, out: str, rounds: str) -> None:
    """Runs one."""
    run = tfdist.initialize(strategy="ps")
    Path(out).write_text(json.dumps(PROGRAMS[name](run, int(rounds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
