"""The world of a Slurm step: `srun` has started several tasks."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfdist.cluster.environments.ranks import build_ranked_cluster, find_port, read_number
from tfdist.cluster.spec import Cluster
from tfdist.errors import ClusterError

_SCONTROL_SECS = 20.0


def detect(env: Mapping[str, str]) -> bool:
    """Tells whether this process is one of several tasks of a step; an sbatch script itself is not."""
    return "SLURM_PROCID" in env and read_number(env, "SLURM_STEP_NUM_TASKS") > 1


def describe_unused(env: Mapping[str, str]) -> str | None:
    """Says that tasks were allocated and `srun` was not used to start them; None if that is not so."""
    num_tasks = max(read_number(env, "SLURM_NTASKS"), read_number(env, "SLURM_JOB_NUM_NODES"))
    if "SLURM_JOB_ID" not in env or "SLURM_STEP_NUM_TASKS" in env or num_tasks < 2:
        return None
    return (
        f"Slurm has allocated {num_tasks} tasks, and this process runs alone, on one node: srun was not used; "
        "start with 'srun python -m tfdist.train …'"
    )


def build_cluster(env: Mapping[str, str], num_ps: int = 0) -> Cluster:
    """Reads a step's nodes, tasks and their distribution.

    Names of nodes need not resolve: where `scontrol` is on the PATH, it is asked for their addresses.

    Raises:
        ClusterError: If the variables contradict each other, or do not say where each rank runs.
    """
    nodes = expand_nodes(_get(env, "SLURM_STEP_NODELIST"))
    counts = parse_tasks_per_node(_get(env, "SLURM_STEP_TASKS_PER_NODE"))
    rank, num_tasks = read_number(env, "SLURM_PROCID"), read_number(env, "SLURM_STEP_NUM_TASKS")
    if len(nodes) != len(counts) or sum(counts) != num_tasks:
        raise ClusterError(
            f"Slurm names {len(nodes)} nodes, the tasks of {len(counts)} and {num_tasks} tasks in all: they must "
            "agree; unset SLURM_* variables of another job, or do not use a heterogeneous one"
        )
    places = _place_ranks(env, nodes, counts)
    own = [r for r, place in enumerate(places) if place == read_number(env, "SLURM_NODEID")]
    told = [int(r) for r in env.get("SLURM_GTIDS", str(rank)).split(",")]
    if not set(told) <= set(own):
        raise ClusterError(
            f"SLURM_DISTRIBUTION={env.get('SLURM_DISTRIBUTION')!r} puts ranks {own} on this node, where Slurm has "
            f"started {told}; start with 'srun --distribution=block'"
        )
    addresses = _find_addresses(env, nodes)
    job = 7 * read_number(env, "SLURM_JOB_ID") + read_number(env, "SLURM_STEP_ID")
    return build_ranked_cluster(
        hosts=[addresses[nodes[place]] for place in places],
        rank=rank,
        num_ps=num_ps,
        port=find_port(env, job),
    )


def expand_nodes(text: str) -> list[str]:
    """Expands a node list, as `rack[0-1]n[08-10,12],login` is one; `scontrol show hostnames` does the same.

    Raises:
        ClusterError: If it is malformed.
    """
    names: list[str] = []
    for part in re.findall(r"(?:\[[^\]]*\]|[^,])+", text):
        pieces = re.split(r"\[([\d,-]+)\]", part)
        if any(set("[]") & set(piece) for piece in pieces):
            raise ClusterError(f"node list {text!r}: ranges are written as in n[1-3,08-11]; correct it")
        choices = [_expand_range(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += ["".join(words) for words in itertools.product(*choices)]
    return names


def parse_tasks_per_node(text: str) -> list[int]:
    """Parses `2(x3),1` into 2, 2, 2, 1, the tasks of each node.

    Raises:
        ClusterError: If it is malformed.
    """
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        raise ClusterError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: Slurm writes it as in 2(x3),1; correct it")
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def deal_tasks(counts: Sequence[int], size: int) -> list[int]:
    """Deals ranks to nodes in turn, `size` at a time, until each node has its tasks.

    Args:
        counts: The tasks of each node.
        size: 1 is Slurm's cyclic distribution, more a plane's; as many as there are tasks is block.

    Returns:
        The node of each rank.
    """
    left, places = list(counts), []
    while any(left):
        for node, count in enumerate(left):
            places += [node] * min(size, count)
            left[node] -= min(size, count)
    return places


def _place_ranks(env: Mapping[str, str], nodes: Sequence[str], counts: Sequence[int]) -> list[int]:
    """Finds the node of each rank; what follows the first part of a distribution is about sockets and cores."""
    distribution = re.split("[:,=]", env.get("SLURM_DISTRIBUTION", "block").lower())[0]
    if distribution in ("block", "", "*"):
        return deal_tasks(counts, sum(counts))
    if distribution == "cyclic":
        return deal_tasks(counts, 1)
    if distribution == "plane":
        return deal_tasks(counts, read_number(env, "SLURM_DIST_PLANESIZE") or sum(counts))
    if distribution != "arbitrary":
        raise ClusterError(
            f"SLURM_DISTRIBUTION={distribution!r} is not known: start with 'srun --distribution=block'"
        )
    try:
        words = re.split(r"[,\s]+(?![^\[]*\])", Path(env.get("SLURM_HOSTFILE", "")).read_text().strip())
    except OSError as error:
        raise ClusterError(
            f"SLURM_HOSTFILE={env.get('SLURM_HOSTFILE')!r} cannot be read ({error.strerror}), and nothing else says "
            "which rank an arbitrary distribution puts where: keep it where every node sees it, or start with "
            "'srun --distribution=block'"
        ) from None
    hosts = [host for word in words for host in expand_nodes(word)][: sum(counts)]
    if [hosts.count(node) for node in nodes] != list(counts):
        raise ClusterError(f"SLURM_HOSTFILE names {', '.join(hosts)}, but the step runs otherwise; unset it")
    return [nodes.index(host) for host in hosts]


def _expand_range(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ClusterError(f"range [{text}] of a node list: write it as in [1-3,08-11]")
        numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def _find_addresses(env: Mapping[str, str], nodes: Sequence[str]) -> dict[str, str]:
    """Finds where nodes are reached: cloud nodes by their aliases, others as Slurm reaches them."""
    found = re.findall(r"(?:^|,)([^:,]+):(\[[^\]]+\]|[^:,]+):", env.get("SLURM_NODE_ALIASES", ""))
    scontrol = shutil.which("scontrol", path=env.get("PATH", os.devnull))
    if not found and scontrol:
        command = [scontrol, "show", "node", "--oneliner", ",".join(nodes)]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # Then the names have to do.
            done = subprocess.run(
                command, env=dict(env), capture_output=True, text=True, timeout=_SCONTROL_SECS
            )
            found = re.findall(r"^NodeName=(\S+) .*?\bNodeAddr=(\S+)", done.stdout, re.MULTILINE)
    addresses = {name: address.strip("[]") for name, address in found}
    return {node: addresses.get(node, node) for node in nodes}


def _get(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ClusterError(f"{name} is missing: start with srun, and keep the variables that it sets")
    return env[name]
