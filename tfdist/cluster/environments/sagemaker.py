"""The world of SageMaker's training toolkit: one task for each host."""

import json
from collections.abc import Mapping

from tfdist.cluster.environments.ranks import PORT_VARIABLE, build_ranked_cluster, read_number
from tfdist.cluster.spec import Cluster
from tfdist.errors import ClusterError

_DEFAULT_PORT = 2222


def detect(env: Mapping[str, str]) -> bool:
    """Tells whether SM_HOSTS names several hosts."""
    return "SM_CURRENT_HOST" in env and len(_read_hosts(env)) > 1


def build_cluster(env: Mapping[str, str], num_ps: int = 0) -> Cluster:
    """Takes the hosts in their order.

    Raises:
        ClusterError: If this host is not among them.
    """
    hosts = _read_hosts(env)
    if env["SM_CURRENT_HOST"] not in hosts:
        raise ClusterError(f"SM_CURRENT_HOST={env['SM_CURRENT_HOST']!r} is not in SM_HOSTS={env['SM_HOSTS']}")
    port = read_number(env, PORT_VARIABLE, _DEFAULT_PORT)
    rank = hosts.index(env["SM_CURRENT_HOST"])
    return build_ranked_cluster(hosts=hosts, rank=rank, num_ps=num_ps, port=port)


def _read_hosts(env: Mapping[str, str]) -> list[str]:
    try:
        hosts = json.loads(env.get("SM_HOSTS") or "[]")
    except json.JSONDecodeError:
        hosts = None
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise ClusterError(f"SM_HOSTS={env['SM_HOSTS']!r}: it is a JSON list of host names; correct it")
    return hosts
