"""The program of test_loops.py: `loops.py OUT.npz STRATEGY [REPLICAS]` one and several steps in a call, and ahead.

A GPU is what this machine has none of. That the host does not wait for its steps is told to tfdist here without one:
what then runs is what runs there, in the same order, on the CPU.
"""

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from chosen import chosen

import tfdist
from tfdist.training.checkpoint.store import CheckpointWriter
from tfdist.training.monitoring import clock, step_times
from tfdist.training.sync.loop import SyncLoop

COUNT, BATCH, EPOCHS = 90, 8, 2  # eleven whole batches and a short one
rng = np.random.default_rng(0)
X = rng.normal(size=(COUNT, 6)).astype(np.float32)
Y = rng.integers(0, 3, COUNT)
POISONED = 45


class Calls:
    """Counts the steps of each call of a graph."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._choose = SyncLoop._loop_size

    def __enter__(self) -> "Calls":
        def choose(loop: Any, *args: Any) -> int:
            self.sizes.append(self._choose(loop, *args))
            return self.sizes[-1]

        SyncLoop._loop_size = choose  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        SyncLoop._loop_size = self._choose  # type: ignore[method-assign]


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Lets steps be handed out as if to a GPU."""
    before, clock.has_gpu = clock.has_gpu, lambda: True
    try:
        yield
    finally:
        clock.has_gpu = before


class Words(keras.layers.Layer):
    """Does something for which XLA has no code, as it notices when it compiles, and the batch is there."""

    def call(self, inputs: Any) -> Any:
        """Returns its inputs."""
        length = tf.reduce_sum(tf.strings.length(tf.strings.as_string(inputs)))
        return inputs + 0.0 * tf.cast(length, inputs.dtype)


def build_model(layer: keras.layers.Layer | None = None) -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = keras.layers
    parts = [layers.Dense(16, activation="relu"), layers.Dropout(0.3, seed=5), layers.BatchNormalization()]
    parts += [] if layer is None else [layer]
    model = keras.Sequential([keras.Input((6,)), *parts, layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def fit(
    run: Any,
    size: int | None,
    x: np.ndarray = X,
    *,
    is_stream: bool = False,
    layer: keras.layers.Layer | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Returns the weights and the logs, what the calls held, and the error."""
    with run.strategy.scope():
        model = build_model(layer)
    data: Any = (x, Y)
    if is_stream:
        data = tf.data.Dataset.from_tensor_slices((x, Y)).filter(lambda *example: True)
    error = ""
    with Calls() as calls:
        try:
            run.fit(
                model,
                data,
                batch_size=BATCH,
                epochs=EPOCHS,
                steps_per_loop=size,
                verbose=0,
                **options,
            )
        except tfdist.NonFiniteError as found:
            error = str(found)
    weights = np.concatenate([w.ravel() for w in model.get_weights()])
    logs = [values for name, values in sorted(model.history.history.items())]
    iterations = int(model.optimizer.iterations.numpy())
    return {
        "weights": weights,
        "logs": np.array(logs),
        "sizes": np.array(calls.sizes),
        "error": error,
        "iterations": iterations,
    }


def fit_with_checkpoints(run: Any, size: int | None, policy: str, **options: Any) -> dict[str, Any]:
    """Returns what `fit` does of data with a NaN, and the checkpoints that are there at the end."""
    poisoned = X.copy()
    poisoned[POISONED] = np.nan
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = tfdist.Checkpoints(directory=folder, every_steps=4)
        found = fit(run, size, poisoned, shuffle=False, on_nan=policy, checkpoints=checkpoints, **options)
        return {**found, "kept": json.dumps(sorted(path.stem for path in Path(folder).glob("epoch-*.npz")))}


def named(start: str, found: dict[str, Any]) -> dict[str, Any]:
    return {f"{start}/{name}": value for name, value in found.items()}


@functools.cache
def fit_one_by_one(run: Any, policy: str) -> dict[str, Any]:
    return named(f"{policy}/1", fit_with_checkpoints(run, 1, policy))


def fit_in_loops(run: Any, policy: str) -> dict[str, Any]:
    return fit_one_by_one(run, policy) | named(f"{policy}/4", fit_with_checkpoints(run, 4, policy))


def fit_ahead(run: Any) -> dict[str, Any]:
    """Returns what the same fits do where the host runs ahead of the steps."""
    found: dict[str, Any] = {}
    for policy in ("stop", "rollback"):
        found |= fit_one_by_one(run, policy)
        with as_on_gpu():
            results = fit_with_checkpoints(run, None, policy, jit_compile="off")
        found |= named(f"{policy}/ahead", results)
    with as_on_gpu():
        return found | named("plain/ahead", fit(run, None, on_nan="stop", jit_compile="off"))


def fit_words(run: Any) -> dict[str, Any]:
    found = named("words/1", fit(run, 1, layer=Words()))
    with as_on_gpu():
        return found | named("words/ahead", fit(run, None, layer=Words(), jit_compile="auto"))


def fit_auto(run: Any) -> dict[str, Any]:
    # Else only a run of many thousand steps is worth it.
    with mock.patch.multiple(step_times, MARGIN=-1.0, LEAST_SHARE=-1.0):
        return named("auto/4", fit(run, None, on_nan="stop"))


def fit_twice_without_clock(run: Any) -> dict[str, Any]:
    """Returns what two fits do that must be deterministic, as all are after them."""
    tf.config.experimental.enable_op_determinism()
    found = named("deterministic/1", fit(run, 1, on_nan="stop"))
    return found | named("deterministic/2", fit(run, 1, on_nan="stop"))


CASES = {
    "plain": lambda run: named("plain/4", fit(run, 4, on_nan="stop")),
    "stop": lambda run: fit_in_loops(run, "stop"),
    "rollback": lambda run: fit_in_loops(run, "rollback"),
    "ahead": fit_ahead,
    "words": fit_words,
    "auto": fit_auto,
    "stream": lambda run: named("stream/4", fit(run, 4, is_stream=True)),
    "deterministic": fit_twice_without_clock,
}


def main(out: str, strategy: str, replicas: int | None) -> None:
    # One that falls due while the last is being written is left out; here each must be there.
    CheckpointWriter.is_busy = property(lambda self: False)  # type: ignore[assignment]
    run = tfdist.initialize(strategy=strategy, num_replicas=replicas)
    found = named("plain/1", fit(run, 1, on_nan="stop"))
    for name in chosen(CASES):
        found |= CASES[name](run)
    if run.is_chief:
        np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
