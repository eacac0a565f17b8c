"""The world of Vertex AI where it sets CLUSTER_SPEC alone; its TF_CONFIG is read as any other."""

import json
from collections.abc import Mapping
from typing import Any

from tfdist.cluster.spec import EVALUATOR, Cluster, parse_tf_config

VARIABLE = "CLUSTER_SPEC"
_ROLES = {"workerpool0": "chief", "workerpool1": "worker", "workerpool2": "ps", "workerpool3": EVALUATOR}


def detect(env: Mapping[str, str]) -> bool:
    """Tells whether CLUSTER_SPEC describes worker pools."""
    return "workerpool0" in _read(env).get("cluster", ())


def build_cluster(env: Mapping[str, str], num_ps: int = 0) -> Cluster:
    """Takes the pools for chief, workers, ps and evaluators, as Vertex AI does in its TF_CONFIG.

    Raises:
        ClusterError: If it contradicts itself.
    """
    del num_ps  # the pools say it
    spec = _read(env)
    task = dict(spec.get("task") or {})
    task["type"] = _ROLES.get(task.get("type", ""), task.get("type"))
    pools = {_ROLES.get(pool, pool): hosts for pool, hosts in spec["cluster"].items()}
    return parse_tf_config(json.dumps({"cluster": pools, "task": task}))


def _read(env: Mapping[str, str]) -> dict[str, Any]:
    # The variable's name is anybody's: what has another form is not Vertex AI's.
    try:
        spec = json.loads(env.get(VARIABLE, ""))
    except json.JSONDecodeError:
        return {}
    return spec if isinstance(spec, dict) and isinstance(spec.get("cluster"), dict) else {}
