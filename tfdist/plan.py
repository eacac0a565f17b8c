"""`python -m tfdist.plan`: tries a recipe's steps in all ways to train, and says what each will cost.

python -m tfdist.plan --recipe=digits_cnn
python -m tfdist.plan --recipe=my_recipe.py --hosts=a,b,c --global_batch_size=256
python -m tfdist.plan --recipe=digits_cnn --link=1gbit,1ms --workers=2,4,8 --simulate=1000
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tfdist.cluster.cores import count_cores
from tfdist.cluster.spec import CLUSTER_STRATEGIES
from tfdist.config.parser import OneLineParser, canonical_flag
from tfdist.config.settings import settings_of
from tfdist.errors import ConfigError, TfdistError
from tfdist.launcher.hosts import SshOptions, add_host_flags, read_hosts
from tfdist.planning.link import parse_link
from tfdist.planning.measure import World, Worlds
from tfdist.planning.predict import Needed, Plan
from tfdist.planning.simulate import (
    DEFAULT_MTBF_DAYS,
    check_simpy,
    draw_efficiency,
    render_efficiency,
    simulate,
)
from tfdist.planning.table import render_best, render_table
from tfdist.planning.ways import DEFAULT_WAYS, DIVIDING, KINDS, check_flags, parse_ways

# With fewer, four workers on this machine would tell little of four machines.
_CORES_OF_FOUR = 8
# Of more hosts not each number is tried.
_MOST_SIZES = 4


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Without the program's name; None takes this process's own.

    Returns:
        0, 1 if a trial failed, 2 for a mistake in the settings, 130 if interrupted.
    """
    try:
        words = [canonical_flag(word) for word in (sys.argv[1:] if args is None else args)]
        flags, rest = _build_parser().parse_known_args(words)
        return _run(flags, rest)
    except TfdistError as error:
        print(f"tfdist.plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("tfdist.plan: interrupted", file=sys.stderr)
        return 130


def _run(flags: argparse.Namespace, rest: Sequence[str]) -> int:
    place = _read_place(flags)
    check_flags(rest)
    if flags.simulate is not None:
        _check_simulation(flags, place)
    ways = parse_ways(flags.ways, is_linked=bool(flags.link))
    plan = Plan(ways, _read_sizes(flags), parse_link(flags.link) if flags.link else None)
    _make_trials(plan, flags, place, rest)
    predictions = plan.predict()
    curves = {}
    if flags.simulate is not None:
        curves = simulate(plan, most=flags.simulate, mtbf_days=flags.mtbf_days, seed=flags.seed)
        draw_efficiency(curves, Path(flags.picture))
    if flags.json:
        found = {
            "model": plan.alone.model,
            "ways": [p.to_dict() for p in predictions],
            "refused": plan.refusals(),
        }
        print(json.dumps(found | ({"efficiency": curves} if curves else {}), indent=2))
        return 0
    print(render_table(plan.alone.model, predictions), "", sep="\n")
    for name, why in plan.refusals().items():
        print(f"without {name}: {why}")
    print(render_best(predictions, plan.batch_size, rest, place))
    if curves:
        print("", render_efficiency(curves), f"the picture is in {flags.picture}", sep="\n")
    return 0


def _make_trials(plan: Plan, flags: argparse.Namespace, place: Sequence[str], rest: Sequence[str]) -> None:
    if plan.link is not None and not any(word.startswith("--exchange=") for word in rest):
        rest = [*rest, "--exchange=collective"]  # between machines there is no shared memory
    num_trials = sum(len(needed.trials) for needed in plan.clusters())
    hear = functools.partial(print, file=sys.stderr, flush=True) if flags.verbose else _ignore
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


def _ignore(line: str) -> None:
    del line


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


def _read_place(flags: argparse.Namespace) -> list[str]:
    """Returns the flags of the launcher that say where."""
    if flags.link and (flags.hosts or flags.hostfile):
        raise ConfigError(
            f"link={flags.link!r} with hosts: between machines that are there the link is measured; leave one out."
        )
    names = ["hosts", "hostfile", *settings_of(SshOptions)]
    return [f"--{name}={getattr(flags, name)}" for name in names if getattr(flags, name) is not None]


def _check_simulation(flags: argparse.Namespace, place: Sequence[str]) -> None:
    check_simpy()
    for name in ("simulate", "mtbf_days"):
        if getattr(flags, name) <= 0:
            raise ConfigError(f"{name}={getattr(flags, name):g}: it must be more than 0.")
    if not Path(flags.picture).resolve().parent.is_dir():
        raise ConfigError(f"picture={flags.picture!r}: there is no such folder; name another.")
    if not (flags.link or place):
        raise ConfigError(
            f"simulate={flags.simulate} on one machine: it must know what is between machines; give --link or --hosts."
        )


def _read_sizes(flags: argparse.Namespace) -> list[int]:
    """Returns the numbers of workers to plan for."""
    num_slots = sum(host.num_slots for host in read_hosts(flags.hosts, flags.hostfile))
    if flags.workers:
        sizes = [_read_number("workers", word) for word in flags.workers.split(",")]
        if num_slots and max(sizes) > num_slots:
            raise ConfigError(f"workers={max(sizes)}: the hosts have {num_slots} slots; ask for fewer.")
        return sorted(set(sizes))
    if flags.link:
        return [2, 4, 8]
    if num_slots:
        return [n for n in range(2, num_slots + 1) if num_slots <= _MOST_SIZES or n in (2, num_slots)]
    return [2, 4] if count_cores() >= _CORES_OF_FOUR else [2]


def _read_number(name: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ConfigError(f"{name}={text!r}: write numbers of at least 1, such as 2,4.")
    return int(text)


def _build_parser() -> OneLineParser:
    parser = OneLineParser(prog="tfdist.plan", usage=__doc__, allow_abbrev=False)
    add: Any = parser.add_argument
    add("--workers", metavar="N,N",
        help="numbers of workers (default: those that the hosts, or this machine, have)")  # fmt: skip
    add("--ways", metavar="NAME,NAME",
        help=f"of {', '.join(KINDS)} (default: {', '.join(DEFAULT_WAYS)}; where one process takes half of a machine's "
        f"memory {', '.join(DIVIDING)}, too)")  # fmt: skip
    add_host_flags(parser, "try on these machines by ssh")
    add("--link", metavar="RATE,TIME",
        help="of machines that are not there, but like this one: 100mbit,5ms (as ping says)")  # fmt: skip
    add("--json", action="store_true", help="print all of it as JSON")
    add("--simulate", type=int, metavar="N", help="carry it on to N workers, with stragglers and failures")
    add("--mtbf_days", type=float, default=DEFAULT_MTBF_DAYS, metavar="DAYS",
        help=f"mean time between two failures of a machine (default: {DEFAULT_MTBF_DAYS:g})")  # fmt: skip
    add("--picture", default="plan.svg", metavar="FILE", help="of the simulation (default: plan.svg)")
    add("--seed", type=int, default=0, help="of the simulation (default: 0)")
    add("--verbose", action="store_true", help="show what the trials print")
    parser.epilog = "All other flags are those of tfdist.train, for every trial."
    return parser


if __name__ == "__main__":
    sys.exit(main())
