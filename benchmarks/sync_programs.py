"""The contenders of `sync.py` that run on Keras: `sync_programs.py CONTENDER CONTEST OUT.json WEIGHTS.npz [RANK]`.

CONTENDER: `weights` (writes the initial weights), `keras` (plain `fit`, all cores), `isolated` (one worker's share,
alone), `lock_step` (the same, waiting for the other worker at each step), `allreduce`, or a way of sharing under
tfdist: `every_step`, `local_sgd`.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
from sync_models import CONTESTS, EPSILON, LEARNING_RATE, MLP_LAYERS, MLP_WIDTH, WARM_STEPS, build_data, pin

CONTENDER, CONTEST, OUT, WEIGHTS, *RANK = sys.argv[1:]
if RANK:
    pin(int(RANK[0]))
elif CONTENDER != "keras" and "TF_CONFIG" in os.environ:
    pin(json.loads(os.environ["TF_CONFIG"])["task"]["index"])

import keras  # noqa: E402 - after pinning
import numpy as np  # noqa: E402 - after pinning
import tensorflow as tf  # noqa: E402 - after pinning

import tfdist  # noqa: E402 - after pinning

layers = keras.layers
NUM_TRIES = 12
LOCAL_STEPS = 32
CALLS = {64 * 2**20: 4, 2**20: 20, 10 * 2**10: 100}


class Timer(keras.callbacks.Callback):
    """Notes when steps end."""

    writes = True  # only the chief's is asked, and it reads no logs

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts."""
        self.times: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Notes one."""
        self.times.append(time.perf_counter())

    def figures(self, batch: int) -> dict[str, Any]:
        """Returns examples/s; the first step is left out."""
        return {"rate": batch / float(np.diff(self.times).mean())}


class LockStep(keras.callbacks.Callback):
    """Waits at each step's end for the other of two workers."""

    writes = False  # both wait

    def on_train_begin(self, logs: Any = None) -> None:
        """Meets it."""
        path = f"{WEIGHTS}.socket"
        if RANK == ["0"]:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path)
                server.listen()
                self._other, _ = server.accept()
            Path(path).unlink()
            return
        self._other = socket.socket(socket.AF_UNIX)
        while self._other.connect_ex(path):
            time.sleep(0.01)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Waits."""
        self._other.send(b".")
        self._other.recv(1)


def build_model() -> keras.Model:
    """Returns the contest's model, compiled."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(CONTESTS[CONTEST].shape)
    x = {"cnn": _cnn, "resnet": _resnet, "mlp": _mlp}[CONTEST](inputs)
    model = keras.Model(inputs, layers.Dense(10)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON), loss)
    return model


def _cnn(x: Any) -> Any:
    for filters in (32, 64):
        x = layers.MaxPooling2D()(layers.Conv2D(filters, 3, activation="relu")(x))
    return layers.Dense(128, activation="relu")(layers.Flatten()(x))


def _mlp(x: Any) -> Any:
    for _ in range(MLP_LAYERS):
        x = layers.Dense(MLP_WIDTH, activation="relu")(x)
    return x


def _resnet(x: Any) -> Any:
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    for filters in (16, 32, 64):
        for block in range(3):
            stride = 2 if filters > 16 and block == 0 else 1
            y = layers.Conv2D(filters, 3, stride, padding="same", use_bias=False)(x)
            y = layers.Activation("relu")(layers.GroupNormalization(8)(y))
            y = layers.GroupNormalization(8)(layers.Conv2D(filters, 3, padding="same", use_bias=False)(y))
            x = layers.Conv2D(filters, 1, stride)(x) if stride > 1 else x
            x = layers.Activation("relu")(layers.add([x, y]))
    return layers.GlobalAveragePooling2D()(x)


