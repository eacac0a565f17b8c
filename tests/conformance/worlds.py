"""Starts a program in a world: a strategy and a number of replicas or workers, in real processes."""

import functools

import numpy as np
import programs


def run_world(program, out, world):
    """Runs `program OUT STRATEGY [REPLICAS]` to its end.

    Args:
        program: The file.
        out: Its first argument.
        world: `keras`, `one_device`, `mirrored-N`, `mirrored-N-WORD` with another argument for the program,
            `multiworker-N`, `ps-N`, or `ps-N-P` with P ps tasks.
    """
    strategy, number, num_ps = [*world.split("-"), "", ""][:3]
    launch = {
        "multiworker": [
            "-m",
            "tfdist.launch",
            "--preload",
            "--strategy=multiworker",
            f"--num_workers={number}",
        ],
        "ps": [
            "-m",
            "tfdist.launch",
            "--preload",
            "--strategy=ps",
            f"--num_workers={number}",
            f"--num_ps={num_ps or 1}",
        ],
    }.get(strategy, [])
    replicas = [number, *filter(None, [num_ps])] if strategy == "mirrored" else []
    done = programs.run([*launch, program, out, strategy, *replicas], timeout=600)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"


def results_of(program, folder):
    """Returns a function of a world's name that gives what the program wrote there, as a dict of arrays.

    Each world runs once, when it is first asked for; one that fails is not run again for each case.

    Args:
        program: The file.
        folder: Where it writes `WORLD.npz`.
    """

    @functools.cache
    def attempt(world):
        out = folder / f"{world}.npz"
        try:
            run_world(program, out, world)
        except AssertionError as error:
            return error
        with np.load(out) as stored:
            return dict(stored)

    def get(world):
        found = attempt(world)
        if isinstance(found, AssertionError):
            raise found
        return found

    return get
