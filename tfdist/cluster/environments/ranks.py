"""From ranks to roles: the cluster of a world that only counts its tasks."""

import collections
from collections.abc import Mapping, Sequence

from tfdist.cluster.spec import Cluster, Task, canonical_strategy, join_address
from tfdist.errors import ClusterError

STRATEGY_VARIABLE = "TFDIST_STRATEGY"
NUM_PS_VARIABLE = "TFDIST_NUM_PS"
PORT_VARIABLE = "TFDIST_PORT"
# Of ports that are derived from a job's number: below those that Linux hands out by itself, from 32768.
_FIRST_PORT = 10_000
_PORTS_PER_JOB = 64
_NUM_SLOTS = 340


def read_number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    """Reads a whole number, 0 or more; the default where the variable is missing or blank.

    Raises:
        ClusterError: If it is something else.
    """
    text = env.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise ClusterError(f"{name}={text!r}: it is a whole number from 0; correct it")
    return int(text)


def read_num_ps(env: Mapping[str, str], strategy: str | None = None, num_ps: int | None = None) -> int:
    """Settles how many tasks shall hold variables: under `ps` by default one, under other strategies none.

    TFDIST_STRATEGY, any name of a strategy, and TFDIST_NUM_PS stand in for what is not given.

    Raises:
        ConfigError: If the strategy is unknown.
    """
    name = strategy or env.get(STRATEGY_VARIABLE)
    if name and canonical_strategy(name) != "ps":
        return 0
    return num_ps or read_number(env, NUM_PS_VARIABLE, 1 if name else 0)


def find_port(env: Mapping[str, str], job: int) -> int:
    """Finds the port of a job's first task on each host, so that jobs that share one do not meet; others follow it.

    Jobs of neighbouring numbers have different ports. TFDIST_PORT goes before.
    """
    return read_number(env, PORT_VARIABLE, _FIRST_PORT + job * 13 % _NUM_SLOTS * _PORTS_PER_JOB)


def build_ranked_cluster(*, hosts: Sequence[str], rank: int, num_ps: int, port: int) -> Cluster:
    """Deals roles and ports to ranks.

    Without ps all are workers. With ps rank 0 is the chief, and the ps are spread over the hosts, the chief's own last.

    Args:
        hosts: Of each rank, a name or an address.
        rank: Of this process.
        num_ps: Tasks that hold variables.
        port: Of the first task on each host.

    Raises:
        ClusterError: If there are too few tasks for the roles, or no such rank.
    """
    if not 0 <= rank < len(hosts):
        raise ClusterError(
            f"rank {rank}: the job has {len(hosts)} tasks, so the last rank is {len(hosts) - 1}"
        )
    ranks_of = {"chief": [0], "ps": _choose_ps(hosts, num_ps)} if num_ps else {}
    taken = {r for ranks in ranks_of.values() for r in ranks}
    ranks_of["worker"] = [r for r in range(len(hosts)) if r not in taken]
    used: collections.Counter[str] = collections.Counter()
    addresses = []
    for host in hosts:
        addresses.append(join_address(host, port + used[host]))
        used[host] += 1
    (task,) = (Task(role, ranks.index(rank)) for role, ranks in ranks_of.items() if rank in ranks)
    roles = {role: tuple(addresses[r] for r in ranks) for role, ranks in ranks_of.items()}
    return Cluster(addresses=roles, task=task)


def _choose_ps(hosts: Sequence[str], num_ps: int) -> list[int]:
    if len(hosts) < num_ps + 2:
        raise ClusterError(
            f"{len(hosts)} tasks are too few for a chief, {num_ps} ps and a worker: start {num_ps + 2} or more, "
            "or choose --strategy=multiworker"
        )
    waiting: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        waiting.setdefault(host, []).append(rank)
    waiting[hosts[0]].remove(0)
    turns = [*list(waiting.values())[1:], waiting[hosts[0]]]
    # One of each host before a second of any.
    in_turn = [ranks[i] for i in range(len(hosts)) for ranks in turns if i < len(ranks)]
    return sorted(in_turn[:num_ps])
