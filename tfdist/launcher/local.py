"""Runs a job, on this machine or on its hosts, as often as it takes."""

import contextlib
import dataclasses
import os
import secrets
import tempfile
import time

from tfdist.cluster.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from tfdist.cluster.ports import PortReservation
from tfdist.launcher.executors import LocalExecutor
from tfdist.launcher.job import RESTART_VARIABLE, Job, build_cluster, render_dry_run
from tfdist.launcher.process.reaper import MARK_VARIABLE
from tfdist.launcher.ssh.executors import Executor, RemoteExecutor, render_dry_run_remote
from tfdist.launcher.supervise.chaos import Chaos, parse_chaos
from tfdist.launcher.supervise.elastic import ElasticCluster
from tfdist.launcher.supervise.processes import Processes
from tfdist.launcher.supervise.recovery import Recovery
from tfdist.launcher.supervise.restarts import Restarts
from tfdist.launcher.supervise.supervisor import Supervisor
from tfdist.launcher.supervise.watch import Watch


def run_local(job: Job) -> int:
    """Starts a job's processes on this machine and waits until all have ended.

    None of them outlives this process, even if it is killed. SIGINT, SIGTERM and SIGHUP are passed on to them.
    If one is killed, freezes or hangs, all are started again, up to `job.max_restarts` times.

    Returns:
        0 if the job ended well; else the exit code of the task that failed first (128 + n for signal n), or
        128 + n if this process was told to end by signal n.

    Raises:
        ConfigError: If the run_dir cannot be written.
        LaunchError: If a process cannot be started, or there are no free ports.
    """
    restarts = Restarts(job)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tfdist-"))
        executor: Executor = RemoteExecutor(job) if job.hosts else LocalExecutor(job)
        stack.enter_context(executor)
        watch = Watch(folder, hang_timeout_secs=job.hang_timeout_secs)
        failures = parse_chaos(job.chaos, build_cluster(job), has_hosts=bool(job.hosts))
        chaos = Chaos(failures, run_dir=job.run_dir, started_at=time.monotonic())
        while True:
            # Of an elastic job no more than there is room for on the hosts that are left.
            num_workers = max(restarts.min_workers, int(min(restarts.num_workers, executor.num_slots)))
            sized = dataclasses.replace(job, num_workers=num_workers, min_workers=None)
            supervisor, code = _run_once(sized, executor, restarts, watch, chaos)
            if supervisor.is_rescaling:
                restarts.rescale()
            elif supervisor.is_worth_a_restart:
                restarts.use()
                restarts.resize(num_lost=supervisor.num_lost)
            else:
                return code


def _run_once(
    job: Job, executor: Executor, restarts: Restarts, watch: Watch, chaos: Chaos
) -> tuple[Supervisor, int]:
    mark = f"{os.getpid()}-{secrets.token_hex(8)}"
    cluster = executor.reserve(job)
    own = {MARK_VARIABLE: mark, RESTART_VARIABLE: str(restarts.num_tries)}
    envs = {
        task: {**executor.build_env(job, cluster, task), **own, HEARTBEAT_VARIABLE: watch.path(task)}
        for task in cluster.tasks
    }
    regrouping = None
    if job.elastic == "in_process" and not job.has_chief and isinstance(executor, LocalExecutor):
        path = watch.fresh_path("members")
        regrouping = ElasticCluster(
            watch, path=path, reserve=executor.hold_ports, min_members=restarts.min_workers
        )
        envs = {task: env | regrouping.render_env(task) for task, env in envs.items()}
    processes = Processes(job, cluster, mark, envs, executor=executor)
    recovery = Recovery(job, cluster, processes, restarts=restarts, watch=watch, regrouping=regrouping)
    supervisor = Supervisor(job, cluster, processes, recovery, restarts=restarts, watch=watch, chaos=chaos)
    return supervisor, supervisor.run()


def render_dry_run_local(job: Job) -> str:
    """Shows every TF_CONFIG and command that `run_local` would start, with ports that are free now; starts nothing.

    Raises:
        LaunchError: If there are no free ports.
    """
    if job.hosts:
        return render_dry_run_remote(job)
    with PortReservation(job.num_tasks) as reservation:
        return render_dry_run(job, build_cluster(job, reservation.ports))
