"""The world in which somebody has set TF_CONFIG."""

import json
from collections.abc import Mapping

from tfdist.cluster.spec import Cluster, parse_tf_config

VARIABLE = "TF_CONFIG"


def detect(env: Mapping[str, str]) -> bool:
    """Tells whether TF_CONFIG describes something; blank or an empty object does not.

    Args:
        env: The environment variables.

    Returns:
        True if TF_CONFIG is to be read; malformed text is, so that its error is seen.
    """
    text = env.get(VARIABLE, "").strip()
    try:
        return bool(text) and json.loads(text) != {}
    except json.JSONDecodeError:
        return True


def build_cluster(env: Mapping[str, str], num_ps: int = 0) -> Cluster:
    """Reads TF_CONFIG.

    Args:
        env: The environment variables.
        num_ps: Not asked for: TF_CONFIG says it.

    Returns:
        The cluster, with this process as its task.

    Raises:
        ClusterError: If TF_CONFIG is malformed or contradicts itself.
    """
    del num_ps
    return parse_tf_config(env[VARIABLE])
