"""The world of Kubernetes: an Indexed Job or a StatefulSet behind a headless Service, or a JobSet.

Kubernetes tells a pod its name, and neither how many there are nor their Service: the pod's template adds
TFDIST_NUM_TASKS and TFDIST_SERVICE. A JobSet with jobs called chief, worker and ps has its own numbers,
TFDIST_NUM_WORKERS and TFDIST_NUM_PS. All pods have one port.
"""

from collections.abc import Mapping

from tfdist.cluster.environments.ranks import (
    NUM_PS_VARIABLE,
    PORT_VARIABLE,
    build_ranked_cluster,
    read_number,
)
from tfdist.cluster.spec import ROLES, Cluster, Task
from tfdist.errors import ClusterError

DEFAULT_PORT = 2222
NUM_TASKS_VARIABLE = "TFDIST_NUM_TASKS"
NUM_WORKERS_VARIABLE = "TFDIST_NUM_WORKERS"
SERVICE_VARIABLE = "TFDIST_SERVICE"


def detect(env: Mapping[str, str]) -> bool:
    """Tells whether this pod is one of several that know each other."""
    is_pod = "KUBERNETES_SERVICE_HOST" in env or "JOB_COMPLETION_INDEX" in env
    return is_pod and (_has_role(env) or read_number(env, NUM_TASKS_VARIABLE) > 1)


def build_cluster(env: Mapping[str, str], num_ps: int = 0) -> Cluster:
    """Names the pods as Kubernetes does.

    Raises:
        ClusterError: If the pod's name and number contradict each other.
    """
    port = read_number(env, PORT_VARIABLE, DEFAULT_PORT)
    if _has_role(env):
        return _build_jobset_cluster(env, port)
    name, _, index = env.get("HOSTNAME", "").rpartition("-")
    if not name or not index.isdigit() or env.get("JOB_COMPLETION_INDEX", index) != index:
        raise ClusterError(
            f"HOSTNAME={env.get('HOSTNAME')!r} with JOB_COMPLETION_INDEX={env.get('JOB_COMPLETION_INDEX')!r}: a pod of "
            "an Indexed Job or a StatefulSet is called NAME-INDEX; keep HOSTNAME, and do not use hostNetwork"
        )
    service = env.get(SERVICE_VARIABLE) or name
    hosts = [f"{name}-{i}.{service}" for i in range(read_number(env, NUM_TASKS_VARIABLE))]
    return build_ranked_cluster(hosts=hosts, rank=int(index), num_ps=num_ps, port=port)


def _has_role(env: Mapping[str, str]) -> bool:
    return env.get("REPLICATED_JOB_NAME") in ROLES and read_number(env, NUM_WORKERS_VARIABLE) > 0


def _build_jobset_cluster(env: Mapping[str, str], port: int) -> Cluster:
    """Each role is one replicated job with a pod for each task: SET-ROLE-0-INDEX."""
    jobset = env.get("JOBSET_NAME")
    if not jobset:
        raise ClusterError(
            "JOBSET_NAME is missing beside REPLICATED_JOB_NAME: set both from the pod's labels "
            "jobset.sigs.k8s.io/jobset-name and …/replicatedjob-name"
        )
    num_ps = read_number(env, NUM_PS_VARIABLE)
    counts = {"chief": int(num_ps > 0), "worker": read_number(env, NUM_WORKERS_VARIABLE), "ps": num_ps}
    service = env.get(SERVICE_VARIABLE) or jobset
    return Cluster(
        addresses={
            role: tuple(f"{jobset}-{role}-0-{i}.{service}:{port}" for i in range(count))
            for role, count in counts.items()
        },
        task=Task(env["REPLICATED_JOB_NAME"], read_number(env, "JOB_COMPLETION_INDEX")),
    )
