"""What an evaluator beside the training costs the training's steps.

    python benchmarks/evaluator.py [--rounds=5] [--write=docs/benchmarks.md]

A worker trains on one core, and on the other one process evaluates its checkpoints, or nobody does. The first epoch,
which traces and compiles, is left out.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import divide, parse_options, render_spread, show, take_turns

SETTINGS = ["--set=width=64", "--set=num_layers=2", "--set=sequence_length=64"]
RUN = ["--recipe=text_lm", *SETTINGS, "--epochs=6", "--steps_per_epoch=60", "--report=off", "--verbose=0"]
ONE_CORE = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}


def step_ms(evaluator: str, shares: list[float]) -> float:
    """Returns the milliseconds of a step, and adds the share of the time in which somebody evaluated."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "tfdist.train",
            *RUN,
            f"--run_dir={folder}",
            f"--evaluator={evaluator}",
        ]
        command += ["--strategy=multiworker", "--num_workers=1"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | ONE_CORE)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][1:]
        if evaluator == "on":
            found = [json.loads(line) for line in (Path(folder) / "eval.jsonl").read_text().splitlines()]
            shares.append(sum(line["secs"] for line in found[:-1]) / lines[-1]["wall_secs"])
        config = json.loads((Path(folder) / "config.json").read_text())
    return 1e3 * config["global_batch_size"] / statistics.mean(line["examples_per_sec"] for line in lines)


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    options = parse_options(str(__doc__), rounds=5)
    shares: list[float] = []
    contenders = {name: functools.partial(step_ms, name, shares) for name in ("on", "elsewhere")}
    found = take_turns(contenders, options.rounds)
    rows = [
        ("step with an evaluator ÷ without", f"{divide(found['on'], found['elsewhere']):.3f}", "≤ 1.02"),
        ("… ms, with; without", "; ".join(render_spread(v, 1) for v in found.values()), ""),
        ("share of the run in which it evaluated", render_spread(shares, 2), ""),
    ]
    show("An evaluator beside the training", rows, options)


if __name__ == "__main__":
    main()
