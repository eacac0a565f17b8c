"""Ranks that the launcher starts in `mpiexec`'s place, with a real MPI and no TensorFlow."""

import os
import sys

import pytest
from test_launcher import folder, is_running, run, write_script  # noqa: F401 - folder is a fixture

pytest.importorskip("mpi4py", reason="needs the extra tfdist[mpi]")
pytestmark = pytest.mark.cluster

MPI = """
from mpi4py import MPI
import numpy as np
world = MPI.COMM_WORLD
def add_up():
    total = np.empty(250_000, "f4")
    world.Allreduce(np.full(250_000, 10.0 ** world.rank, "f4"), total)
    assert total.min() == total.max()
    return int(total[0])
"""


def launch(*args, **options):
    return run("--strategy=multiworker", *args, **options)


def read_said(done):
    return sorted(line.partition("] ")[2] for line in done.stdout.splitlines() if "] " in line)


@pytest.mark.parametrize(
    "outer",
    [{}, {"PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_RANK": "0"}, {"PMI_FD": "9", "PMI_SPAWNED": "1"}],
    ids=["plain", "srun_pmix", "srun_pmi2"],
)
def test_ranks_add_up_in_the_clusters_order(folder, outer):  # noqa: F811
    """Also in a shell that is itself one rank of another MPI's, such as `srun --pty bash`."""
    script = write_script(folder, MPI + "print(me, world.rank, world.size, add_up(), flush=True)")
    done = launch("--num_workers=3", "--exchange=mpi", script, env=os.environ | outer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_said(done) == ["worker-0 0 3 111", "worker-1 1 3 111", "worker-2 2 3 111"]


def test_collective_leaves_every_rank_alone(folder):  # noqa: F811
    script = write_script(folder, MPI + "print(me, world.rank, world.size, flush=True)")
    done = launch("--num_workers=2", "--exchange=collective", script)
    assert read_said(done) == ["worker-0 0 1", "worker-1 0 1"], done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_rank_listens_to_other_machines(folder):  # noqa: F811
    look = """
add_up()
inodes = set()
for name in os.listdir("/proc/self/fd"):
    try:
        inodes.add(os.readlink("/proc/self/fd/" + name))
    except FileNotFoundError:
        pass
for table in ("tcp", "tcp6"):
    for words in map(str.split, open("/proc/net/" + table).readlines()[1:]):
        if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
            print(me, words[1].partition(":")[0], flush=True)
world.Barrier()
"""
    done = launch("--num_workers=2", write_script(folder, MPI + look))
    assert done.returncode == 0, done.stderr
    said = read_said(done)
    loopback = ("0100007F", "00000000000000000000000001000000")
    assert said and all(line.split()[1] in loopback for line in said), said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_ranks_peers_are_ended_and_all_start_again(folder):  # noqa: F811
    """They wait inside MPI, where neither an exception nor a Python signal handler reaches them."""
    body = """
leave(f"{me}-{os.environ['TFDIST_RESTART']}", os.getpid())
assert add_up() == 111
for line in open("/proc/self/maps"):
    name = line.split()[-1]
    if name.startswith("/dev/shm/mpich_shm_") and os.path.exists(name) and world.rank == 0:
        os.unlink(name)  # MPICH leaves it behind when it is killed
add_up()
if world.rank == 1 and os.environ["TFDIST_RESTART"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
print(me, os.environ["TFDIST_RESTART"], add_up(), flush=True)
"""
    script = write_script(folder, MPI + body)
    done = launch("--num_workers=3", "--max_restarts=1", "--grace_secs=2", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker:1 was killed by SIGKILL" in done.stderr and "starting all tasks again" in done.stderr
    assert read_said(done) == [f"worker-{rank} 1 111" for rank in range(3)]
    pids = [int(path.read_text()) for path in folder.glob("worker-*-[01]")]
    assert len(set(pids)) == 6
    assert not [pid for pid in pids if is_running(pid)]
