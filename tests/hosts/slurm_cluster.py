"""A real Slurm of several nodes on this machine's loopback."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfdist.cluster.ports import PortReservation

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
_CONFIG = """\
ClusterName=tfdist
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
SlurmUser=root
FirstJobId={first_job}
AuthInfo=socket={folder}/munge.sock
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=3
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm_cluster(folder: Path, *, num_nodes: int = 2) -> Iterator[dict[str, str]]:
    """Starts a cluster, with nodes n1, n2, … of 4 CPUs each; gives the variables with which its commands find it."""
    missing = [program for program in _PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm needs root and {', '.join(_PROGRAMS)} (slurmctld slurmd slurm-client munge)")
    folder.chmod(0o755)  # munge lets strangers in, and wants to be sure of the way
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    started: list[subprocess.Popen[bytes]] = []
    with PortReservation(1 + num_nodes) as reservation, contextlib.ExitStack() as stack:
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
            for i, port in enumerate(reservation.ports[1:], 1)
        )
        config = folder / "slurm.conf"
        # Tasks derive their ports from the job's number: another test's Slurm on this machine shall have others.
        first_job = random.randrange(1, 1_000_000)
        config.write_text(
            _CONFIG.format(
                host=host, folder=folder, ports=reservation.ports, nodes=nodes, first_job=first_job
            )
        )
        env = {"SLURM_CONF": str(config), "PATH": _path()}

        def start(*words: str) -> None:
            log = stack.enter_context((folder / f"{words[0]}.out").open("ab"))
            started.append(
                subprocess.Popen(
                    words, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True
                )
            )

        try:
            start(
                "munged", "--foreground", "--force", "--socket", f"{folder}/munge.sock", "--key-file", str(key),
                "--pid-file", f"{folder}/munge.pid", "--log-file", f"{folder}/munged.log",
                "--seed-file", f"{folder}/munge.seed",
            )  # fmt: skip
            _wait_for(lambda: (folder / "munge.sock").exists(), folder)
            start("slurmctld", "-D", "-c")
            for i in range(1, num_nodes + 1):
                (folder / f"spool-n{i}").mkdir()
                start("slurmd", "-D", "-N", f"n{i}")
            _wait_for(lambda: _count_idle(env) == num_nodes, folder)
            yield env
        finally:
            # A job that a failed test left would outlive its Slurm.
            subprocess.run(["scancel", "--state=RUNNING"], env={**os.environ, **env}, timeout=30)
            deadline = time.monotonic() + 15
            while _count_idle(env) < num_nodes and time.monotonic() < deadline:
                time.sleep(0.2)
            for process in reversed(started):
                process.send_signal(signal.SIGTERM)
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                process.kill()
                process.wait()


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian keeps the daemons


def _count_idle(env: dict[str, str]) -> int:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout.split().count("idle")


def _wait_for(what, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not what():
        if time.monotonic() > deadline:
            logs = "".join(f"\n== {p.name}\n{p.read_text()[-1500:]}" for p in folder.glob("*.log"))
            pytest.fail(f"Slurm is not up within 60 s{logs}")
        time.sleep(0.1)
