"""Which of a host's GPUs are a task's own. Nothing here loads TensorFlow, or starts CUDA."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Mapping

from tfdist.cluster.environments.ranks import read_number
from tfdist.cluster.spec import Cluster, Task, split_address
from tfdist.errors import ConfigError

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
PER_WORKER_VARIABLE = "TFDIST_GPUS_PER_WORKER"
# Set in a task that has been dealt its GPUs: "own", or "shared" with other workers.
DEALT_VARIABLE = "TFDIST_GPUS"
NONE = "-1"
# Those of a scheduler that gives each task its own by itself.
_DEALT_BY_SLURM = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")
# Those of starters whose tasks on a host all have the same environment.
_STARTERS = ("TFDIST_LAUNCHED", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SMI_SECS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnGpus:
    """What a task may use.

    Attributes:
        visible: For CUDA_VISIBLE_DEVICES; None leaves that as it is.
        is_shared: Whether other workers use the same ones.
    """

    visible: str | None = None
    is_shared: bool = False


def list_gpus(env: Mapping[str, str]) -> list[str]:
    """Returns the GPUs that a process with this environment would see, as CUDA_VISIBLE_DEVICES names them."""
    named = env.get(VISIBLE_VARIABLE)
    if named is not None:
        words = [word.strip() for word in named.split(",")]
        return [word for word in words if word not in ("", NONE)]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_SMI_SECS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def deal_gpus(env: Mapping[str, str], cluster: Cluster, strategy: str) -> OwnGpus:
    """Deals a host's GPUs to its workers, by their order in the cluster; tasks that do not compute have none.

    What a scheduler has dealt already, or the user by CUDA_VISIBLE_DEVICES without a launcher, stays. The strategy goes
    by its canonical name.

    Raises:
        ConfigError: If TFDIST_GPUS_PER_WORKER asks for more than there are.
    """
    if cluster.task is None or cluster.task not in cluster.tasks or cluster.is_local:
        return OwnGpus()
    computing = [t for t in cluster.tasks if t.type == "worker" or (t.type == "chief" and strategy != "ps")]
    if cluster.task not in computing:
        return OwnGpus(visible=NONE)
    if DEALT_VARIABLE in env:
        return OwnGpus(is_shared=env[DEALT_VARIABLE] == "shared")
    mates = [t for t in computing if _host(cluster, t) == _host(cluster, cluster.task)]
    is_chosen = VISIBLE_VARIABLE in env and not any(env.get(name) for name in _STARTERS)
    if is_chosen or any(env.get(name) for name in _DEALT_BY_SLURM):
        return OwnGpus()
    return _deal(list_gpus(env), mates.index(cluster.task), len(mates), env)


def _deal(gpus: list[str], place: int, num_workers: int, env: Mapping[str, str]) -> OwnGpus:
    asked = read_number(env, PER_WORKER_VARIABLE) if env.get(PER_WORKER_VARIABLE) else None
    if asked == 0:
        return OwnGpus(visible=NONE)
    if asked is not None and asked * num_workers > len(gpus):
        raise ConfigError(
            f"gpus_per_worker={asked} for {num_workers} workers of this host, which has {len(gpus)} GPUs: ask for at "
            f"most {len(gpus) // num_workers}, or take fewer workers"
        )
    if not gpus:
        return OwnGpus()
    if asked is None and len(gpus) < num_workers:
        return OwnGpus(visible=gpus[place % len(gpus)], is_shared=True)
    each = asked or len(gpus) // num_workers
    return OwnGpus(visible=",".join(gpus[place * each : (place + 1) * each]))


def _host(cluster: Cluster, task: Task) -> str:
    return split_address(cluster.address(task))[0]
