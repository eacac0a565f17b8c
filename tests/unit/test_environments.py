"""Each world's variables, as it really sets them, and the cluster that they describe."""

import json
import logging
import socket
import threading

import pytest

from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.environments.mpi import find_coordinator
from tfdist.cluster.environments.slurm import deal_tasks, expand_nodes, parse_tasks_per_node
from tfdist.cluster.rendezvous import meet_ranks
from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import ClusterError

# What srun of Slurm 22.05 sets, `srun -N2 -n4`: three tasks on the first node.
SLURM = {
    "SLURM_JOB_ID": "40",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "0,1,2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[9-10]",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_JOB_NUM_NODES": "2",
}
SLURM_PORT = 10_000 + 7 * 40 * 13 % 340 * 64
# mpirun of Open MPI 4.1, and mpiexec of MPICH 4.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "PMIX_NAMESPACE": "1630273537",
    "OMPI_MCA_orte_hnp_uri": "1630273536.0;tcp://192.0.2.2,198.51.100.7:35823;tcp6://[fd00::2]:41339",
    "OMPI_MCA_orte_local_daemon_uri": "1630273536.0;tcp://192.0.2.2,198.51.100.7:35823",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "9"}
INDEXED_JOB = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "HOSTNAME": "my-run-1",
    "JOB_COMPLETION_INDEX": "1",
    "TFDIST_NUM_TASKS": "3",
    "TFDIST_SERVICE": "pods",
}
JOBSET = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "HOSTNAME": "run-worker-0-1",
    "JOBSET_NAME": "run",
    "REPLICATED_JOB_NAME": "worker",
    "JOB_COMPLETION_INDEX": "1",
    "TFDIST_NUM_WORKERS": "2",
    "TFDIST_NUM_PS": "1",
}
SAGEMAKER = {"SM_HOSTS": '["algo-1", "algo-2", "algo-3"]', "SM_CURRENT_HOST": "algo-2"}


def workers(*addresses, index):
    return Cluster(addresses={"worker": addresses}, task=Task("worker", index))


def hosts_of(cluster):
    """Role → hosts, without ports."""
    return {role: [a.rpartition(":")[0] for a in addresses] for role, addresses in cluster.addresses.items()}


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"TF_CONFIG": " "},
        {"TF_CONFIG": "{}"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOSTNAME": "web-6d4cf56db6-7xqzk"},
        {"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"},
        {"CLUSTER_SPEC": "somebody's own"},
    ],
)
def test_no_cluster_is_described(env):
    assert detect_cluster(env) is None


def test_tf_config_is_read():
    text = '{"cluster": {"worker": ["h:1", "h:2"]}, "task": {"type": "worker", "index": 1}}'
    cluster = Cluster(addresses={"worker": ("h:1", "h:2")}, task=Task("worker", 1))
    assert detect_cluster({"TF_CONFIG": text}) == cluster
    # It goes before everything else, and no roles are dealt in it.
    assert detect_cluster({"TF_CONFIG": text, **SLURM, **OPEN_MPI}, strategy="ps", num_ps=1) == cluster


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"task": {"type": "worker", "index": 1}}', "or take the task out"),
        (
            '{"sparseCluster": {"worker": {"1": "h:1"}}, "task": {"type": "worker", "index": 1}}',
            "enableDynamicWorker",
        ),
    ],
)
def test_one_of_several_never_trains_alone(text, said):
    with pytest.raises(ClusterError, match=said):
        detect_cluster({"TF_CONFIG": text})


def test_malformed_tf_config_is_an_error_and_not_ignored():
    with pytest.raises(ClusterError, match="not JSON"):
        detect_cluster({"TF_CONFIG": "{"})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", "n1"),
        ("n[9-10]", "n9 n10"),  # in this order, not as strings
        ("rack[0-1]n[0-1],z", "rack0n0 rack0n1 rack1n0 rack1n1 z"),
        ("b[08-11,3],gpu-[1,3]-ib", "b08 b09 b10 b11 b3 gpu-1-ib gpu-3-ib"),
    ],
)
def test_node_list_is_expanded(text, names):
    assert expand_nodes(text) == names.split()


@pytest.mark.parametrize("text", ["n[1-", "n[a-b]", "n1]", "n[1-2-3]"])
def test_malformed_node_list_is_an_error(text):
    with pytest.raises(ClusterError, match="correct it|write it"):
        expand_nodes(text)


def test_tasks_per_node_are_parsed():
    assert parse_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ClusterError, match="Slurm writes it"):
        parse_tasks_per_node("2x3")


