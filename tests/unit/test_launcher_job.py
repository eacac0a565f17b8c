import json
import shlex

import pytest

from tfdist.cluster.spec import Task
from tfdist.errors import ClusterError, ConfigError
from tfdist.launcher import job
from tfdist.launcher.job import Job, build_cluster, render_dry_run, render_env

PS_JOB = {"command": ["true"], "num_workers": 2, "num_ps": 1, "strategy": "parameter_server", "env": {}}


def env_of(task="worker:0", **changes):
    made = Job(**{"command": ["true"], "env": {}, **changes})
    cluster = build_cluster(made, range(5000, 5000 + made.num_tasks))
    kind, _, index = task.partition(":")
    return render_env(made, cluster, Task(kind, int(index)))


def test_ps_job_has_a_chief_of_its_own():
    cluster = build_cluster(Job(**PS_JOB), [1, 2, 3, 4])
    assert [f"{task} {cluster.address(task)}" for task in cluster.tasks] == [
        "chief:0 127.0.0.1:1", "worker:0 127.0.0.1:2", "worker:1 127.0.0.1:3", "ps:0 127.0.0.1:4",
    ]  # fmt: skip


def test_sync_job_has_workers_only():
    cluster = build_cluster(Job(command=["true"], num_workers=3, strategy="mwms"), [1, 2, 3])
    assert list(cluster.addresses) == ["worker"] and cluster.chief == Task("worker", 0)


def test_ps_strategy_gets_a_ps_by_default():
    assert Job(command=["true"], strategy="ps").num_ps == 1
    assert Job(command=["true"]).num_ps == 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"command": []}, ConfigError),
        ({"num_workers": 0}, ConfigError),
        ({"num_ps": -1}, ConfigError),
        ({"grace_secs": float("nan")}, ConfigError),
        ({"threads_per_task": 0}, ConfigError),
        ({"strategy": "nonsense"}, ConfigError),
        ({"strategy": "mirrored", "num_workers": 2}, ClusterError),
        ({"strategy": "multiworker", "num_ps": 1}, ClusterError),
        ({"strategy": "ps", "num_ps": 0}, ClusterError),
    ],
)
def test_impossible_job_is_refused(changes, error):
    with pytest.raises(error):
        Job(**{"command": ["true"], **changes})


def test_task_environment_says_who_it_is():
    env = env_of("worker:1", num_workers=2, num_ps=1, strategy="pss", run_dir="/r")
    assert json.loads(env["TF_CONFIG"])["task"] == {"type": "worker", "index": 1}
    assert env["GRPC_FAIL_FAST"] == "use_caller"
    assert (env["TFDIST_STRATEGY"], env["TFDIST_RUN_DIR"], env["TFDIST_LAUNCHED"]) == ("ps", "/r", "1")
    assert (env["TF_CPP_MIN_LOG_LEVEL"], env["PYTHONUNBUFFERED"]) == ("2", "1")
    assert env["TF_ENABLE_ONEDNN_OPTS"] == "1"
    assert not {"TFDIST_STRATEGY", "TFDIST_RUN_DIR"} & set(env_of())


@pytest.mark.parametrize(
    ("cores", "workers", "num_ps", "intra", "inter"),
    [
        (16, 4, 0, "4", "4"),
        (16, 2, 1, "8", "8"),
        (2, 4, 0, "1", "2"),
        (2, 2, 1, "1", "4"),
        (6, 4, 2, "1", "4"),
    ],
)
def test_cores_are_divided(monkeypatch, cores, workers, num_ps, intra, inter):
    monkeypatch.setattr(job, "count_cores", lambda: cores)
    env = env_of(num_workers=workers, num_ps=num_ps)
    assert (env["OMP_NUM_THREADS"], env["TF_NUM_INTRAOP_THREADS"]) == (intra, intra)
    assert env["TF_NUM_INTEROP_THREADS"] == inter
    assert ("TF_GRPC_WORKER_CACHE_THREADS" in env) == (cores < 4 and num_ps > 0)


def test_what_the_user_set_stays():
    mine = {"OMP_NUM_THREADS": "7", "TF_NUM_INTEROP_THREADS": "9", "TF_CPP_MIN_LOG_LEVEL": "0"}
    mine["TF_ENABLE_ONEDNN_OPTS"] = "0"
    assert not set(mine) & set(env_of(env=mine))


def test_threads_flag_wins_over_the_environment():
    env = env_of(env={"OMP_NUM_THREADS": "7"}, threads_per_task=3)
    assert env["OMP_NUM_THREADS"] == env["TF_NUM_INTRAOP_THREADS"] == "3"


def test_grpc_does_not_ask_a_proxy_for_loopback():
    assert env_of(env={"https_proxy": "p", "no_proxy": "a.b"})["no_grpc_proxy"] == "a.b,127.0.0.1"
    assert "no_grpc_proxy" not in env_of()


def test_dry_run_can_be_pasted():
    made = Job(**{**PS_JOB, "command": ["python", "my script.py", "--x=$HOME"], "run_dir": "/a b"})
    text = render_dry_run(made, build_cluster(made, [1, 2, 3, 4]))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 4
    words = shlex.split(lines[-1])
    assert words[0] == "env" and words[-3:] == ["python", "my script.py", "--x=$HOME"]
    assert "TFDIST_RUN_DIR=/a b" in words
    assert any(word.startswith('TF_CONFIG={"cluster"') and '"ps", "index": 0' in word for word in words)
