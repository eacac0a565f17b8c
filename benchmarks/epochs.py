"""What an epoch costs beside its steps, in time and in memory.

    python benchmarks/epochs.py --only=time [--rounds=15] [--write=docs/benchmarks.md]
    python benchmarks/epochs.py --only=memory --rounds=500

Time: of an epoch of two steps, a whole batch and a short one, what is not theirs by the rate of one of 184 steps.
Memory: how much more each process holds after `--rounds` epochs than after the first 50.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
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
from tfdist.launcher.process.reaper import MARK_VARIABLE

COUNT, BATCH = 1_437, 64
FEW, MANY = BATCH + COUNT % BATCH, 8 * COUNT
WARM_EPOCHS, LOOKS = 50, 20
BACKENDS = {"one_device": [], "mirrored": [], "multiworker": ["--num_workers=2"], "ps": ["--num_workers=2"]}
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


def make_data(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns digits made up; their values cost nothing."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 17, (count, 8, 8, 1)).astype(np.uint8), rng.integers(0, 10, count)


class _Clock(keras.callbacks.Callback):
    """Keeps when each epoch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Looks at the clock."""
        self.ends.append(time.perf_counter())


def extra_ms(fit: Callable[..., Any]) -> float:
    """Returns the milliseconds of an epoch that are not its steps', by one of few steps and one of many.

    Args:
        fit: Trains on some arrays for some epochs, with a callback.
    """

    def epoch_secs(data: Any, epochs: int) -> float:
        clock = _Clock()
        fit(data, epochs, clock)
        return (clock.ends[-1] - clock.ends[0]) / (epochs - 1)

    short, long = epoch_secs(make_data(FEW), 20), epoch_secs(make_data(MANY), 2)
    return 1e3 * (short - 2 * long / -(-MANY // BATCH))


def fitting(run: tfdist.Run | None, validates: bool) -> Callable[..., Any]:
    """Returns what `extra_ms` takes: of tfdist, or without a run of Keras."""
    with run.strategy.scope() if run else contextlib.nullcontext():
        model = digits_cnn.build_model()
    test = make_data(360) if validates else None

    def fit(data: Any, epochs: int, callback: Any) -> None:
        options = {"epochs": epochs, "verbose": 0, "callbacks": [callback], "validation_data": test}
        if run is None:
            model.fit(*data, batch_size=BATCH, **options)
        else:
            run.fit(model, data, batch_size=BATCH, **options)

    return fit


def compare_times(rounds: int) -> dict[str, list[float]]:
    """Returns what an epoch costs beside its steps, in milliseconds, by Keras and under one_device."""
    run = tfdist.initialize(strategy="one_device")
    contenders: dict[str, Callable[[], float]] = {
        f"{who}{with_validation}": functools.partial(extra_ms, fitting(own, bool(with_validation)))
        for with_validation in ("", ", and validation on 360 examples")
        for who, own in (("one_device", run), ("`keras.Model.fit`", None))
    }
    for contender in contenders.values():
        contender()
    return take_turns(contenders, rounds)


def time_epochs(strategy: str, rounds: int, out: Path) -> None:
    """Leaves what an epoch costs beside its steps, in milliseconds, once for each round; a task of a job."""
    run = tfdist.initialize(strategy=strategy)
    fit = fitting(run, False)
    extra_ms(fit)
    found = [extra_ms(fit) for _ in range(rounds)]
    if run.is_chief:
        out.write_text(json.dumps(found))


class _Memory(keras.callbacks.Callback):
    """Keeps what every process of the job holds, in the last of the first epochs and in the last of all."""

    writes = True

    def __init__(self) -> None:
        super().__init__()
        self.before: list[dict[int, float]] = []
        self.after: list[dict[int, float]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Looks."""
        for end, held in ((WARM_EPOCHS, self.before), (self.params["epochs"], self.after)):
            if end - LOOKS <= epoch < end:
                held.append(_held_mb())


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


def weigh_epochs(strategy: str, rounds: int, out: Path) -> None:
    """Leaves the megabytes an epoch of the process that grows most; a task of a job."""
    run = tfdist.initialize(strategy=strategy)
    with run.strategy.scope():
        model = digits_cnn.build_model()
    memory, data, epochs = _Memory(), make_data(COUNT), WARM_EPOCHS + rounds
    run.fit(
        model,
        data,
        batch_size=BATCH,
        epochs=epochs,
        verbose=0,
        validation_data=data,
        callbacks=[memory],
    )
    if run.is_chief:
        # Medians: buffers that come and go make up some ten MB of any single epoch.
        grown = max(
            statistics.median(held[pid] for held in memory.after)
            - statistics.median(held[pid] for held in memory.before)
            for pid in memory.before[0].keys() & memory.after[-1].keys()
        )
        out.write_text(json.dumps(grown / rounds))


TASKS = {"time": time_epochs, "memory": weigh_epochs}


def run_job(task: str, strategy: str, rounds: int) -> Any:
    """Runs one of `TASKS` under a strategy, and returns what it left."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        launch = ["-m", "tfdist.launch", "--preload", f"--strategy={strategy}", *BACKENDS[strategy]]
        program = [__file__, "--task", task, strategy, str(rounds), str(out)]
        words = program if not BACKENDS[strategy] else [*launch, *program]
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return json.loads(out.read_text())


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    if sys.argv[1:2] == ["--task"]:
        task, strategy, rounds, out = sys.argv[2:]
        TASKS[task](strategy, int(rounds), Path(out))
        return
    options = parse_options(str(__doc__), rounds=15, parts=("time", "memory"))
    if options.only != "memory":
        found = compare_times(options.rounds)
        for strategy in BACKENDS:
            if strategy != "one_device":
                found[strategy] = run_job("time", strategy, options.rounds)
        limits = {"one_device": "≤ 25"} | dict.fromkeys(("mirrored", "multiworker", "ps"), "≤ 50")
        rows = [
            (f"an epoch beside its steps, ms: {name}", render_spread(found[name], 0), limits.get(name, ""))
            for name in sorted(found, key=lambda name: "validation" in name)
        ]
        show("Epochs: time", rows, options)
    if options.only != "time":
        rows = [
            (
                f"{strategy}: memory of the task that grows most, MB an epoch",
                f"{run_job('memory', strategy, options.rounds):.3f}",
                "≤ 0.02",
            )
            for strategy in BACKENDS
        ]
        note = (
            f"After the first {WARM_EPOCHS} epochs, medians of {LOOKS}. TensorFlow keeps 1.6 kB of each exchange "
            "between workers, 0.037 MB an epoch here; buffers that come and go make up some 0.02 of the rest."
        )
        show("Epochs: memory", rows, options, note=note)


if __name__ == "__main__":
    main()
