"""Finds out which cluster the surrounding world (a scheduler, a launcher, a person) has described.

Each module that `_ENVIRONMENTS` lists knows one world and offers `detect(env) -> bool` and
`build_cluster(env, num_ps) -> Cluster`, with this process as its task; the most explicit is asked first. Where a world
only counts its tasks, `num_ps` of them hold variables.
"""

import functools
import logging
from collections.abc import Mapping

from tfdist.cluster.environments import kubernetes, mpi, sagemaker, slurm, tf_config, vertex
from tfdist.cluster.environments.ranks import read_num_ps
from tfdist.cluster.spec import Cluster

# mpirun before Slurm, in whose allocation it starts its own tasks, by one of Slurm's on each node.
_ENVIRONMENTS = (tf_config, vertex, sagemaker, mpi, slurm, kubernetes)
_log = logging.getLogger("tfdist")


def detect_cluster(
    env: Mapping[str, str], *, strategy: str | None = None, num_ps: int | None = None
) -> Cluster | None:
    """Builds the cluster that the environment describes.

    Args:
        env: The environment variables, usually `os.environ`.
        strategy: For which roles are dealt where tasks have none yet; None takes TFDIST_STRATEGY.
        num_ps: Tasks that then hold variables under `ps`; None takes TFDIST_NUM_PS, or 1.

    Returns:
        The cluster of the first world that is detected, or None if there is none.

    Raises:
        ClusterError: If a world is detected and its description contradicts itself, or has too few tasks.
    """
    for environment in _ENVIRONMENTS:
        if environment.detect(env):
            cluster: Cluster = environment.build_cluster(env, read_num_ps(env, strategy, num_ps))
            return cluster
    if unused := slurm.describe_unused(env):
        _warn_once(unused)
    return None


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning(text)
