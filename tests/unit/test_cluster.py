import copy
import json
import logging
import pickle

import pytest

from tfdist.cluster.spec import (
    Cluster,
    Task,
    canonical_strategy,
    check_strategy,
    parse_tf_config,
    render_tf_config,
    split_address,
)
from tfdist.errors import ClusterError, ConfigError

PS_ADDRESSES = {"ps": ("h:4",), "worker": ("h:2", "h:3"), "chief": ("h:1",)}


def tf_config(cluster, task=None):
    return json.dumps({"cluster": cluster, "task": task or {"type": "worker", "index": 0}})


@pytest.mark.parametrize(
    "cluster",
    [
        Cluster(),
        Cluster(addresses={"worker": ("a:1",)}, task=Task("worker", 0)),
        Cluster(addresses=PS_ADDRESSES, task=Task("ps", 0)),
        Cluster(addresses=PS_ADDRESSES, task=Task("evaluator", 0)),
        Cluster(addresses={"worker": ("[::1]:1", "10.0.0.2:65535")}, task=Task("worker", 1)),
    ],
)
def test_tf_config_round_trip_is_exact(cluster):
    text = render_tf_config(cluster)
    assert parse_tf_config(text) == cluster
    assert render_tf_config(parse_tf_config(text)) == text


def test_rendered_tf_config_is_what_tensorflow_expects():
    text = render_tf_config(Cluster(addresses=PS_ADDRESSES, task=Task("worker", 1)))
    assert json.loads(text) == {
        "cluster": {"chief": ["h:1"], "worker": ["h:2", "h:3"], "ps": ["h:4"]},
        "task": {"type": "worker", "index": 1},
    }


def test_cluster_is_a_value():
    cluster = Cluster(addresses=PS_ADDRESSES, task=Task("chief", 0))
    twin = Cluster(addresses=dict(reversed(PS_ADDRESSES.items())), task=Task("chief", 0))
    assert cluster == twin and hash(cluster) == hash(twin)
    assert pickle.loads(pickle.dumps(cluster)) == cluster == copy.deepcopy(cluster)
    assert cluster != cluster.with_task(None)


def test_cluster_knows_its_tasks():
    cluster = Cluster(addresses=PS_ADDRESSES, task=Task("worker", 1))
    assert [str(task) for task in cluster.tasks] == ["chief:0", "worker:0", "worker:1", "ps:0"]
    assert (cluster.num_workers, cluster.num_ps) == (2, 1)
    assert cluster.address(Task("worker", 1)) == "h:3"
    assert cluster.chief == Task("chief", 0) and not cluster.is_chief
    assert not cluster.is_local and not cluster.is_single


def test_worker_zero_is_chief_where_nobody_is_named_chief():
    cluster = Cluster(addresses={"worker": ("h:1", "h:2")}, task=Task("worker", 0))
    assert cluster.is_chief and not cluster.with_task(Task("worker", 1)).is_chief
    assert Cluster().is_chief and Cluster().is_local and Cluster().is_single


def test_evaluator_is_left_out_with_a_warning(caplog):
    text = tf_config({"worker": ["h:1"], "evaluator": ["h:9"]}, {"type": "evaluator", "index": 0})
    with caplog.at_level(logging.WARNING, logger="tfdist"):
        cluster = parse_tf_config(text)
    assert "evaluator" not in cluster.addresses and cluster.task == Task("evaluator", 0)
    assert "hang" in caplog.text and not cluster.is_chief


