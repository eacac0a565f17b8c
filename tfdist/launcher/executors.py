"""Where a job's processes run: on this machine, or by way of `tfdist.launcher.ssh.executors` on others."""

import contextlib
import math
from collections.abc import Mapping, Sequence

from tfdist.cluster.cores import count_cores
from tfdist.cluster.ports import PortReservation
from tfdist.cluster.spec import Cluster, Task
from tfdist.launcher.job import PMI_FD, PMI_RANK, Job, build_cluster, render_env, render_shared_env
from tfdist.launcher.mpi.pmi import PmiServer, PmiWorld
from tfdist.launcher.process.children import Child
from tfdist.launcher.process.fork import can_fork, preload
from tfdist.launcher.process.logs import TaskOutput


class LocalExecutor:
    """Starts every task of a job here."""

    num_slots: float = math.inf

    def __init__(self, job: Job) -> None:
        self._job = job
        self._forks = bool(job.preload) and can_fork(job.command)
        # All reservations are held to the end, so that each try has new ports: TensorFlow does not come up again on
        # those of a cluster that died.
        self._held = contextlib.ExitStack()
        self._pmi: PmiServer | None = None

    def __enter__(self) -> "LocalExecutor":
        if self._forks:
            cores = count_cores()
            shared = render_shared_env(
                self._job, cores=cores, cores_per_task=max(1, cores // self._job.num_workers)
            )
            preload(self._job.preload, {**self._job.env, **shared})
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end_pmi()
        self._held.close()

    def hold_ports(self, count: int) -> tuple[int, ...]:
        """Returns free ports that nobody else is given.

        Raises:
            LaunchError: If there are none.
        """
        return self._held.enter_context(PortReservation(count)).ports

    def reserve(self, job: Job) -> Cluster:
        """Gives each task of a try an address.

        Raises:
            LaunchError: If there are no free ports.
        """
        self._end_pmi()
        if job.uses_mpi:
            self._pmi = PmiServer(PmiWorld(["here"] * job.num_tasks))
        return build_cluster(job, self.hold_ports(job.num_tasks))

    def build_env(self, job: Job, cluster: Cluster, task: Task) -> dict[str, str]:
        """Returns a task's whole environment."""
        return {**job.env, **render_env(job, cluster, task)}

    def start(self, output: TaskOutput, command: Sequence[str], env: Mapping[str, str]) -> Child:
        """Starts a task.

        Raises:
            LaunchError: If it cannot be started.
        """
        if self._pmi is None:
            return Child(output, command, env, forks=self._forks)
        with self._pmi.connect(int(env[PMI_RANK])) as own:
            env = {**env, PMI_FD: str(own.fileno())}
            return Child(output, command, env, fds=[own.fileno()], forks=self._forks)

    def _end_pmi(self) -> None:
        if self._pmi is not None:
            self._pmi.close()
            self._pmi = None
