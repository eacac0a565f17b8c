"""Makes the trials that a plan needs, one cluster after the other, and shows how far they are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tfdist.cluster.spec import CLUSTER_STRATEGIES
from tfdist.errors import ConfigError, TfdistError
from tfdist.planning.measure import World, Worlds
from tfdist.planning.predict import Needed, Plan
from tfdist.planning.ways import DIVIDING


def make_trials(plan: Plan, place: Sequence[str], rest: Sequence[str], *, verbose: bool) -> None:
    """Gives a plan its measurements.

    Args:
        plan: Says which it needs.
        place: Flags of the launcher that say where; none: on this machine.
        rest: Flags of `tfdist.train`.
        verbose: Whether what the trials print is shown.

    Raises:
        TfdistError: If a trial fails that the plan cannot do without.
    """
    if plan.link is not None and not any(word.startswith("--exchange=") for word in rest):
        rest = [*rest, "--exchange=collective"]  # between machines there is no shared memory
    num_trials = sum(len(needed.trials) for needed in plan.clusters())
    hear = functools.partial(print, file=sys.stderr, flush=True) if verbose else lambda line: None
    with (
        _progress(num_trials) as (begin, note),
        Worlds(launch=place or ["--preload"], train=rest, note=note, hear=hear) as worlds,
    ):
        for needed in plan.clusters():
            is_cluster = needed.strategy in CLUSTER_STRATEGIES
            begin(f"{needed.name} with {needed.num_workers} workers" if is_cluster else needed.name)
            plan.worlds[needed.name, needed.num_workers] = _try(worlds, needed, plan)


def _try(worlds: Worlds, needed: Needed, plan: Plan) -> World:
    """Makes a cluster's trials; a model that cannot be divided stops no plan, nor one that must be."""
    try:
        return worlds.run(needed.strategy, needed.num_workers, needed.trials, needed.settings)
    except TfdistError as error:
        is_whole = needed.strategy == "one_device" and not isinstance(error, ConfigError)
        if needed.name not in DIVIDING and not (is_whole and set(DIVIDING) & set(plan.ways)):
            raise
        return World(
            num_workers=needed.num_workers,
            model={},
            timings={},
            refused={needed.name: " ".join(str(error).split())},
            start_secs=0.0,
        )


@contextmanager
def _progress(num_trials: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Shows how far the trials are; yields what is told of the next cluster, and of each trial that is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=num_trials)

        def begin(what: str) -> None:
            progress.update(task, description=f"trying {what}")
            if not console.is_terminal:
                print(f"trying {what}", file=sys.stderr, flush=True)

        yield begin, lambda: progress.advance(task)