# What `srun -N2 -n4 -m …` of Slurm 22.05 did.
@pytest.mark.parametrize(
    ("counts", "size", "places"),
    [([3, 1], 4, [0, 0, 0, 1]), ([3, 1], 1, [0, 1, 0, 0]), ([4, 1], 2, [0, 0, 1, 0, 0])],
)
def test_tasks_are_dealt_to_nodes(counts, size, places):
    assert deal_tasks(counts, size) == places


@pytest.mark.parametrize(
    ("distribution", "own", "hosts"),
    [
        ({}, {}, "n9 n9 n9 n10"),
        ({"SLURM_DISTRIBUTION": "block,nopack"}, {}, "n9 n9 n9 n10"),
        ({"SLURM_DISTRIBUTION": "cyclic:block"}, {"SLURM_GTIDS": "0,2,3"}, "n9 n10 n9 n9"),
        (
            {"SLURM_DISTRIBUTION": "plane", "SLURM_DIST_PLANESIZE": "2"},
            {"SLURM_GTIDS": "0,1,3"},
            "n9 n9 n10 n9",
        ),
    ],
)
def test_slurm_step_is_read(distribution, own, hosts):
    cluster = detect_cluster(SLURM | distribution | own)
    assert hosts_of(cluster) == {"worker": hosts.split()}
    # The first on each node has the job's port, the others the next ones.
    assert [a for a in cluster.addresses["worker"] if "n9" in a] == [f"n9:{SLURM_PORT + i}" for i in range(3)]
    assert f"n10:{SLURM_PORT}" in cluster.addresses["worker"]
    assert cluster.task == Task("worker", 0)


def test_slurm_arbitrary_distribution_is_read_from_its_file(tmp_path):
    env = SLURM | {"SLURM_DISTRIBUTION": "arbitrary", "SLURM_GTIDS": "1,2,3"}
    with pytest.raises(ClusterError, match="SLURM_HOSTFILE=None cannot be read"):
        detect_cluster(env)
    env |= {"SLURM_PROCID": "1", "SLURM_HOSTFILE": str(tmp_path / "hosts")}
    (tmp_path / "hosts").write_text("n10\nn[9-9],n9\nn9\n")
    assert hosts_of(detect_cluster(env)) == {"worker": ["n10", "n9", "n9", "n9"]}
    (tmp_path / "hosts").write_text("n9\nn10\nn10\nn9\n")
    with pytest.raises(ClusterError, match="the step runs otherwise"):
        detect_cluster(env)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"SLURM_GTIDS": "0,2,3"}, "srun --distribution=block"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, "must agree"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is missing"),
        ({"SLURM_DISTRIBUTION": "spiral"}, "'spiral' is not known"),
        ({"SLURM_PROCID": "x"}, "whole number"),
    ],
)
def test_slurm_step_that_contradicts_itself_is_an_error(wrong, message):
    with pytest.raises(ClusterError, match=message):
        detect_cluster(SLURM | wrong)


def test_slurm_nodes_of_a_cloud_are_reached_at_their_addresses():
    cluster = detect_cluster(SLURM | {"SLURM_NODE_ALIASES": "n9:10.0.0.9:a,n10:[fd00::10]:b"})
    assert cluster.addresses["worker"][0] == f"10.0.0.9:{SLURM_PORT}"
    assert cluster.addresses["worker"][3] == f"[fd00::10]:{SLURM_PORT}"


def test_slurm_jobs_that_follow_each_other_have_their_own_ports():
    ports = [
        detect_cluster(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        .addresses["worker"][0]
        .rpartition(":")[2]
        for job in range(40, 60)
        for step in range(4)
    ]
    assert len(set(ports)) == len(ports)
    assert all(10_000 <= int(port) < 32_768 - 64 for port in ports)
    assert "n9:7000" in detect_cluster(SLURM | {"TFDIST_PORT": "7000"}).addresses["worker"]


def test_srun_that_was_not_used_is_said_once(caplog):
    """In an sbatch script there are SLURM_PROCID and the like, and no step."""
    script = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")}
    with caplog.at_level(logging.WARNING, logger="tfdist"):
        assert detect_cluster(script) is None
        assert detect_cluster(script) is None
        assert detect_cluster(script | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}) is None
    (record,) = caplog.records
    assert "allocated 4 tasks" in record.message and "srun python -m tfdist.train" in record.message
    assert "\n" not in record.message


@pytest.mark.parametrize(("env", "size"), [(OPEN_MPI, 3), (MPICH, 2)])
def test_mpirun_on_one_machine_is_read(env, size):
    cluster = detect_cluster(env)
    assert cluster.task == Task("worker", 1)
    assert hosts_of(cluster) == {"worker": ["127.0.0.1"] * size}
    assert len(set(cluster.addresses["worker"])) == size


