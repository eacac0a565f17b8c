"""The ways in which workers can share what they learn, each on the same data.

Run by Python: `sync_ways.py OUT.npz STRATEGY`. STRATEGY `keras` simulates: every worker is a list of arrays, and steps
are taken by hand. Plain SGD, no shuffling; 44 examples in batches of 12 leave a short last batch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from chosen import chosen

import tfdist
from tfdist.collectives import MpiCommunicator
from tfdist.data.order import part_slice
from tfdist.training.sync.local_steps import neighbours

BATCH, EPOCHS, COUNT, RATE = 12, 2, 44, 0.2
OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.9
# By the number of workers.
EXCHANGES = {2: "collective", 3: "mpi"}
rng = np.random.default_rng(0)
X = rng.normal(size=(COUNT, 6)).astype(np.float32)
Y = rng.integers(0, 3, COUNT)
LOCAL = {
    "local_sgd": {"sync": "local_sgd", "sync_period": 3},
    "post_local": {"sync": "local_sgd", "sync_period": 3, "sync_warmup_steps": 2},
    "diloco": {"sync": "diloco", "sync_period": 3},
    "gossip_ring": {"sync": "gossip"},
    "gossip_exponential": {"sync": "gossip", "sync_graph": "exponential", "sync_period": 2},
    "gossip_complete": {"sync": "gossip", "sync_graph": "complete"},
    "delayed": {"sync": "delayed"},
}
# Each equals every_step: the first group to rounding, the second about.
EXACT = {
    "every_step": {},
    "small_buckets": {"bucket_mb": 1e-4},
    "compiled": {"jit_compile": "on"},
    "compiled_if_faster": {"jit_compile": "auto"},
    "local_sgd_1": {"sync": "local_sgd", "sync_period": 1},
    "diloco_plain": {"sync": "diloco", "sync_period": 1, "outer_learning_rate": 1.0, "outer_momentum": 0.0},
}
ABOUT = {
    "bfloat16": {"exchange_dtype": "bfloat16"},
    "bfloat16_feedback": {"exchange_dtype": "bfloat16", "error_feedback": True},
    "float16": {"exchange_dtype": "float16"},
    "powersgd": {"compression": "powersgd", "compression_rank": 2},
}


def build_model() -> keras.Model:
    """Returns the model, with the same weights each time."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE), loss, metrics=["accuracy"])
    return model


def gradients(model: keras.Model, weights: list[np.ndarray], batch: slice) -> list[np.ndarray]:
    """Returns the gradients of the mean loss over a batch; zeros if it is empty."""
    if batch.stop <= batch.start:
        return [np.zeros_like(w) for w in weights]
    model.set_weights(weights)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(y=Y[batch], y_pred=model(X[batch], training=True))
    return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]


def mean(workers: list[list[np.ndarray]], shares: np.ndarray) -> list[np.ndarray]:
    """Returns the weighted mean of every array."""
    return [sum(s * a for s, a in zip(shares, arrays, strict=True)) for arrays in zip(*workers, strict=True)]


def mix(workers: list[list[np.ndarray]], distance: int) -> list[list[np.ndarray]]:
    """Returns what gossip makes of the workers' weights."""
    if distance == 0:
        return [mean(workers, np.full(len(workers), 1 / len(workers)))] * len(workers)
    circles = [[rank, *neighbours(rank, len(workers), distance)] for rank in range(len(workers))]
    return [mean([workers[k] for k in circle], np.full(len(circle), 1 / len(circle))) for circle in circles]


def simulate(  # noqa: C901 - one story, read from top to bottom
    sync: str, period: int, num_workers: int, warmup_steps: int = 0, graph: str = "ring"
) -> list[np.ndarray]:
    """Returns the weights that a way of sharing ends with."""
    model = build_model()
    workers = [model.get_weights() for _ in range(num_workers)]
    anchor, velocity = model.get_weights(), [np.zeros_like(w) for w in model.get_weights()]
    waiting, seen, num_since, num_mixes, step = None, np.zeros(num_workers), 0, 0, 0
    is_plain = sync != "diloco"

    def agree() -> None:
        nonlocal workers, anchor, num_since, seen
        if not num_since:
            return
        shares = np.full(num_workers, 1 / num_workers) if sync == "gossip" else seen / seen.sum()
        target = mean(workers, shares)
        for i, (a, t) in enumerate(zip(anchor, target, strict=True)):
            velocity[i] = OUTER_MOMENTUM * velocity[i] + (a - t)
            anchor[i] = t if is_plain else a - OUTER_RATE * ((a - t) + OUTER_MOMENTUM * velocity[i])
        workers = [list(anchor) for _ in workers]
        num_since, seen = 0, np.zeros(num_workers)

    for _ in range(EPOCHS):
        for start in range(0, COUNT, BATCH):
            size = min(BATCH, COUNT - start)
            parts = [part_slice(size, k, num_workers) for k in range(num_workers)]
            found = [
                gradients(model, w, slice(start + low, start + high))
                for w, (low, high) in zip(workers, parts, strict=True)
            ]
            sizes = np.array([high - low for low, high in parts])
            if sync == "delayed" or step < warmup_steps:
                union = mean(found, sizes / size)
                applied = waiting if sync == "delayed" else union
                if applied is not None:
                    workers = [[w - RATE * g for w, g in zip(own, applied, strict=True)] for own in workers]
                anchor, waiting = list(workers[0]), union
            else:
                workers = [
                    [w - RATE * g for w, g in zip(own, own_found, strict=True)]
                    for own, own_found in zip(workers, found, strict=True)
                ]
                seen, num_since = seen + sizes, num_since + 1
                if num_since % period == 0 and sync == "gossip":
                    distance = (
                        0
                        if graph == "complete"
                        else 1
                        if graph == "ring"
                        else 2 ** (num_mixes % int(np.ceil(np.log2(num_workers))))
                    )
                    workers, num_mixes = mix(workers, distance), num_mixes + 1
                elif num_since % period == 0:
                    agree()
            step += 1
        if sync == "delayed" and waiting is not None:
            workers = [[w - RATE * g for w, g in zip(own, waiting, strict=True)] for own in workers]
            waiting = None
        agree()
    return workers[0]


