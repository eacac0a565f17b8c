"""What a failure costs: time to the next step, throughput until a ps worker is back, examples, and checkpoints.

    python benchmarks/recovery.py [--only=checkpoints] [--rounds=5] [--write=docs/benchmarks.md]

Every run is `python -m tfdist.train` in real processes, which are killed by SIGKILL; times are those that its launcher
prints and that the run's own files hold. Medians, with the spread of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from figures import ROOT, parse_options, render_spread, show

CHAOS_RECIPE = ROOT / "tests/chaos/recipe.py"  # adds up the numbers of the examples that an epoch has seen
NUM_EXAMPLES, STEPS = 330, 21
NUM_KILLS = 20
SMALL = ["--recipe=digits_cnn", "--set=filters=8", "--checkpoint_every_steps=10"]


def train(folder: Path, *flags: str) -> str:
    """Runs the command in a folder of its own, and returns what it printed."""
    command = [sys.executable, "-m", "tfdist.train", f"--run_dir={folder}", "--verbose=2", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def time_recovery(work: Path, rounds: int) -> dict[str, list[float]]:
    """Returns seconds from a worker's death to the next step, by the two ways to go on."""
    found: dict[str, list[float]] = {"restart": [], "in_process": []}
    for turn in range(rounds):
        for way in list(found)[:: 1 if turn % 2 == 0 else -1]:
            flags = ["--strategy=multiworker", f"--num_workers={'2:3' if way == 'in_process' else '3'}"]
            flags += [f"--elastic={way}", "--epochs=12", f"--chaos=kill:worker:{turn % 3}@step=60"]
            output = train(work / f"{way}-{turn}", *SMALL, *flags)
            found[way].append(float(re.findall(r"goes on (\d+\.\d) s after the failure", output)[0]))
    return found


