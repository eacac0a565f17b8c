import pytest

from tfdist.cluster import Cluster, Task
from tfdist.environments import detect_cluster
from tfdist.errors import ClusterError


@pytest.mark.parametrize("env", [{}, {"TF_CONFIG": " "}, {"TF_CONFIG": "{}"}])
def test_no_cluster_is_described(env):
    assert detect_cluster(env) is None


def test_tf_config_is_read():
    text = '{"cluster": {"worker": ["h:1", "h:2"]}, "task": {"type": "worker", "index": 1}}'
    cluster = Cluster(addresses={"worker": ("h:1", "h:2")}, task=Task("worker", 1))
    assert detect_cluster({"TF_CONFIG": text}) == cluster


def test_malformed_tf_config_is_an_error_and_not_ignored():
    with pytest.raises(ClusterError, match="not JSON"):
        detect_cluster({"TF_CONFIG": "{"})
