"""What is to be launched: `Job`, and the pure functions that say how its processes look."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from tfdist.cluster import Cluster, Task, canonical_strategy, check_strategy, render_tf_config
from tfdist.errors import ConfigError

RESTART_VARIABLE = "TFDIST_RESTART"  # How often the job was started before.
# What TensorFlow's inter-op pool needs at least. With fewer threads a ps job can hang: closures that send tensors
# between worker and ps hold one thread each while they wait.
_MIN_INTEROP_THREADS = 2
_MIN_INTEROP_THREADS_PS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command, and the local processes that run it.

    With ps tasks there are 1 chief, `num_workers` workers and `num_ps` ps; without, `num_workers` workers, of
    which worker 0 is the chief, as TensorFlow has it.

    Args:
        command: Program and arguments, the same for every task.
        num_workers: Tasks that compute.
        num_ps: Tasks that hold variables; None is 1 under the strategy `ps`, else 0.
        strategy: Any name of a strategy, handed to the tasks; None leaves the choice to the command.
        run_dir: Folder of the run; each task's whole output is kept in its `logs`. None keeps no logs.
        env: The environment that every task starts from.
        grace_secs: How long tasks may take to end when they are asked to, before they are killed.
        threads_per_task: TensorFlow's intra-op threads in each task; None divides this machine's cores.
        max_restarts: How often tasks that were killed are started again: a ps job's worker alone, all tasks for
            any other. An exception is no reason: it would come again.

    Raises:
        ConfigError: If a value is out of range.
        ClusterError: If the strategy cannot run on these tasks.
    """

    command: Sequence[str]
    num_workers: int = 1
    num_ps: int | None = None
    strategy: str | None = None
    run_dir: str | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    grace_secs: float = 10.0
    threads_per_task: int | None = None
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if self.strategy is not None:
            object.__setattr__(self, "strategy", canonical_strategy(self.strategy))
        if self.num_ps is None:
            object.__setattr__(self, "num_ps", 1 if self.strategy == "ps" else 0)
        object.__setattr__(self, "command", tuple(str(word) for word in self.command))
        if not self.command:
            raise ConfigError("the command is empty: name a script, -m module, or -- program")
        _check_at_least("num_workers", self.num_workers, 1)
        _check_at_least("num_ps", self.num_ps, 0)
        _check_at_least("grace_secs", self.grace_secs, 0)
        _check_at_least("max_restarts", self.max_restarts, 0)
        _check_at_least("threads_per_task", self.threads_per_task, 1)
        if self.strategy is not None:
            placeholders = range(1, self.num_tasks + 1)
            check_strategy(build_cluster(self, placeholders), self.strategy)

    @property
    def has_chief(self) -> bool:
        """Whether there is a chief task of its own, beside the workers."""
        return bool(self.num_ps)

    @property
    def num_tasks(self) -> int:
        """How many processes, all roles together."""
        return self.has_chief + self.num_workers + (self.num_ps or 0)


def build_cluster(job: Job, ports: Sequence[int]) -> Cluster:
    """Gives each task of a job an address on this machine's loopback.

    Args:
        job: The job.
        ports: One port per task.

    Returns:
        The cluster, seen from outside (its `task` is None).
    """
    counts = {"chief": int(job.has_chief), "worker": job.num_workers, "ps": job.num_ps or 0}
    left = iter(ports)
    return Cluster(
        addresses={
            role: tuple(f"127.0.0.1:{next(left)}" for _ in range(n)) for role, n in counts.items() if n
        }
    )


def build_python_command(words: Sequence[str], *, module: bool = False) -> list[str]:
    """Makes the command that runs a Python script or module with this interpreter.

    Args:
        words: The script or module and its arguments.
        module: Whether the first word is a module, as after `python -m`.

    Returns:
        Program and arguments.
    """
    return [sys.executable, *(["-m"] if module else []), *words]


def render_env(job: Job, cluster: Cluster, task: Task) -> dict[str, str]:
    """Says which environment variables a task gets on top of `job.env`.

    What the user has set stays, except for what describes the cluster.

    Args:
        job: The job.
        cluster: All its tasks.
        task: The one that is to be started.

    Returns:
        Variables that are new or changed.
    """
    added = {
        "TF_CONFIG": render_tf_config(cluster.with_task(task)),
        "GRPC_FAIL_FAST": "use_caller",  # else a call to a server that is not up yet fails at once
        "TFDIST_LAUNCHED": "1",  # so that a task never launches a cluster in its turn
    }
    if job.strategy is not None:
        added["TFDIST_STRATEGY"] = job.strategy
    if job.run_dir is not None:
        added["TFDIST_RUN_DIR"] = job.run_dir
    defaults = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}
    if job.env.get("http_proxy") or job.env.get("https_proxy") or job.env.get("grpc_proxy"):
        # gRPC would ask the proxy for 127.0.0.1. This variable is gRPC's own, so nothing else changes.
        kept = job.env.get("no_proxy")
        defaults["no_grpc_proxy"] = f"{kept},127.0.0.1" if kept else "127.0.0.1"
    added.update({name: value for name, value in defaults.items() if not job.env.get(name)})
    return added | _render_threads(job)


def render_dry_run(job: Job, cluster: Cluster) -> str:
    """Shows what would be started.

    Args:
        job: The job.
        cluster: Its tasks with their addresses.

    Returns:
        For each task a comment line and a command that can be pasted into a shell.
    """
    lines = []
    for task in cluster.tasks:
        variables = [f"{name}={shlex.quote(value)}" for name, value in render_env(job, cluster, task).items()]
        lines += [f"# {task}", " ".join(["env", *variables, shlex.join(job.command)]), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def count_cores() -> int:
    """Counts the cores that this process may use.

    Returns:
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _render_threads(job: Job) -> dict[str, str]:
    """Divides the cores among the tasks that compute, by thread counts and never by pinning.

    A process that is pinned to one core before TensorFlow starts gets pools so small that ps training hangs.
    """
    intra = job.threads_per_task or max(1, count_cores() // job.num_workers)
    inter = max(intra, _MIN_INTEROP_THREADS_PS if job.has_chief else _MIN_INTEROP_THREADS)
    threads = {"OMP_NUM_THREADS": intra, "TF_NUM_INTRAOP_THREADS": intra, "TF_NUM_INTEROP_THREADS": inter}
    if job.has_chief and count_cores() < _MIN_INTEROP_THREADS_PS:
        threads["TF_GRPC_WORKER_CACHE_THREADS"] = _MIN_INTEROP_THREADS_PS
    # A flag was given for this very launch; it wins over what an environment carries along.
    told = {"OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"} if job.threads_per_task else set()
    return {name: str(n) for name, n in threads.items() if name in told or not job.env.get(name)}


def _check_at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not value >= least:
        raise ConfigError(f"{name} is {value:g}: it must be at least {least}")