def main(out: str, strategy: str) -> None:
    """Trains in every way, and keeps the weights."""
    if strategy == "keras":
        periods = {
            "local_sgd": 3,
            "post_local": 3,
            "diloco": 3,
            "gossip_ring": 1,
            "gossip_complete": 1,
            "gossip_exponential": 2,
            "delayed": 1,
        }
        found = {}
        for name in chosen(LOCAL):
            way = LOCAL[name]
            options = {key: way[f"sync_{key}"] for key in ("warmup_steps", "graph") if f"sync_{key}" in way}
            for num_workers in EXCHANGES:
                weights = simulate(way["sync"], periods[name], num_workers, **options)
                found |= {f"{num_workers}/{name}/{i}": w for i, w in enumerate(weights)}
        np.savez(out, **found)
        return
    run = tfdist.initialize(strategy=strategy, seed=1)
    found: dict[str, Any] = {}
    exchange = EXCHANGES[run.cluster.num_workers]
    ways: dict[str, dict[str, Any]] = {**LOCAL, **EXACT, **ABOUT}
    for name in {"every_step": None, **dict.fromkeys(chosen(ways))}:
        way = dict(ways[name])
        jit_compile = way.pop("jit_compile", "off")
        with run.strategy.scope():
            model = build_model()
        history = run.fit(
            model,
            (X, Y),
            batch_size=BATCH,
            epochs=EPOCHS,
            shuffle=False,
            verbose=0,
            on_nan="stop",
            jit_compile=jit_compile,
            sync=tfdist.SyncOptions(exchange=exchange, **way),
        )
        found |= {f"{name}/{i}": v.numpy() for i, v in enumerate(model.trainable_variables)}
        found |= {
            f"{name}/iterations": model.optimizer.iterations.numpy(),
            f"{name}/loss": history.history["loss"],
        }
    for name in chosen(("local_sgd", "delayed"), "nan/"):
        found[f"nan/{name}"] = np.array(fit_spoiled(run, name))
    if exchange == "mpi":
        found["narrow_sum"] = add_narrow()
        found |= add_large()
    if run.is_chief:
        np.savez(out, **found)


def fit_spoiled(run: tfdist.Run, name: str) -> str:
    """Returns what ends a fit whose seventeenth example, one of the second step, is not a number."""
    x = X.copy()
    x[16] = np.nan
    with run.strategy.scope():
        model = build_model()
    options = tfdist.SyncOptions(exchange="collective", **LOCAL[name])
    try:
        run.fit(model, (x, Y), batch_size=BATCH, shuffle=False, verbose=0, on_nan="stop", sync=options)
    except tfdist.NonFiniteError as error:
        assert all(np.isfinite(v.numpy()).all() for v in model.trainable_variables)
        return str(error)
    return ""


def add_narrow() -> np.ndarray:
    """Returns the sum over MPI's ranks of 256 on the first and 1 on the others, in bfloat16."""
    from mpi4py import MPI  # here: it is started, or not to be

    communicator = MpiCommunicator(MPI.COMM_WORLD)
    own = tf.fill([7], 256.0 if communicator.rank == 0 else 1.0)
    total = tf.function(lambda: tf.cast(communicator.sum(tf.cast(own, tf.bfloat16)), tf.float32))()
    return total.numpy()


def add_large() -> dict[str, np.ndarray]:
    """Returns two steps' sums of a megabyte over MPI's ranks, the first read after the second was made, and memory."""
    from mpi4py import MPI  # as above

    communicator = MpiCommunicator(MPI.COMM_WORLD)
    share = float(communicator.rank + 1)
    own = [tf.fill([300, 500], share), share * tf.range(100_001.0), tf.constant(share)]
    add = tf.function(lambda factor: communicator.sum_each([factor * tensor for tensor in own]))
    steps = [add(tf.constant(factor)) for factor in (1.0, 10.0)]
    found = {
        f"large_sum/{step}/{i}": total.numpy()
        for step, sums in enumerate(steps)
        for i, total in enumerate(sums)
    }
    found["scalar_sum"] = tf.function(lambda: communicator.sum(tf.constant(share)))().numpy()
    return found | {"memory": np.array(Path("/proc/self/maps").read_text())}


if __name__ == "__main__":
    main(*sys.argv[1:])
