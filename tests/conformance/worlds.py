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
    strategy, number, rest = [*world.split("-"), "", ""][:3]
    launch, replicas = [], []
    if strategy in ("multiworker", "ps"):
        launch = ["-m", "tfdist.launch", "--preload", f"--strategy={strategy}", f"--num_workers={number}"]
    if strategy == "ps":
        launch.append(f"--num_ps={rest or 1}")
    if strategy == "mirrored":
        replicas = [number, *filter(None, [rest])]
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
