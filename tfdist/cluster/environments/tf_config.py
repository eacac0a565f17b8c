"""The world in which somebody has set TF_CONFIG."""

import json
from collections.abc import Mapping

from tfdist.cluster.spec import Cluster, parse_tf_config

VARIABLE = "TF_CONFIG"


def detect(env: Mapping[str, str]) -> bool:
    """Tells whether TF_CONFIG is to be read: not if blank or an empty object; malformed text is, to see its error."""
    text = env.get(VARIABLE, "").strip()
    try:
        return bool(text) and json.loads(text) != {}
    except json.JSONDecodeError:
        return True


def build_cluster(env: Mapping[str, str], num_ps: int = 0) -> Cluster:
    """Reads TF_CONFIG.

    Raises:
        ClusterError: If TF_CONFIG is malformed or contradicts itself.
    """
    del num_ps  # TF_CONFIG says it
    return parse_tf_config(env[VARIABLE])
