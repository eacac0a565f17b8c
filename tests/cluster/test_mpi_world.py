"""MPI's world inside processes that somebody's `mpiexec` has started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tfdist

pytest.importorskip("mpi4py", reason="needs the extra tfdist[mpi]")
pytestmark = [pytest.mark.cluster, pytest.mark.ci]

WORLD = """
import os
from mpi4py import MPI
from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.environments.mpi import find_starter
cluster = detect_cluster(os.environ)
world = MPI.COMM_WORLD
line = f"{find_starter(os.environ)} {cluster.tasks.index(cluster.task)}={world.rank}/{world.size}\\n"
os.write(1, line.encode())  # at once: the ranks share one pipe
"""


def run(folder, *command):
    root = str(Path(tfdist.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": root, "UCX_NET_DEVICES": "lo"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def test_ranks_of_mpiexec_are_the_clusters(tmp_path):
    mpiexec = shutil.which("mpiexec.hydra", path=str(Path(sys.executable).parent))
    if mpiexec is None:
        pytest.skip("mpiexec.hydra is missing (pip install mpich)")
    (tmp_path / "world.py").write_text(WORLD)
    # Hydra's proxies are told by which interface they find it: no door to other machines.
    done = run(tmp_path, mpiexec, "-iface", "lo", "-n", "3", sys.executable, "world.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.split()) == sorted(["MPICH"] * 3 + [f"{rank}={rank}/3" for rank in range(3)])


def test_mpich_under_open_mpis_mpirun_is_refused_and_not_started(tmp_path):
    """It would end the process."""
    mpirun = shutil.which("mpirun.openmpi")
    if mpirun is None:
        pytest.skip("mpirun.openmpi is missing (openmpi-bin)")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    lines = [mpirun, *root, "--oversubscribe", "--mca", "oob_tcp_if_include", "lo", "-np", "2"]
    done = run(
        tmp_path,
        *(
            *lines,
            sys.executable,
            "-m",
            "tfdist.train",
            "--exchange=mpi",
            "--epochs=1",
            "--steps_per_epoch=2",
        ),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "this Python's MPI is MPICH, and the processes were started for Open MPI" in done.stderr
    assert "Abort" not in done.stderr
