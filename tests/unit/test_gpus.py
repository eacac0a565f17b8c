"""Which of a host's GPUs a task takes. This machine has none: nvidia-smi is a script that names some."""

import os

import pytest

from tfdist.cluster.gpus import deal_gpus, list_gpus
from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import ConfigError

LAUNCHED = {"TFDIST_LAUNCHED": "1"}


def cluster(task, *, hosts=("a", "a", "b"), ps=()):
    addresses = {"worker": tuple(f"{host}:{2000 + i}" for i, host in enumerate(hosts))}
    if ps:
        addresses |= {"chief": ("a:1999",), "ps": tuple(f"{host}:{3000 + i}" for i, host in enumerate(ps))}
    return Cluster(addresses=addresses, task=task)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi in front of PATH that knows so many GPUs."""

    def write(count):
        script = tmp_path / "nvidia-smi"
        script.write_text("#!/bin/sh\n" + "".join(f"echo {i}\n" for i in range(count)))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return write


def deal(task, env=LAUNCHED, strategy="multiworker", **options):
    own = deal_gpus(env, cluster(task, **options), strategy)
    return own.visible, own.is_shared


def test_workers_of_a_host_divide_its_gpus(smi):
    smi(4)
    assert deal(Task("worker", 0)) == ("0,1", False)
    assert deal(Task("worker", 1)) == ("2,3", False)
    assert deal(Task("worker", 2)) == ("0,1,2,3", False)  # alone on its host


def test_those_that_are_too_few_are_shared_in_turn(smi):
    smi(2)
    hosts = ("a",) * 5
    assert [deal(Task("worker", i), hosts=hosts) for i in range(5)] == [(str(i % 2), True) for i in range(5)]


def test_under_ps_only_workers_have_any(smi):
    smi(2)
    options = {"strategy": "ps", "ps": ("a", "b")}
    for task in (Task("chief", 0), Task("ps", 0), Task("ps", 1)):
        assert deal(task, **options) == ("-1", False)
    assert deal(Task("worker", 1), **options) == ("1", False)


def test_number_for_each_worker_is_kept(smi):
    smi(4)
    assert deal(Task("worker", 1), {**LAUNCHED, "TFDIST_GPUS_PER_WORKER": "1"}) == ("1", False)
    assert deal(Task("worker", 1), {**LAUNCHED, "TFDIST_GPUS_PER_WORKER": "0"}) == ("-1", False)
    with pytest.raises(ConfigError, match="ask for at most 2, or take fewer workers"):
        deal(Task("worker", 1), {**LAUNCHED, "TFDIST_GPUS_PER_WORKER": "3"})


def test_launcher_deals_out_those_that_it_was_given(smi):
    smi(8)
    env = {**LAUNCHED, "CUDA_VISIBLE_DEVICES": "5,GPU-ab12"}
    assert deal(Task("worker", 1), env) == ("GPU-ab12", False)


@pytest.mark.parametrize(
    "env",
    [
        {"CUDA_VISIBLE_DEVICES": "3"},  # by hand, with TF_CONFIG alone
        {"SLURM_PROCID": "1", "SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "0,1"},
        {"TFDIST_GPUS": "own", "CUDA_VISIBLE_DEVICES": "3"},  # dealt already: the cluster is formed anew
    ],
)
def test_what_was_dealt_before_stays(smi, env):
    smi(4)
    assert deal(Task("worker", 1), env) == (None, False)


def test_tasks_of_slurm_and_mpi_that_see_all_divide_them(smi):
    smi(4)
    for starter in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        env = {starter: "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
        assert deal(Task("worker", 1), env) == ("2,3", False)


def test_machine_without_gpus_changes_nothing(smi):
    smi(0)
    assert deal(Task("worker", 0)) == (None, False)
    assert deal_gpus({}, Cluster(), "one_device").visible is None
    assert list_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == list_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