def time_ps(work: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Returns the share of a ps run's throughput that is lost while a worker is away, and for how long it was."""
    shares, away = [], []
    for turn in range(rounds):
        folder = work / f"ps-{turn}"
        flags = ["--strategy=ps", "--num_workers=3", "--epochs=150", "--chaos=kill:worker:1@step=1000"]
        output = train(folder, "--recipe=digits_cnn", "--set=filters=8", *flags)
        away.append(float(re.findall(r"worker:1 is back (\d+\.\d) s after", output)[0]))
        epochs = read_epochs(folder)
        killed = 1000 // 23
        before = [e["examples_per_sec"] for e in epochs[10:killed]]
        # From the epoch in which it was killed to the one in which it came back.
        back = epochs[killed]["wall_secs"] + away[-1]
        later = zip(epochs[killed - 1 :], epochs[killed:], strict=False)
        during = [epoch["examples_per_sec"] for last, epoch in later if last["wall_secs"] <= back]
        shares.append(1 - statistics.median(during) / statistics.median(before))
    return shares, away


def count_examples(work: Path, num_kills: int) -> tuple[int, int, bool]:
    """Returns the kills that a run of five epochs got over, the epochs that missed any, and whether it ended equal."""
    rng = random.Random(0)
    # Ever later steps: after a restart the run goes on from the checkpoint before.
    steps = sorted(rng.sample(range(3, 5 * STEPS - 1), num_kills))
    kills = ",".join(f"kill:worker:{rng.randrange(2)}@step={step}" for step in steps)
    flags = [f"--recipe={CHAOS_RECIPE}", "--strategy=multiworker", "--checkpoint_every_steps=1"]
    output = train(work / "killed", *flags, f"--chaos={kills}", f"--max_restarts={num_kills}")
    train(work / "whole", *flags)
    whole = NUM_EXAMPLES * (NUM_EXAMPLES - 1) / 2
    wrong = sum(epoch["numbers"] != whole for epoch in read_epochs(work / "killed"))
    last = "checkpoints/epoch-00005-step-00000000.npz"
    with np.load(work / "killed" / last) as found, np.load(work / "whole" / last) as wanted:
        is_equal = all(np.array_equal(found[name], wanted[name]) for name in set(wanted.files) - {"__meta__"})
    return output.count("starting all tasks again"), wrong, is_equal


def time_checkpoints(work: Path) -> list[float]:
    """Returns the seconds that each checkpoint of 100 MB adds to a run that makes one every 3 s.

    Each against the steps just before and after it: a shared machine's speed changes by the minute, and two runs differ
    by more than all their checkpoints cost.
    """
    program, folder = work / "large.py", work / "large"
    program.write_text(_LARGE)
    command = [sys.executable, str(program), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    ends = np.array(json.loads(done.stdout.splitlines()[-1]))
    written = sorted(path.stat().st_mtime for path in folder.glob("epoch-00000-step-*.npz"))
    added = []
    for at in written:
        inside = (ends > at - 1.0) & (ends <= at + 0.2)
        near = (ends > at - 2.0) & (ends <= at + 1.2)
        num_inside, num_around = inside.sum(), near.sum() - inside.sum()
        if num_around and ends[0] < at - 2.0 and ends[-1] > at + 1.2:
            around_secs = (np.ptp(ends[near]) - np.ptp(ends[inside])) / num_around
            added.append(float(np.ptp(ends[inside]) - around_secs * (num_inside - 1)))
    return added


_LARGE = '''"""A table of 100 MB, and a minute and a half of steps; prints when each of them ended."""
import json, sys, time
import keras, numpy as np, tfdist

run = tfdist.initialize(strategy="one_device")
inputs = keras.Input((1,), dtype="int32")
x = keras.layers.Flatten()(keras.layers.Embedding(1_000_000, 25)(inputs))
for _ in range(3):
    x = keras.layers.Dense(512, "relu")(x)
model = keras.Model(inputs, keras.layers.Dense(1)(x))
model.compile("sgd", "mse")

class Clock(keras.callbacks.Callback):
    writes = True  # of the chief alone, which needs no logs
    ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.time())

clock = Clock()
count = 64 * 6_000
data = np.arange(count, dtype="int32")[:, None] % 1_000_000, np.zeros(count, "float32")
checkpoints = tfdist.Checkpoints(directory=sys.argv[1], every_secs=3, keep=99)
run.fit(model, data, batch_size=64, epochs=1, verbose=0, callbacks=[clock], checkpoints=checkpoints)
print(json.dumps(clock.ends))
'''


def show_failures(work: Path, options: argparse.Namespace) -> None:
    """Measures what failures cost."""
    ways = time_recovery(work, options.rounds)
    print("recovery", ways, file=sys.stderr)
    shares, away = time_ps(work, max(1, options.rounds // 2))
    print("ps", shares, away, file=sys.stderr)
    num_kills, wrong, is_equal = count_examples(work, NUM_KILLS)
    print("kills", num_kills, wrong, is_equal, file=sys.stderr)
    lost = render_spread([100 * s for s in shares], 1)
    rows = [
        (
            "kill -9 of one of 3 workers → next step, all started again, s",
            render_spread(ways["restart"], 1),
            "≤ 12",
        ),
        ("… the living form a new cluster, s", render_spread(ways["in_process"], 1), "≤ 4"),
        ("ps: throughput lost while one of 3 workers is away, %", lost, "≤ 40"),
        ("… away for, s", render_spread(away, 1), ""),
        (f"epochs with lost or repeated examples over {num_kills} kills", str(wrong), "0"),
        ("… final state equal to that of an undisturbed run", "yes" if is_equal else "no", "yes"),
    ]
    show("Failures", rows, options)


def show_checkpoints(work: Path, options: argparse.Namespace) -> None:
    """Measures what checkpoints cost."""
    added = time_checkpoints(work)
    rows = [
        ("what a checkpoint of 100 MB adds to a run, s", render_spread(added, 2), ""),
        ("… of wall time, one every 30 s, %", render_spread([100 * s / 30 for s in added], 1), "≤ 2"),
    ]
    note = f"{len(added)} checkpoints, 3 s apart, in one run, each against the second before it and the one after it."
    show("Checkpoints", rows, options, note=note)


PARTS = {"failures": show_failures, "checkpoints": show_checkpoints}


def main() -> None:
    """Measures, prints the tables and, if asked, keeps them."""
    options = parse_options(str(__doc__), rounds=3, parts=PARTS)
    for part in [options.only] if options.only else PARTS:
        with tempfile.TemporaryDirectory() as name:
            PARTS[part](Path(name), options)


if __name__ == "__main__":
    main()