def train(
    strategy: str,
    batch: int,
    *callbacks: keras.callbacks.Callback,
    warm_steps: int = WARM_STEPS,
    **options: Any,
) -> dict[str, Any] | None:
    """Trains by tfdist, and returns the figures on the chief."""
    run = tfdist.initialize(strategy=strategy)
    with run.strategy.scope():
        model = build_model()
    with np.load(WEIGHTS) as stored:
        model.set_weights([stored[f"w{i}"] for i in range(len(stored.files))])
    x, y = build_data(CONTEST)
    settings: dict[str, Any] = {"batch_size": batch, "shuffle": False, "verbose": 0, **options}
    run.fit(model, (x, y), steps_per_epoch=warm_steps, **settings)
    loss = run.evaluate(model, x[:512], y[:512], batch_size=256, verbose=0, return_dict=True)["loss"]
    timer = Timer()
    run.fit(
        model, (x, y), steps_per_epoch=CONTESTS[CONTEST].num_steps, callbacks=[*callbacks, timer], **settings
    )
    return timer.figures(batch) | {"loss": float(loss)} if run.is_chief else None


def train_plain() -> dict[str, Any]:
    """Trains by Keras alone."""
    model, (x, y) = build_model(), build_data(CONTEST)
    with np.load(WEIGHTS) as stored:
        model.set_weights([stored[f"w{i}"] for i in range(len(stored.files))])
    batch, timer = CONTESTS[CONTEST].global_batch, Timer()
    settings: dict[str, Any] = {"batch_size": batch, "shuffle": False, "verbose": 0}
    model.fit(x, y, steps_per_epoch=WARM_STEPS, **settings)
    loss = model.evaluate(x[:512], y[:512], verbose=0)
    model.fit(x, y, steps_per_epoch=CONTESTS[CONTEST].num_steps, callbacks=[timer], **settings)
    return timer.figures(batch) | {"loss": float(loss)}


def time_all_reduce() -> dict[str, float] | None:
    """Returns the milliseconds of an all-reduce of a bucket inside a graph, by the faster of the two communicators.

    Several in a row make one graph, so that its call, of which a step has one anyway, does not count.
    """
    from tfdist.collectives import choose_communicator  # here: no other contender needs it

    run = tfdist.initialize(strategy="multiworker")
    rank, num_workers = run.task.index, len(run.cluster.tasks)

    def build(function: Any) -> Any:
        compiled = tf.function(
            lambda: run.strategy.run(lambda: function(tf.distribute.get_replica_context())), autograph=False
        )
        return lambda: run.strategy.experimental_local_results(compiled())[0].numpy()

    found = {}
    for num_bytes, num_calls in CALLS.items():
        communicator, _ = choose_communicator(
            "auto", rank=rank, num_workers=num_workers, num_local=1, num_bytes=num_bytes, build=build
        )
        exchange = build(functools.partial(_sum_in_turn, communicator, num_bytes // 4, num_calls))
        secs = []
        for _ in range(2 + NUM_TRIES):
            start = time.perf_counter()
            exchange()
            secs.append(time.perf_counter() - start)
        found[str(num_bytes)] = 1e3 * float(np.median(secs[2:])) / num_calls
    return found if run.is_chief else None


def _sum_in_turn(communicator: Any, size: int, num_calls: int, outer: Any) -> Any:
    total = tf.zeros([size])
    for _ in range(num_calls):
        total = communicator.sum(total, outer, may_overwrite=True)
    return total[0]


def main() -> None:
    """Runs the contender, and leaves its figures."""
    batch = CONTESTS[CONTEST].global_batch
    if CONTENDER == "weights":
        np.savez(WEIGHTS, **{f"w{i}": w for i, w in enumerate(build_model().get_weights())})
        return
    found: Any
    if CONTENDER == "keras":
        found = train_plain()
    elif CONTENDER in ("isolated", "lock_step"):
        found = train("one_device", batch // 2, *([LockStep()] if CONTENDER == "lock_step" else []))
    elif CONTENDER == "allreduce":
        found = time_all_reduce()
    else:
        is_local = CONTENDER == "local_sgd"
        period = {"sync_period": LOCAL_STEPS} if is_local else {}
        # The first exchange compiles.
        warm_steps = LOCAL_STEPS + 1 if is_local else WARM_STEPS
        sync = tfdist.SyncOptions(sync=CONTENDER, **period)
        found = train("multiworker", batch, warm_steps=warm_steps, sync=sync)
    if found is not None:
        Path(OUT).write_text(json.dumps(found))


main()
