"""The flags of `python -m tfdist.plan`, and what follows from several of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfdist.cluster.cores import count_cores
from tfdist.config.parser import OneLineParser
from tfdist.config.settings import settings_of
from tfdist.errors import ConfigError
from tfdist.launcher.hosts import SshOptions, add_host_flags, read_hosts
from tfdist.planning.simulate import DEFAULT_MTBF_DAYS, check_simpy
from tfdist.planning.ways import DEFAULT_WAYS, DIVIDING, KINDS

# With fewer, four workers on this machine would tell little of four machines.
_CORES_OF_FOUR = 8
# Of more hosts not each number is tried.
_MOST_SIZES = 4


def build_parser(usage: str | None) -> OneLineParser:
    """Makes the command's parser."""
    parser = OneLineParser(prog="tfdist.plan", usage=usage, allow_abbrev=False)
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


def read_place(flags: argparse.Namespace) -> list[str]:
    """Returns the flags of the launcher that say where."""
    if flags.link and (flags.hosts or flags.hostfile):
        raise ConfigError(
            f"link={flags.link!r} with hosts: between machines that are there the link is measured; leave one out."
        )
    names = ["hosts", "hostfile", *settings_of(SshOptions)]
    return [f"--{name}={getattr(flags, name)}" for name in names if getattr(flags, name) is not None]


def read_sizes(flags: argparse.Namespace) -> list[int]:
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


def check_simulation(flags: argparse.Namespace, place: Sequence[str]) -> None:
    """Refuses a simulation that lacks what it needs, before hours of trials.

    Raises:
        ConfigError: If one of its flags is wrong, or nothing is known of what is between machines.
    """
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


def _read_number(name: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ConfigError(f"{name}={text!r}: write numbers of at least 1, such as 2,4.")
    return int(text)
