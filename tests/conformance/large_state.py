"""The program of test_large_state.py: `large_state.py OUT.npz multiworker FOLDER` saves 3 GB, or goes on from them."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tfdist

# 3 * 10**9 bytes. TensorFlow itself sends each variable from worker to worker when it makes it, and 2 GiB at most.
TABLES, ROWS, WIDTH = 3, 1000, 250_000
MARKS = {(0, 0): 7, (1, 500): 8, (2, ROWS - 1): 9}


class Table(keras.layers.Layer):
    """Holds numbers that no step changes, so that a state can be large where memory is not."""

    def build(self, input_shape: Any) -> None:
        """Makes them."""
        self.tables = [
            self.add_weight(
                shape=(ROWS, WIDTH), dtype="int32", initializer="zeros", trainable=False, name=f"table_{i}"
            )
            for i in range(TABLES)
        ]

    def call(self, inputs: Any) -> Any:
        """Looks at one of them."""
        return inputs + 0.0 * keras.ops.cast(self.tables[0][0, 0], "float32")


def main(out: str, strategy: str, folder: str) -> None:
    """Trains an epoch more than the checkpoints have, and writes what every process has of the table then."""
    run = tfdist.initialize(strategy=strategy, seed=1)
    with run.strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1), Table()])
        model.compile("sgd", "mse")
    x = np.ones((16, 4), np.float32)
    is_first = not any(Path(folder).glob("epoch-*.npz"))
    run.build(model, (x, x[:, :1]))
    tables = [run.strategy.experimental_local_results(t.value)[0] for t in model.layers[-1].tables]
    if is_first:
        for (place, row), mark in MARKS.items():
            tables[place][row].assign(np.full(WIDTH, mark, np.int32))
    run.fit(
        model,
        (x, x[:, :1]),
        batch_size=8,
        epochs=1 if is_first else 2,
        verbose=0,
        checkpoints=tfdist.Checkpoints(directory=folder, keep=1),
    )
    rank = 0 if run.is_chief else 1
    rows = {f"{place}/{row}": tables[place][row].numpy()[[0, -1]] for place, row in (*MARKS, (2, 998))}
    np.savez(f"{out}-{rank}.npz", steps=int(model.optimizer.iterations.numpy()), **rows)
    run.wait_for_others()


if __name__ == "__main__":
    main(*sys.argv[1:])
