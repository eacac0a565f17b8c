"""The world of `mpirun`: Open MPI, and the others that set PMI_RANK (MPICH, Intel MPI)."""

import re
import zlib
from collections.abc import Mapping

from tfdist.cluster.environments import slurm
from tfdist.cluster.environments.ranks import build_ranked_cluster, find_port, read_number
from tfdist.cluster.rendezvous import meet_ranks
from tfdist.cluster.spec import Cluster, split_address
from tfdist.errors import ClusterError

COORDINATOR_VARIABLE = "TFDIST_COORDINATOR"
_PMI_VARIABLES = ("PMI_FD", "PMI_PORT")
_PMIX_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK")
# All by which a process finds its place, whoever's MPI it is.
_RANK_VARIABLES = (
    *_PMI_VARIABLES, "PMI_ID", "PMI_RANK", "PMI_SIZE", "PMI_SPAWNED",
    *_PMIX_VARIABLES, "OMPI_COMM_WORLD_SIZE", "PMIX_NAMESPACE",
)  # fmt: skip
_MEETING_PORT_OFFSET = 63  # The last of the job's own ports.


def detect(env: Mapping[str, str]) -> bool:
    """Tells whether this process is one of several that `mpirun` has started."""
    if "OMPI_COMM_WORLD_RANK" in env:
        return read_number(env, "OMPI_COMM_WORLD_SIZE") > 1
    # srun --mpi=pmi2 sets PMI_RANK too, and Slurm's own variables say more; mpirun alone counts local ranks.
    is_mpirun = "MPI_LOCALNRANKS" in env or not slurm.detect(env)
    return "PMI_RANK" in env and is_mpirun and read_number(env, "PMI_SIZE") > 1


def find_starter(env: Mapping[str, str]) -> str:
    """Says whose MPI this process was started for; another's cannot join it.

    Returns:
        "MPICH" (and its relatives, Slurm, tfdist's own launcher), "Open MPI", or "" where none was expected.
    """
    if any(name in env for name in _PMI_VARIABLES):
        return "MPICH"
    return "Open MPI" if any(name in env for name in _PMIX_VARIABLES) else ""


def drop_rank(env: Mapping[str, str]) -> dict[str, str]:
    """Leaves out what makes a process a rank of MPI: those that it starts are none, and MPI would end them for it.

    A shell that `srun` has started is such a rank.
    """
    return {name: value for name, value in env.items() if name not in _RANK_VARIABLES}


def build_cluster(env: Mapping[str, str], num_ps: int = 0) -> Cluster:
    """Finds each rank's host: this machine if all are here, else by a meeting at rank 0, since `mpirun` tells no hosts.

    They meet at TFDIST_COORDINATOR=HOST:PORT, a free port of rank 0's host, or, without it, where Open MPI's `mpirun`
    itself runs.

    Raises:
        ClusterError: If nothing says where to meet, or some ranks do not come.
    """
    is_open_mpi = "OMPI_COMM_WORLD_RANK" in env
    rank = read_number(env, "OMPI_COMM_WORLD_RANK" if is_open_mpi else "PMI_RANK")
    size = read_number(env, "OMPI_COMM_WORLD_SIZE" if is_open_mpi else "PMI_SIZE")
    num_local = read_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE" if is_open_mpi else "MPI_LOCALNRANKS")
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid", "")
    port = find_port(env, zlib.crc32(job.encode()) if job else 0)
    hosts: tuple[str, ...] = ("127.0.0.1",) * size
    if num_local != size:
        places = find_coordinator(env, port + _MEETING_PORT_OFFSET)
        hosts = meet_ranks(places=places, job=job, rank=rank, size=size)
    return build_ranked_cluster(hosts=hosts, rank=rank, num_ps=num_ps, port=port)


def find_coordinator(env: Mapping[str, str], port: int) -> tuple[tuple[str, int], ...]:
    """Finds where ranks on several hosts can meet rank 0, at `port` where TFDIST_COORDINATOR names none.

    Returns:
        Hosts and ports, all of one machine, of which one or another may be reached.

    Raises:
        ClusterError: If nothing says where rank 0 is.
    """
    if env.get(COORDINATOR_VARIABLE):
        return (split_address(env[COORDINATOR_VARIABLE]),)
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    is_elsewhere = env.get("OMPI_COMM_WORLD_RANK") == "0" and uri != env.get("OMPI_MCA_orte_local_daemon_uri")
    hosts = [host for listed in re.findall(r"tcp://([^:;]+):", uri) for host in listed.split(",")]
    if not hosts or is_elsewhere:
        raise ClusterError(
            "the ranks are on several hosts, and mpirun does not say on which rank 0 is: name that host and a free "
            f"port of it, as in 'mpirun -x {COORDINATOR_VARIABLE}=HOST:2222 …' (MPICH: -genv {COORDINATOR_VARIABLE} "
            "HOST:2222)"
        )
    return tuple((host, port) for host in hosts)
