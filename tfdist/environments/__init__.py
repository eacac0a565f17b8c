"""Finds out which cluster the surrounding world (a scheduler, a launcher, a person) has described.

Each module of this folder knows one world and offers `detect(env) -> bool` and `build_cluster(env) -> Cluster`;
`_ENVIRONMENTS` lists them, the most explicit first.
"""

from collections.abc import Mapping

from tfdist.cluster import Cluster
from tfdist.environments import tf_config

_ENVIRONMENTS = (tf_config,)


def detect_cluster(env: Mapping[str, str]) -> Cluster | None:
    """Builds the cluster that the environment describes.

    Args:
        env: The environment variables, usually `os.environ`.

    Returns:
        The cluster of the first world that is detected, or None if there is none.

    Raises:
        ClusterError: If a world is detected and its description contradicts itself.
    """
    for environment in _ENVIRONMENTS:
        if environment.detect(env):
            cluster: Cluster = environment.build_cluster(env)
            return cluster
    return None
