"""What an epoch costs beside its steps, in time and in memory.

    python benchmarks/epochs.py --only=time [--rounds=15] [--write=docs/benchmarks.md]
    python benchmarks/epochs.py --only=memory --rounds=500

Time: an epoch of `digits_cnn`'s own 23 steps and one of eight times as many tell a step's time from the epoch's.
Memory: how much more each process holds after `--rounds` epochs than after the first 50.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from figures import parse_options, render_spread, show, take_turns

import tfdist
from recipes import digits_cnn
from tfdist.launcher.guard import MARK_VARIABLE

COUNT, BATCH, MANY = 1_437, 64, 8
WARM_EPOCHS = 50
WORLDS = {"one_device": [], "mirrored": [], "multiworker": ["--num_workers=2"], "ps": ["--num_workers=2"]}
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


def make_data(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns digits made up; their values cost nothing."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 17, (count, 8, 8, 1)).astype(np.uint8), rng.integers(0, 10, count)


class _Clock(keras.callbacks.Callback):
    """Keeps when each epoch ended."""

    writes = True

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Looks at the clock."""
        self.ends.append(time.perf_counter())


def compare_times(rounds: int) -> dict[str, list[float]]:
    """Returns the milliseconds of an epoch that are not its steps', of Keras and of one_device, with validation."""
    run = tfdist.initialize(strategy="one_device")
    few, many, test = make_data(COUNT), make_data(COUNT * MANY), make_data(360)
    models = {"Keras": digits_cnn.build_model(), "tfdist": digits_cnn.build_model()}

    def epoch_secs(name: str, data: Any, epochs: int) -> float:
        clock = _Clock()
        options = {"epochs": epochs, "verbose": 0, "callbacks": [clock], "validation_data": test}
        if name == "Keras":
            models[name].fit(*data, batch_size=BATCH, **options)
        else:
            run.fit(models[name], data, global_batch_size=BATCH, **options)
        return (clock.ends[-1] - clock.ends[0]) / (epochs - 1)

    def extra_ms(name: str) -> float:
        short, long = epoch_secs(name, few, 9), epoch_secs(name, many, 2)
        return 1e3 * (MANY * short - long) / (MANY - 1)

    contenders: dict[str, Callable[[], float]] = {name: lambda name=name: extra_ms(name) for name in models}
    for contender in contenders.values():
        contender()
    return take_turns(contenders, rounds)


class _Memory(keras.callbacks.Callback):
    """Keeps what every process of the job holds, after the first epochs and at the end."""

    writes = True

    def __init__(self) -> None:
        super().__init__()
        self.held: list[dict[int, float]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Looks."""
        if epoch in (WARM_EPOCHS - 1, self.params["epochs"] - 1):
            self.held.append(_held_mb())


def _held_mb() -> dict[int, float]:
    mark, found = os.environ.get(MARK_VARIABLE), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark and f"{MARK_VARIABLE}={mark}".encode() not in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                continue
            if mark or int(folder.name) == os.getpid():
                found[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * _PAGE_MB
        except OSError:  # it has ended
            continue
    return found


def train(strategy: str, epochs: int, out: Path) -> None:
    """Trains in a task of a job, and leaves the megabytes an epoch of the process that grows most."""
    run = tfdist.initialize(strategy=strategy)
    with run.strategy.scope():
        model = digits_cnn.build_model()
    memory, data = _Memory(), make_data(COUNT)
    run.fit(
        model,
        data,
        global_batch_size=BATCH,
        epochs=epochs,
        verbose=0,
        validation_data=data,
        callbacks=[memory],
    )
    if run.is_chief:
        before, after = memory.held
        grown = max(after[pid] - before[pid] for pid in before.keys() & after.keys())
        out.write_text(str(grown / (epochs - WARM_EPOCHS)))


def growth_mb(strategy: str, rounds: int) -> float:
    """Returns the megabytes an epoch of the process that grows most."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        launch = ["-m", "tfdist.launch", "--preload", f"--strategy={strategy}", *WORLDS[strategy]]
        task = [__file__, "--task", strategy, str(WARM_EPOCHS + rounds), str(out)]
        words = task if not WORLDS[strategy] else [*launch, *task]
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return float(out.read_text())


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    if sys.argv[1:2] == ["--task"]:
        strategy, epochs, out = sys.argv[2:]
        train(strategy, int(epochs), Path(out))
        return
    options = parse_options(str(__doc__), rounds=15, parts=("time", "memory"))
    if options.only != "memory":
        found = compare_times(options.rounds)
        rows = [
            (
                "an epoch beside its steps, with validation on 360 examples, ms: tfdist, one_device",
                render_spread(found["tfdist"], 0),
                "≤ 25 beside validation",
            ),
            ("… `keras.Model.fit`", render_spread(found["Keras"], 0), ""),
        ]
        show("Epochs: time", rows, options)
    if options.only != "time":
        rows = [
            (
                f"{strategy}: memory of the task that grows most, MB an epoch",
                f"{growth_mb(strategy, options.rounds):.3f}",
                "≤ 0.02",
            )
            for strategy in WORLDS
        ]
        show("Epochs: memory", rows, options, note=f"After the first {WARM_EPOCHS} epochs.")


if __name__ == "__main__":
    main()