def test_mpirun_inside_a_slurm_allocation_goes_before_slurm():
    """On other nodes a step of Slurm's, with a task for each node, starts mpirun's own."""
    inside = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,1", "SLURM_STEP_NUM_TASKS": "2"}
    for env in (OPEN_MPI, MPICH):
        assert detect_cluster(inside | env) == detect_cluster(env)
    # srun --mpi=pmi2
    assert detect_cluster(SLURM | {"PMI_RANK": "0", "PMI_SIZE": "4"}) == detect_cluster(SLURM)


def test_mpirun_on_several_hosts_meets_where_mpirun_runs():
    env = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert find_coordinator(env, 7) == (("192.0.2.2", 7), ("198.51.100.7", 7))
    assert find_coordinator(env | {"TFDIST_COORDINATOR": "h:9"}, 7) == (("h", 9),)
    elsewhere = env | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_orte_local_daemon_uri": "1.1;tcp://192.0.2.3:5"}
    for unknown in (elsewhere, MPICH | {"MPI_LOCALNRANKS": "1"}):
        with pytest.raises(ClusterError, match="TFDIST_COORDINATOR=HOST:2222"):
            detect_cluster(unknown)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connect(place):
    """Connects as soon as somebody listens."""
    while True:
        try:
            return socket.create_connection(place, timeout=5)
        except ConnectionRefusedError:
            continue


def test_ranks_meet_and_learn_all_hosts():
    """Strangers and other jobs are sent away; a rank that comes before rank 0 waits for it."""
    places = (("127.0.0.1", free_port()),)
    found = {}

    def meet(rank):
        found[rank] = meet_ranks(places=places, job="a", rank=rank, size=3, timeout_secs=20)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for greeting in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"job": "b", "rank": 2}\n',
        b'{"job": "a", "rank": 7}\n',
        b"",
    ):
        with connect(places[0]) as connection:
            connection.sendall(greeting)
    meet(2)
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), ("127.0.0.1",) * 3)


def test_hosts_are_told_by_rank_and_not_as_they_come():
    place = ("127.0.0.1", free_port())
    wait = {"places": (place,), "job": "order", "rank": 0, "size": 3, "timeout_secs": 20}
    thread = threading.Thread(target=meet_ranks, kwargs=wait)
    thread.start()
    connect(place).close()
    last, first = (socket.create_connection(place, 5, (f"127.0.0.{n}", 0)) for n in (3, 2))
    with last, first:
        for rank, visitor in ((2, last), (1, first)):
            visitor.sendall(json.dumps({"job": "order", "rank": rank}).encode() + b"\n")
        told = [json.loads(visitor.makefile().readline()) for visitor in (first, last)]
    thread.join()
    assert told == [["127.0.0.1", "127.0.0.2", "127.0.0.3"]] * 2


def test_ranks_that_do_not_meet_say_who_and_where():
    port = free_port()
    places = (("127.0.0.1", port),)
    with pytest.raises(ClusterError, match="rank 1, 2 did not come"):
        meet_ranks(places=places, job="late", rank=0, size=3, timeout_secs=0.3)
    with pytest.raises(ClusterError, match=f"rank 1 has not met rank 0 at 127.0.0.1:{port} within 0.3 s"):
        meet_ranks(places=places, job="late", rank=1, size=3, timeout_secs=0.3)
    with (
        socket.create_server(("", port)),
        pytest.raises(ClusterError, match=f"port {port}, where the ranks meet"),
    ):
        meet_ranks(places=places, job="taken", rank=0, size=3, timeout_secs=0.3)


def test_pods_of_an_indexed_job_are_named():
    addresses = [f"my-run-{i}.pods:2222" for i in range(3)]
    assert detect_cluster(INDEXED_JOB) == workers(*addresses, index=1)


@pytest.mark.parametrize("index", [0, 1])
def test_pods_of_a_stateful_set_are_named(index):
    env = {
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "HOSTNAME": f"web-{index}",
        "TFDIST_NUM_TASKS": "2",
        "TFDIST_PORT": "99",
    }
    assert detect_cluster(env) == workers("web-0.web:99", "web-1.web:99", index=index)


def test_pod_without_its_own_name_is_an_error():
    with pytest.raises(ClusterError, match="hostNetwork"):
        detect_cluster(INDEXED_JOB | {"HOSTNAME": "node-17"})


def test_jobs_of_a_jobset_are_the_roles():
    cluster = detect_cluster(JOBSET)
    assert cluster.task == Task("worker", 1)
    assert hosts_of(cluster) == {
        "chief": ["run-chief-0-0.run"],
        "worker": ["run-worker-0-0.run", "run-worker-0-1.run"],
        "ps": ["run-ps-0-0.run"],
    }
    alone = detect_cluster(JOBSET | {"TFDIST_NUM_PS": "", "TFDIST_SERVICE": "s"})
    assert hosts_of(alone) == {"worker": ["run-worker-0-0.s", "run-worker-0-1.s"]}
    with pytest.raises(ClusterError, match="JOBSET_NAME is missing"):
        detect_cluster({name: value for name, value in JOBSET.items() if name != "JOBSET_NAME"})


