"""The launcher's answers to MPI's processes, word for word."""

import pytest

from tfdist.cluster.spec import Cluster
from tfdist.errors import ConfigError
from tfdist.launcher.job import Job, build_cluster, render_env
from tfdist.launcher.mpi.pmi import PmiServer, PmiWorld, render_mapping


def say(world, rank, *lines):
    return world.receive(rank, b"".join(line.encode() + b"\n" for line in lines))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (
            "cmd=init pmi_version=1 pmi_subversion=1",
            "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0",
        ),
        ("cmd=get_maxes", "cmd=maxes rc=0 kvsname_max=256 keylen_max=64 vallen_max=1024"),
        ("cmd=get_appnum", "cmd=appnum rc=0 appnum=0"),
        ("cmd=get_universe_size", "cmd=universe_size rc=0 size=2"),
        (
            "cmd=get kvsname=x key=PMI_process_mapping",
            "cmd=get_result rc=0 msg=success value=(vector,(0,1,2))",
        ),
        ("cmd=get kvsname=x key=unknown", "cmd=get_result rc=-1 msg=key_not_found"),
        ("cmd=finalize", "cmd=finalize_ack rc=0"),
    ],
)
def test_question_has_its_answer(question, answer):
    assert say(PmiWorld(["a", "a"]), 1, question) == [(1, answer.encode() + b"\n")]


def test_value_may_hold_spaces_and_signs_and_comes_cut_anywhere():
    world = PmiWorld(["a", "a"])
    assert world.receive(0, b"cmd=put kvsname=x key=card val") == []
    assert world.receive(0, b"ue=tcp://[::1]:1 a=b$\ncmd=get") == [(0, b"cmd=put_result rc=0 msg=success\n")]
    assert world.receive(0, b"_appnum\n") == [(0, b"cmd=appnum rc=0 appnum=0\n")]
    ((rank, text),) = say(world, 1, "cmd=get kvsname=x key=card")
    assert (rank, text) == (1, b"cmd=get_result rc=0 msg=success value=tcp://[::1]:1 a=b$\n")


def test_barrier_opens_when_all_are_there_and_closes_again():
    world = PmiWorld(["a"] * 3)
    for _ in range(2):
        assert say(world, 2, "cmd=barrier_in") == []
        assert say(world, 0, "cmd=barrier_in") == []
        opened = say(world, 1, "cmd=barrier_in")
        assert sorted(rank for rank, _ in opened) == [0, 1, 2]
        assert {text for _, text in opened} == {b"cmd=barrier_out rc=0\n"}


def test_two_tries_never_share_memory():
    names = [say(PmiWorld(["a"]), 0, "cmd=get_my_kvsname") for _ in range(2)]
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("hosts", "mapping"),
    [
        ("aaa", "(vector,(0,1,3))"),
        ("ab", "(vector,(0,1,1),(1,1,1))"),
        ("aabb", "(vector,(0,1,2),(1,1,2))"),
        ("aba", "(vector,(0,1,1),(1,1,1),(0,1,1))"),
    ],
)
def test_mapping_says_who_shares_a_host(hosts, mapping):
    assert render_mapping(hosts) == mapping


def test_server_answers_over_its_sockets_and_survives_a_dead_rank():
    server = PmiServer(PmiWorld(["a", "a"]))
    first, second = server.connect(0), server.connect(1)
    second.close()
    first.sendall(b"cmd=get_appnum\n")
    assert first.recv(100) == b"cmd=appnum rc=0 appnum=0\n"
    server.close()
    assert first.recv(100) == b""
    first.close()


def build_job(**changes):
    return Job(**{"command": ["true"], "num_workers": 2, "strategy": "multiworker", "env": {}} | changes)


def test_tasks_get_their_ranks_in_the_clusters_order():
    job = build_job()
    cluster = build_cluster(job, [1, 2])
    ranks = [render_env(job, cluster, task)["PMI_RANK"] for task in cluster.tasks]
    assert ranks == ["0", "1"]
    assert render_env(job, cluster, cluster.tasks[0])["PMI_SIZE"] == "2"


@pytest.mark.parametrize(
    ("hosts", "changes", "interface"),
    [
        (("127.0.0.1", "127.0.0.1"), {}, "lo"),
        (("127.0.0.1", "127.0.0.1"), {"env": {"UCX_NET_DEVICES": "mlx5_0:1"}}, None),
        (("192.0.2.1", "192.0.2.2"), {}, None),
        (("192.0.2.1", "192.0.2.2"), {"listen_interface": "eth1"}, "eth1"),
        (("127.0.0.1", "127.0.0.1"), {"exchange": "collective"}, None),
    ],
)
def test_mpi_listens_where_the_servers_do(hosts, changes, interface):
    cluster = Cluster(addresses={"worker": tuple(f"{host}:{2222 + i}" for i, host in enumerate(hosts))})
    env = render_env(build_job(**changes), cluster, cluster.tasks[0])
    assert env.get("UCX_NET_DEVICES") == interface


@pytest.mark.parametrize(
    "changes",
    [
        {"exchange": "collective"},
        {"num_workers": 1},
        {"elastic": "in_process"},
        {"strategy": "ps"},
    ],
)
def test_tasks_that_cannot_use_mpi_get_none(changes):
    job = build_job(**changes)
    cluster = build_cluster(job, range(1, job.num_tasks + 1))
    assert not [name for name in render_env(job, cluster, cluster.tasks[0]) if name.startswith("PMI_")]


@pytest.mark.parametrize(
    ("num_cores", "changes", "value"),
    [(1, {}, "1"), (2, {}, None), (1, {"env": {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "0"}}, None)],
)
def test_waiting_ranks_leave_their_core_where_cores_are_few(num_cores, changes, value):
    job = build_job(**changes)
    cluster = build_cluster(job, [1, 2])
    env = render_env(job, cluster, cluster.tasks[0], num_cores=num_cores)
    assert env.get("MPIR_CVAR_ENABLE_HEAVY_YIELD") == value


@pytest.mark.parametrize("exchange", ["auto", "collective"])
def test_rank_of_an_outer_mpi_is_not_handed_on(exchange):
    outer = {
        "PMIX_NAMESPACE": "a",
        "PMIX_RANK": "3",
        "PMI_FD": "9",
        "PMI_RANK": "3",
        "OMPI_COMM_WORLD_RANK": "3",
    }
    assert build_job(exchange=exchange, env=outer | {"PMIX_MCA_x": "y"}).env == {"PMIX_MCA_x": "y"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exchange": "smoke"}, "choose one of auto, collective, mpi"),
        ({"exchange": "mpi", "strategy": "ps"}, "only multiworker has it"),
        ({"exchange": "mpi", "elastic": "in_process"}, "choose 'restart'"),
    ],
)
def test_exchange_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_job(**changes)


def test_mpi_without_mpi4py_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not build_job().uses_mpi
    with pytest.raises(ConfigError, match=r"pip install 'tfdist\[mpi\]'"):
        build_job(exchange="mpi")


def test_workers_keep_their_memory_unless_the_user_says_otherwise():
    job = build_job(env={"MALLOC_TOP_PAD_": "0"})
    cluster = build_cluster(job, [1, 2])
    env = render_env(job, cluster, cluster.tasks[0])
    assert env["MALLOC_TRIM_THRESHOLD_"] == str(2**32)
    assert "MALLOC_TOP_PAD_" not in env
