"""Trains a transformer whole or divided, and says how fast, how idle and how large.

model_parallel_program.py OUT.json MODEL [STAGES MICRO_BATCHES BLOCKS SCHEDULE]: what the chief writes holds seconds of
a step, the share of them that stages wait, and the most memory of any process (10**6 bytes).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import keras

import tfdist
from tfdist.recipe import load_recipe


class Size(NamedTuple):
    """A model, and how much of it is trained."""

    num_layers: int
    width: int
    num_heads: int
    batch_size: int
    num_steps: int


MODELS = {
    "deep": Size(12, 256, 8, 16, 4),
    "wide": Size(12, 1024, 16, 2, 2),
    "large": Size(12, 1536, 16, 2, 2),
    "link": Size(4, 128, 4, 16, 8),
}


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Takes each epoch's time, and what the strategy measures of it."""

    writes = True  # on the chief alone

    def __init__(self) -> None:
        super().__init__()
        self.secs: list[float] = []
        self.idle = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts."""
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops."""
        self.secs.append(time.perf_counter() - self._start)
        self.idle = self.params["measures"]().get("idle_share", 0.0)


def main(out: str, name: str, *division: str) -> None:
    """Trains three epochs, of which the first makes the graphs."""
    pipeline = None
    if division:
        stages, micro_batches, blocks = map(int, division[:3])
        schedule = division[3] if len(division) > 3 else "1f1b"
        pipeline = tfdist.PipelineOptions(
            num_stages=stages,
            num_micro_batches=micro_batches,
            tensor_parallel=blocks,
            pipeline_schedule=schedule,
        )
    size = MODELS[name]
    run = tfdist.initialize(pipeline=pipeline)
    recipe = load_recipe("text_lm")
    x, y = recipe.build_data("train")
    with run.strategy.scope():
        model = recipe.build_model(
            num_layers=size.num_layers, width=size.width, num_heads=size.num_heads, dropout=0.0
        )
    clock = Clock()
    run.fit(
        model,
        x,
        y,
        batch_size=size.batch_size,
        epochs=3,
        steps_per_epoch=size.num_steps,
        shuffle=False,
        verbose=0,
        callbacks=[clock],
    )
    own = Path(f"{out}.{run.task.index if run.task else 0}")
    own.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6))
    run.wait_for_others()
    if run.is_chief:
        sizes = [float(path.read_text()) for path in Path(out).parent.glob(f"{Path(out).name}.*")]
        secs = min(clock.secs[1:]) / size.num_steps
        Path(out).write_text(json.dumps({"step_secs": secs, "idle": clock.idle, "memory_mb": max(sizes)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
