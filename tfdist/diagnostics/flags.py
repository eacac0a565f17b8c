"""The doctor's command line."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.spec import canonical_strategy
from tfdist.config.parser import OneLineParser, canonical_flag
from tfdist.diagnostics.facts import FactsRequest
from tfdist.diagnostics.survey import build_command
from tfdist.errors import ConfigError
from tfdist.launcher.hosts import add_host_flags, read_hosts, read_ssh_options
from tfdist.launcher.job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorFlags:
    """What was asked for on the command line.

    Attributes:
        logs_of: The run_dir of a run that has ended; None: look at a run that is to begin.
        asked: What every task is to look for.
        job: What is to be launched for it; None: this process is a task itself.
        is_json: Whether the findings are for a program.
    """

    logs_of: str | None = None
    asked: FactsRequest = FactsRequest()
    job: Job | None = None
    is_json: bool = False


def parse_flags(words: Sequence[str], env: Mapping[str, str], usage: str) -> DoctorFlags:
    """Reads the command line, without the program's name; `--help` says `usage` first.

    Raises:
        ConfigError: If a flag is unknown or malformed.
    """
    words = [canonical_flag(word) for word in words]
    if words[:1] == ["logs"]:
        flags = _build_logs_parser(usage).parse_args(words[1:])
        return DoctorFlags(logs_of=flags.run_dir, is_json=flags.json)
    flags = _build_parser(usage).parse_args(words)
    asked = FactsRequest(
        run_dir=os.path.abspath(os.path.expanduser(flags.run_dir)) if flags.run_dir else None,
        recipe=flags.recipe,
        data_files=flags.data_files,
        wait_secs=flags.wait_secs,
        strategy=canonical_strategy(flags.strategy) if flags.strategy else None,
        num_ps=flags.num_ps,
    )
    given = DoctorFlags(asked=asked, is_json=flags.json)
    hosts = read_hosts(flags.hosts, flags.hostfile)
    if not hosts and flags.num_workers is None and _has_cluster(env, asked):
        return given
    job = Job(
        command=build_command(asked, flags.python),
        num_workers=flags.num_workers or sum(host.num_slots for host in hosts) or 1,
        num_ps=flags.num_ps,
        strategy=asked.strategy,
        env=env,
        hosts=hosts,
        ssh=read_ssh_options(flags),
        listen_interface=flags.listen_interface,
    )
    return dataclasses.replace(given, job=job)


def _has_cluster(env: Mapping[str, str], asked: FactsRequest) -> bool:
    try:
        return detect_cluster(env, strategy=asked.strategy, num_ps=asked.num_ps) is not None
    except ConfigError:  # one that contradicts itself is what the doctor is for
        return True


def _build_logs_parser(usage: str) -> OneLineParser:
    parser = OneLineParser(prog="tfdist.doctor logs", usage=usage, allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true")
    return parser


def _build_parser(usage: str) -> OneLineParser:
    parser = OneLineParser(prog="tfdist.doctor", usage=usage, allow_abbrev=False)
    add = parser.add_argument
    add_host_flags(parser, "machines to look at by ssh")
    add("--num_workers", type=int, metavar="N", help="as for tfdist.train (default: all slots, or 1)")
    add("--num_ps", type=int, metavar="N", help="as for tfdist.train")
    add("--strategy", metavar="NAME", help="as for tfdist.train")
    add("--run_dir", metavar="DIR", help="look whether all can use this folder")
    add("--recipe", metavar="NAME", help="look whether all have the same file")
    add("--data_files", metavar="GLOB", help="look whether all have these, and enough of them")
    add("--wait_secs", type=float, default=10.0, metavar="SECS", help="for each other (default: 10)")
    add("--listen_interface", metavar="NAME", help="as for tfdist.train")
    add("--json", action="store_true", help="print a list of findings as JSON")
    return parser
