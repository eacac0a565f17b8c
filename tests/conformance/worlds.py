"""Starts a program in a world: a strategy and a number of replicas or workers, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = str(Path(__file__).parents[2])


def run_world(program, out, world):
    """Runs `program OUT STRATEGY [REPLICAS]` to its end.

    Args:
        program: The file.
        out: Its first argument.
        world: `keras`, `one_device`, `mirrored-N`, `multiworker-N` or `ps-N`.
    """
    strategy, _, number = world.partition("-")
    launch = {
        "multiworker": ["-m", "tfdist.launch", "--strategy=multiworker", f"--num_workers={number}"],
        "ps": ["-m", "tfdist.launch", "--strategy=ps", f"--num_workers={number}", "--num_ps=1"],
    }.get(strategy, [])
    replicas = [number] if strategy == "mirrored" else []
    command = [sys.executable, *launch, str(program), str(out), strategy, *replicas]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([REPOSITORY, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
