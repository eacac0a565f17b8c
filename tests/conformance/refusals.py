"""Asks a strategy for what it cannot honour, and keeps what it answers.

Run by Python: `refusals.py OUT.json STRATEGY [REPLICAS]`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import keras
import tensorflow as tf
from loops import Words

import tfdist

DATA = (cases.X, cases.Y)


def sgd(**options: Any) -> keras.Model:
    """Returns a compiled classifier."""
    return cases.classifier(lambda: keras.optimizers.SGD(0.1, **options))


def two_accumulating() -> keras.Model:
    """Returns a model of two optimizers, one of which accumulates."""
    model = cases.two_players()
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), model.loss)
    return model


def scaled() -> keras.Model:
    """Returns a model whose loss is scaled, as under mixed_float16."""
    return cases.classifier(lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))


def uncompiled() -> keras.Model:
    """Returns a model that was never compiled."""
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])


def no_xla() -> keras.Model:
    """Returns a model with an operation for which XLA has no code."""
    model = keras.Sequential([keras.Input((6,)), Words(), keras.layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    return model


class NoOptimizer(cases.OwnStep):
    """A model whose step changes weights without an optimizer."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Changes a weight by hand."""
        self.out.kernel.assign(self.out.kernel * 0.9)
        return {}


def by_hand() -> keras.Model:
    """Returns a compiled `NoOptimizer`."""
    model = NoOptimizer()
    model.compile(keras.optimizers.SGD(0.1))
    return model


def attempts(run: Any) -> dict[str, Callable[[], Any]]:
    """Returns what is asked for, by name."""

    def fit(
        build: Callable[[], keras.Model], data: Any = DATA, batch: int | None = 10, **options: Any
    ) -> Any:
        with run.strategy.scope():
            model = build()
        return run.fit(model, data, batch_size=batch, verbose=0, **options)

    def own(context: Any) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(DATA).batch(5)

    examples = tf.data.Dataset.from_tensor_slices(DATA)

    def outside() -> Any:
        return run.fit(sgd(), DATA, batch_size=10, verbose=0)

    return {
        "uncompiled": lambda: fit(uncompiled),
        "small_batch": lambda: fit(sgd, batch=1),
        "outside": outside,
        "two_accumulating": lambda: fit(two_accumulating),
        "loss_scale": lambda: fit(scaled),
        "own_without_steps": lambda: fit(sgd, own),
        "by_hand": lambda: fit(by_hand),
        "backup": lambda: fit(sgd, callbacks=[keras.callbacks.BackupAndRestore("backup")]),
        "both_weights": lambda: fit(sgd, class_weight={0: 2.0}, sample_weight=cases.W),
        "sample_weight": lambda: fit(sgd, examples, sample_weight=cases.W),
        "split_stream": lambda: fit(sgd, examples, validation_split=0.5),
        "skip_in_loops": lambda: fit(sgd, steps_per_loop=4, on_nan="skip"),
        "no_loop": lambda: fit(sgd, steps_per_loop=0),
        "split_all": lambda: fit(sgd, validation_split=1.0),
        "unequal": lambda: fit(sgd, (cases.X, cases.Y[:-1])),
        "empty": lambda: fit(sgd, (cases.X[:0], cases.Y[:0])),
        "no_xla": lambda: fit(no_xla, jit_compile="on"),
        "batches_of_batches": lambda: fit(sgd, examples.batch(5)),
        "sized_generator": lambda: fit(sgd, iter([DATA])),
        "rolled_back_generator": lambda: fit(sgd, iter([DATA]), batch=None, on_nan="rollback"),
        "examples_for_batches": lambda: fit(sgd, examples, batch=None),
        "y_beside_a_dataset": lambda: fit(sgd, examples, y=cases.Y),
        "dropped_batch": lambda: fit(sgd, examples.batch(5), batch=None, drop_remainder=True),
        "four": lambda: fit(sgd, (cases.X, cases.Y, cases.W, cases.W)),
    }


def main(out: str, strategy: str, replicas: str | None = None) -> None:
    """Asks for everything."""
    run = tfdist.initialize(strategy=strategy, num_replicas=replicas and int(replicas))
    answers = {}
    for name, attempt in attempts(run).items():
        try:
            attempt()
            answers[name] = ""
        except tfdist.ConfigError as error:
            answers[name] = str(error)
    if run.is_chief:
        Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
