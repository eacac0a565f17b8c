"""A real run of each way that a plan has foretold, in a cluster that somebody has started.

plan_program.py OUT.json '{"every_step": 100, …}': way → steps of an epoch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import keras
import plan_recipe

import tfdist
from tfdist.planning.ways import KINDS


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Takes each epoch's time, by its steps."""

    writes = True  # on the chief alone

    def __init__(self) -> None:
        super().__init__()
        self.secs: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts."""
        self._start = time.perf_counter()
        self._num_steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts."""
        self._num_steps += 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops."""
        self.secs.append((time.perf_counter() - self._start) / self._num_steps)


def main(out: str, steps_of: dict[str, int]) -> None:
    """Trains in each way, and writes the seconds of a step of the second epoch: in the first, graphs are made."""
    run = tfdist.initialize()
    x, y = plan_recipe.build_data("train")
    found = {}
    for name, steps in steps_of.items():
        settings = dict(KINDS[name].settings)
        options: dict[str, Any] = {}
        if run.strategy_name == "multiworker":
            options = {"sync": tfdist.SyncOptions(**settings)}
        elif run.strategy_name == "ps":
            options = {"ps": tfdist.PsOptions(**settings)}
        with run.strategy.scope():
            model = plan_recipe.build_model()
        clock = Clock()
        fit: dict[str, Any] = {
            "batch_size": plan_recipe.BATCH,
            "epochs": 2,
            "steps_per_epoch": steps,
            "verbose": 0,
        }
        run.fit(model, x, y, callbacks=[clock], on_nan="stop", **fit, **options)
        if run.is_chief:
            found[name] = clock.secs[-1]
    if run.is_chief:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
