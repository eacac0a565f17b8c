"""Runs a job on this machine."""

import contextlib
import os
import secrets

from tfdist.launcher.guard import MARK_VARIABLE
from tfdist.launcher.job import RESTART_VARIABLE, Job, build_cluster, render_dry_run, render_env
from tfdist.launcher.supervisor import Supervisor
from tfdist.ports import PortReservation


def run_local(job: Job) -> int:
    """Starts a job's processes on this machine and waits until all have ended.

    None of them outlives this process, even if it is killed. SIGINT, SIGTERM and SIGHUP are passed on to them.
    If one is killed, all are started again, up to `job.max_restarts` times.

    Args:
        job: What to run.

    Returns:
        0 if the job ended well; else the exit code of the task that failed first (128 + n for signal n), or
        128 + n if this process was told to end by signal n.

    Raises:
        ConfigError: If the run_dir cannot be written.
        LaunchError: If a process cannot be started, or there are no free ports.
    """
    num_restarts = 0
    # All held to the end, so that each try has new ones: TensorFlow does not come up again on those of a cluster that
    # died.
    with contextlib.ExitStack() as reservations:
        while True:
            mark = f"{os.getpid()}-{secrets.token_hex(8)}"
            own = {MARK_VARIABLE: mark, RESTART_VARIABLE: str(num_restarts)}
            reservation = reservations.enter_context(PortReservation(job.num_tasks))
            cluster = build_cluster(job, reservation.ports)
            envs = {task: {**job.env, **render_env(job, cluster, task), **own} for task in cluster.tasks}
            supervisor = Supervisor(job, cluster, mark, num_restarts=num_restarts)
            code = supervisor.run(envs)
            if not supervisor.is_worth_a_restart:
                return code
            num_restarts = supervisor.num_restarts + 1


def render_dry_run_local(job: Job) -> str:
    """Shows what `run_local` would start, with ports that are free now; starts nothing.

    Args:
        job: What would be run.

    Returns:
        Text with every TF_CONFIG and command.

    Raises:
        LaunchError: If there are no free ports.
    """
    with PortReservation(job.num_tasks) as reservation:
        return render_dry_run(job, build_cluster(job, reservation.ports))
