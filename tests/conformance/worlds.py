"""Starts a program in a world: a strategy and a number of replicas or workers, in real processes."""

import contextlib
import functools

import numpy as np
import programs
import pytest
from chosen import VARIABLE


def run_world(program, out, world):
    """Runs `program OUT STRATEGY [REPLICAS]` to its end.

    Args:
        program: The file.
        out: Its first argument.
        world: `keras`, `one_device`, `mirrored-N`, `multiworker-N`, `ps-N`, `ps-N-P` with P ps tasks, or `pipeline-N-M`
            with N stages and M micro-batches, or `pipeline-N-M-C` with C copies of the model, or `pipeline-N-M-C-T`
            with T blocks of each layer.
    """
    strategy, number, rest, copies, blocks = [*world.split("-"), "", "", "", ""][:5]
    launch, replicas = [], []
    if strategy in ("multiworker", "ps", "pipeline"):
        launch = ["-m", "tfdist.launch", "--preload", f"--strategy={strategy}", f"--num_workers={number}"]
    if strategy == "ps":
        launch.append(f"--num_ps={rest or 1}")
    if strategy == "mirrored":
        replicas = [number]
    if strategy == "pipeline":
        launch[-1] = f"--num_workers={int(number) * int(copies or 1) * int(blocks or 1)}"
        replicas = [f"{number}x{rest}x{blocks or 1}"]
    done = programs.run([*launch, program, out, strategy, *replicas], timeout=600)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"


def marked(cases, worlds, default, never=(), ci=()):
    """Returns `(case, world)` parameters, those that do not run by default with their mark.

    Args:
        cases: All.
        worlds: All.
        default: For a world the cases that always run; all where it is not named.
        never: `(case, world)` that is refused, or different by design.
        ci: Worlds, and cases, that of `default` CI alone runs.
    """

    def marks(case, world):
        if case not in default.get(world, cases):
            return [pytest.mark.everything]
        return [pytest.mark.ci] if world in ci or case in ci else []

    return [
        pytest.param(case, world, marks=marks(case, world))
        for world in worlds
        for case in cases
        if (case, world) not in never
    ]


@contextlib.contextmanager
def asking(request, world, is_asked=lambda case: True):
    """Tells a program which cases to run: those of the file's chosen tests in this world; of all for `keras`."""
    items = [i for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    params = [item.callspec.params for item in items]
    asked = {case for p in params if world in ("keras", p.get("world")) and (case := p.get("case"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, " ".join(sorted(filter(is_asked, asked))))
        yield


def results_of(program, folder, request, part_of=lambda case: None):
    """Returns a function of a world's name that gives what the program wrote there, as a dict of arrays.

    Each world runs once, when it is first asked for; one that fails is not run again for each case. It runs the cases
    of the tests that were chosen; `keras`, the reference, those of every world.

    Args:
        program: The file.
        folder: Where it writes `WORLD.npz`.
        request: Of the fixture of the tests' file.
        part_of: Divides the cases: each part, the function's second argument, is a run of the program for itself.
    """

    @functools.cache
    def attempt(world, part):
        out = folder / f"{world}-{part}.npz"
        try:
            with asking(request, world, lambda case: part_of(case) == part):
                run_world(program, out, world)
        except AssertionError as error:
            return error
        with np.load(out) as stored:
            return dict(stored)

    def get(world, part=None):
        found = attempt(world, part)
        if isinstance(found, AssertionError):
            raise found
        return found

    return get