def test_master_is_taken_for_chief_with_a_warning(caplog):
    text = tf_config({"master": ["h:1"], "worker": ["h:2"]}, {"type": "master", "index": 0})
    with caplog.at_level(logging.WARNING, logger="tfdist"):
        cluster = parse_tf_config(text)
    assert cluster.task == Task("chief", 0) and cluster.addresses["chief"] == ("h:1",)
    assert "'master'" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'cluster': 1}", ["not JSON", "double quotes"]),
        ("[1]", ["not an object"]),
        ("7", ["not an object"]),
        (json.dumps({"cluster": {"worker": ["h:1"]}}), ["no 'task'", '"type": "worker"']),
        (tf_config({"worker": ["h:1"]}, {"type": "worker"}), ["without type and index"]),
        (tf_config({"worker": ["h:1"]}, "worker"), ["without type and index"]),
        (tf_config(["h:1"]), ["'cluster'", "not an object"]),
        (tf_config({"worker": "h:1"}), ["not a list"]),
        (tf_config({"worker": [1]}), ["not a list"]),
        (tf_config({"worker": ["host"]}), ["'host'", "no port", "host:2222"]),
        (tf_config({"worker": ["[::1]"]}), ["no port"]),
        (tf_config({"worker": ["host:http"]}), ["'http'", "1 to 65535"]),
        (tf_config({"worker": ["host:0"]}), ["'0'", "1 to 65535"]),
        (tf_config({"worker": ["host:65536"]}), ["'65536'", "1 to 65535"]),
        (tf_config({"worker": ["grpc://host:1"]}), ["without a scheme"]),
        (tf_config({"worker": [":1"]}), ["not a host name"]),
        (tf_config({"worker": ["h:1"], "ps": ["h:1"]}), ["'h:1'", "worker:0", "ps:0", "change one port"]),
        (tf_config({"worker": ["h:1"]}, {"type": "worker", "index": 1}), ["index 1", "at most 0"]),
        (tf_config({"worker": ["h:1"]}, {"type": "worker", "index": -1}), ["-1", "from 0"]),
        (tf_config({"worker": ["h:1"]}, {"type": "worker", "index": True}), ["True", "from 0"]),
        (tf_config({"worker": ["h:1"]}, {"type": "ps", "index": 0}), ["ps:0", "not in the cluster"]),
        (tf_config({"workers": ["h:1"]}), ["'workers'", "did you mean 'worker'?"]),
        (tf_config({"worker": ["h:1"]}, {"type": "cheif", "index": 0}), ["did you mean 'chief'?"]),
        (tf_config({"chief": ["h:1"], "master": ["h:2"]}), ["both 'chief' and 'master'"]),
        (tf_config({"chief": ["h:1", "h:2"], "worker": ["h:3"]}), ["2 chief", "one chief"]),
    ],
)
def test_bad_tf_config_is_named_in_one_line(text, said):
    with pytest.raises(ClusterError) as caught:
        parse_tf_config(text)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_index_may_be_a_string_as_tensorflow_allows():
    assert parse_tf_config(tf_config({"worker": ["h:1"]}, {"type": "worker", "index": "0"})).task.index == 0


def test_cluster_without_task_has_no_tf_config():
    with pytest.raises(ClusterError, match="with_task"):
        render_tf_config(Cluster(addresses=PS_ADDRESSES))


def test_ipv6_address_is_split():
    assert split_address("[fe80::1]:2222") == ("fe80::1", 2222)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("mwms", "multiworker"),
        ("multi_worker_mirrored", "multiworker"),
        ("multi-worker", "multiworker"),
        ("MultiWorker", "multiworker"),
        ("parameter_server", "ps"),
        ("parameter_server_strategy", "ps"),
        ("pss", "ps"),
        ("PS", "ps"),
        ("one-device", "one_device"),
        ("mirrored", "mirrored"),
    ],
)
def test_strategy_has_one_name(name, canonical):
    assert canonical_strategy(name) == canonical


def test_unknown_strategy_names_the_nearest():
    with pytest.raises(ConfigError, match="'mirored'; did you mean 'mirrored'"):
        canonical_strategy("mirored")


@pytest.mark.parametrize(
    ("addresses", "strategy", "said"),
    [
        ({"worker": ("h:1",), "ps": ("h:2",)}, "ps", "needs a chief"),
        ({"chief": ("h:1",), "ps": ("h:2",)}, "ps", "needs a worker"),
        ({"chief": ("h:1",), "worker": ("h:2",)}, "ps", "needs a ps"),
        ({}, "ps", "no tasks"),
        (PS_ADDRESSES, "multiworker", "no use for ps"),
        (PS_ADDRESSES, "mirrored", "no use for ps"),
        ({"worker": ("h:1", "h:2")}, "mirrored", "one process"),
        ({"chief": ("h:1",), "worker": ("h:2",)}, "one_device", "one process"),
    ],
)
def test_strategy_that_does_not_fit_is_refused(addresses, strategy, said):
    with pytest.raises(ClusterError, match=said):
        check_strategy(Cluster(addresses=addresses), strategy)


@pytest.mark.parametrize(
    ("addresses", "strategy"),
    [
        (PS_ADDRESSES, "ps"),
        ({"worker": ("h:1", "h:2")}, "mwms"),
        ({"chief": ("h:1",), "worker": ("h:2",)}, "multiworker"),
        ({"worker": ("h:1",)}, "mirrored"),
        ({}, "one_device"),
        ({}, "multiworker"),
    ],
)
def test_strategy_that_fits_passes(addresses, strategy):
    check_strategy(Cluster(addresses=addresses), strategy)