def test_tf_config_of_kubeflow_is_read():
    """TFJob sets it on each pod, with an `environment` and names of Services; here a worker of a ps job."""
    hosts = {role: [f"mnist-{role}-0.default.svc:2222"] for role in ("chief", "ps", "worker")}
    text = json.dumps(
        {"cluster": hosts, "task": {"type": "worker", "index": 0}, "environment": "cloud"}, sort_keys=True
    )
    cluster = detect_cluster(INDEXED_JOB | {"TF_CONFIG": text})
    assert cluster.task == Task("worker", 0) and cluster.num_ps == 1


VERTEX_POOLS = {f"workerpool{i}": [f"cmle-training-workerpool{i}-ab-0:2222"] for i in range(4)}


@pytest.mark.parametrize(
    ("pool", "task"),
    [
        ("workerpool0", "chief"),
        ("workerpool1", "worker"),
        ("workerpool2", "ps"),
        ("workerpool3", "evaluator"),
    ],
)
def test_cluster_spec_of_vertex_is_read(pool, task):
    spec = {
        "cluster": VERTEX_POOLS,
        "environment": "cloud",
        "task": {"type": pool, "index": 0, "trial": "1"},
        "job": "{}",
    }
    cluster = detect_cluster({"CLUSTER_SPEC": json.dumps(spec)})
    assert cluster.task == Task(task, 0)
    assert hosts_of(cluster) == {
        role: [f"cmle-training-workerpool{i}-ab-0"] for i, role in enumerate(("chief", "worker", "ps"))
    }


def test_tf_config_of_vertex_is_read():
    """With the old name of the chief, an evaluator inside the cluster, an index that is text, and more fields."""
    hosts = dict(zip(("master", "worker", "ps", "evaluator"), VERTEX_POOLS.values(), strict=True))
    text = json.dumps(
        {
            "cluster": hosts,
            "task": {"type": "master", "index": "0", "trial": "1", "cloud": "x"},
            "job": {"region": "us"},
            "environment": "cloud",
        }
    )
    cluster = detect_cluster({"TF_CONFIG": text, "CLUSTER_SPEC": json.dumps({"cluster": VERTEX_POOLS})})
    assert cluster.task == Task("chief", 0)
    assert list(cluster.addresses) == ["chief", "worker", "ps"]


def test_hosts_of_sagemaker_are_read():
    assert detect_cluster(SAGEMAKER) == workers("algo-1:2222", "algo-2:2222", "algo-3:2222", index=1)
    for wrong in ({"SM_CURRENT_HOST": "algo-9"}, {"SM_HOSTS": "algo-1,algo-2"}):
        with pytest.raises(ClusterError, match="SM_HOSTS"):
            detect_cluster(SAGEMAKER | wrong)


@pytest.mark.parametrize(
    "told",
    [{"strategy": "ps", "num_ps": 2}, {"strategy": "parameter_server"}, {}],
    ids=["by flags", "by a flag and a variable", "by variables"],
)
def test_roles_are_dealt_and_ps_spread_over_hosts(told):
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x2)", "SLURM_STEP_NUM_TASKS": "6"}
    env |= {"TFDIST_NUM_PS": "2"} | ({} if "strategy" in told else {"TFDIST_STRATEGY": "ps"})
    tasks = []
    for rank in range(6):
        mine = "0,1,2" if rank < 3 else "3,4,5"
        place = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank // 3), "SLURM_GTIDS": mine}
        cluster = detect_cluster(env | place, **told)
        assert hosts_of(cluster) == {"chief": ["n9"], "worker": ["n9", "n10", "n10"], "ps": ["n9", "n10"]}
        tasks.append(str(cluster.task))
    assert tasks == ["chief:0", "ps:0", "worker:0", "ps:1", "worker:1", "worker:2"]


def test_no_ps_are_dealt_to_other_strategies():
    env = OPEN_MPI | {"TFDIST_NUM_PS": "1"}
    assert detect_cluster(env).num_ps == 1
    assert detect_cluster(env, strategy="multiworker").num_ps == 0
    assert detect_cluster(env | {"TFDIST_STRATEGY": "mwms"}).num_ps == 0
    assert detect_cluster(OPEN_MPI, strategy="ps").num_ps == 1


def test_too_few_tasks_for_the_roles_are_an_error():
    with pytest.raises(ClusterError, match="3 tasks are too few for a chief, 2 ps and a worker: start 4"):
        detect_cluster(OPEN_MPI, strategy="ps", num_ps=2)
