"""What is to be launched: `Job`, and the pure functions that say how its processes look."""

import dataclasses
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from tfdist.cluster.cores import count_cores
from tfdist.cluster.environments.mpi import drop_rank
from tfdist.cluster.gpus import PER_WORKER_VARIABLE
from tfdist.cluster.peer_allowlist import LISTEN_VARIABLE
from tfdist.cluster.spec import Cluster, Task, canonical_strategy, check_strategy, render_tf_config
from tfdist.config.job_options import JobOptions
from tfdist.config.settings import check_settings, setting
from tfdist.config.sync_options import EXCHANGES
from tfdist.errors import ConfigError
from tfdist.launcher.hosts import Host, SshOptions

RESTART_VARIABLE = "TFDIST_RESTART"  # How often the job was started before.
# By which MPI finds whoever has started it.
PMI_RANK, PMI_SIZE, PMI_FD = "PMI_RANK", "PMI_SIZE", "PMI_FD"
# Workers that exchange megabytes at each step would give their memory back to the system each time, and ask for it
# again: the all-reduce of 4 MB took twice as long without these.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
# TensorFlow has it on by itself only where a CPU has AVX512-VNNI or the like, though with AVX2 alone a step of a
# Transformer takes 2/3 of its time by it, and one of a ResNet 3/4.
ONEDNN = {"TF_ENABLE_ONEDNN_OPTS": "1"}
# What TensorFlow's inter-op pool needs at least. With fewer threads a ps job can hang: closures that send tensors
# between worker and ps hold one thread each while they wait.
_MIN_INTEROP_THREADS = 2
_MIN_INTEROP_THREADS_PS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(JobOptions):
    """A command, and the local processes that run it; what `JobOptions` has belongs to it too.

    With ps tasks there are 1 chief, `num_workers` workers and `num_ps` ps; without, `num_workers` workers, of
    which worker 0 is the chief, as TensorFlow has it.

    Args:
        command: Program and arguments, the same for every task.
        strategy: Any name of a strategy, handed to the tasks; None leaves the choice to the command.
        run_dir: Folder of the run; each task's whole output is kept in its `logs`. None keeps no logs.
        env: The environment that every task starts from, save for what makes this process a rank of MPI.
        hosts: Machines to run on, by ssh; none: this one.
        ssh: How they are reached.
        preload: Modules that are imported once, before this machine's tasks are forked; none: each is started anew.

    Raises:
        ConfigError: If a value is out of range.
        ClusterError: If the strategy cannot run on these tasks.
    """

    command: Sequence[str]
    num_workers: int = setting(1, least=1, help="Tasks that compute.")
    num_ps: int | None = setting(
        None, least=0, help="Tasks that hold variables. Default: 1 under the strategy ps, else 0."
    )
    strategy: str | None = None
    run_dir: str | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    threads_per_task: int | None = setting(
        None, least=1, help="TensorFlow's intra-op threads in each task. Default: its share of the cores."
    )
    min_workers: int | None = setting(
        None, least=1, help="With so few workers the job may go on when some have died. Default: with all."
    )
    hosts: tuple[Host, ...] = ()
    ssh: SshOptions = SshOptions()
    exchange: str = setting(
        "auto", choices=EXCHANGES, help="What carries gradients; mpi: this launcher is its mpiexec."
    )
    preload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.strategy is not None:
            object.__setattr__(self, "strategy", canonical_strategy(self.strategy))
        if self.num_ps is None:
            object.__setattr__(self, "num_ps", 1 if self.strategy == "ps" else 0)
        object.__setattr__(self, "command", tuple(str(word) for word in self.command))
        object.__setattr__(self, "env", drop_rank(self.env))
        if not self.command:
            raise ConfigError("the command is empty: name a script, -m module, or -- program")
        check_settings(self)
        if self.elastic == "in_process" and self.hosts:
            raise ConfigError("elastic is 'in_process' with hosts: it is for one machine; choose 'restart'")
        self._check_exchange()
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ConfigError(
                f"num_workers is {self.min_workers}:{self.num_workers}: write it as least:most, such as 2:4"
            )
        if self.strategy is not None:
            check_strategy(build_cluster(self), self.strategy)

    def _check_exchange(self) -> None:
        if self.exchange != "mpi":
            return
        if self.num_ps or self.strategy not in (None, "multiworker"):
            raise ConfigError(
                f"exchange is 'mpi' with strategy {self.strategy or 'ps'!r}: only multiworker has it"
            )
        if self.elastic == "in_process":
            raise ConfigError(
                "exchange is 'mpi' with elastic 'in_process': MPI's processes cannot be formed anew; choose 'restart'"
            )
        if importlib.util.find_spec("mpi4py") is None:
            raise ConfigError(
                "exchange is 'mpi', and there is no mpi4py: pip install 'tfdist[mpi]', or choose 'auto'"
            )

    @property
    def uses_mpi(self) -> bool:
        """Whether the tasks can find each other by MPI."""
        return (
            self.exchange != "collective"
            and self.strategy in (None, "multiworker")
            and not self.num_ps
            and self.num_workers > 1
            and self.elastic == "restart"
            and importlib.util.find_spec("mpi4py") is not None
        )

    @property
    def has_chief(self) -> bool:
        """Whether there is a chief task of its own, beside the workers."""
        return bool(self.num_ps)

    @property
    def num_tasks(self) -> int:
        """How many processes, all roles together."""
        return self.has_chief + self.num_workers + (self.num_ps or 0)


def parse_num_workers(text: str) -> tuple[int | None, int]:
    """Reads a number of workers, as torchrun's `--nnodes`.

    Args:
        text: `4`, or `2:4` for at least 2 and at most 4.

    Returns:
        The least, None if only the most will do; and the most.

    Raises:
        ConfigError: If it is neither.
    """
    words = text.split(":")
    if len(words) > 2 or not all(word.strip().isdecimal() for word in words):
        raise ConfigError(f"num_workers {text!r}: write a number, or least:most such as 2:4")
    least = int(words[0]) if len(words) == 2 else None
    return least, int(words[-1])


def build_cluster(job: Job, ports: Sequence[int] | None = None) -> Cluster:
    """Gives each task of a job a port on loopback (None: placeholders); the cluster is seen from outside."""
    counts = {"chief": int(job.has_chief), "worker": job.num_workers, "ps": job.num_ps or 0}
    left = iter(ports or range(1, job.num_tasks + 1))
    return Cluster(
        addresses={
            role: tuple(f"127.0.0.1:{next(left)}" for _ in range(n)) for role, n in counts.items() if n
        }
    )


def build_python_command(words: Sequence[str], *, module: bool = False) -> list[str]:
    """Makes the command that runs a Python script, or a module, and its arguments with this interpreter."""
    return [sys.executable, *(["-m"] if module else []), *words]


def render_env(
    job: Job, cluster: Cluster, task: Task, *, num_cores: int | None = None, num_sharing: int | None = None
) -> dict[str, str]:
    """Says which environment variables a task gets on top of `job.env`.

    What the user has set stays, except for what describes the cluster.

    Args:
        job: The job.
        cluster: All its tasks.
        task: The one that is to be started.
        num_cores: Of its machine; None: as this one's.
        num_sharing: Workers that share them; None: all.
    """
    cores, sharing = num_cores or count_cores(), num_sharing or job.num_workers
    own = {"TF_CONFIG": render_tf_config(cluster.with_task(task))}
    if job.uses_mpi:
        own |= {PMI_RANK: str(cluster.tasks.index(task)), PMI_SIZE: str(len(cluster.tasks))}
        own |= _render_mpi(job, cluster, is_crowded=sharing > cores)
    shared = render_shared_env(job, cores=cores, cores_per_task=max(1, cores // sharing))
    if "no_grpc_proxy" in shared and not cluster.is_loopback:
        own["no_grpc_proxy"] = ",".join([*filter(None, [job.env.get("no_proxy")]), *cluster.hosts])
    return shared | own


def render_shared_env(job: Job, *, cores: int | None, cores_per_task: int | None) -> dict[str, str]:
    """Says which environment variables every task of a job gets, wherever it runs.

    Args:
        job: The job.
        cores: How many cores a task sees; None if nobody knows.
        cores_per_task: How many of them it should use, unless the job says so.
    """
    added = {
        "GRPC_FAIL_FAST": "use_caller",  # else a call to a server that is not up yet fails at once
        "TFDIST_LAUNCHED": "1",  # so that a task never launches a cluster in its turn
    }
    if job.strategy is not None:
        added["TFDIST_STRATEGY"] = job.strategy
    if job.gpus_per_worker is not None:
        added[PER_WORKER_VARIABLE] = str(job.gpus_per_worker)
    if job.run_dir is not None:
        added["TFDIST_RUN_DIR"] = job.run_dir
    defaults = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"} | ONEDNN
    if job.strategy in ("multiworker", "pipeline"):
        defaults |= _ALLOCATOR
    if job.env.get("http_proxy") or job.env.get("https_proxy") or job.env.get("grpc_proxy"):
        # gRPC would ask the proxy for 127.0.0.1. This variable is gRPC's own, so nothing else changes.
        kept = job.env.get("no_proxy")
        defaults["no_grpc_proxy"] = f"{kept},127.0.0.1" if kept else "127.0.0.1"
    if job.listen_interface is not None:
        added[LISTEN_VARIABLE] = job.listen_interface
    added.update({name: value for name, value in defaults.items() if not job.env.get(name)})
    return added | _render_threads(job, cores, cores_per_task)


def render_dry_run(job: Job, cluster: Cluster) -> str:
    """Shows what would be started: for each task a comment line and a command that can be pasted into a shell."""
    lines = []
    for task in cluster.tasks:
        variables = [f"{name}={shlex.quote(value)}" for name, value in render_env(job, cluster, task).items()]
        lines += [f"# {task}", " ".join(["env", *variables, shlex.join(job.command)]), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _render_mpi(job: Job, cluster: Cluster, *, is_crowded: bool) -> dict[str, str]:
    """Keeps MPI to the network and the cores that the job has; what the user has set stays."""
    settings = {}
    # UCX, the network part of the `mpich` wheel, listens on every interface, even where all ranks share one memory.
    interface = "lo" if cluster.is_loopback else job.listen_interface
    if interface is not None:
        settings["UCX_NET_DEVICES"] = interface
    if is_crowded:
        # A rank that waits keeps its core busy, which another would need.
        settings["MPIR_CVAR_ENABLE_HEAVY_YIELD"] = "1"
    return {name: value for name, value in settings.items() if not job.env.get(name)}


def _render_threads(job: Job, cores: int | None, cores_per_task: int | None) -> dict[str, str]:
    """Keeps a task to its share of the cores, by thread counts and never by pinning.

    A process that is pinned to one core before TensorFlow starts gets pools so small that ps training hangs.
    """
    intra = job.threads_per_task or cores_per_task
    if intra is None:
        return {}
    inter = max(intra, _MIN_INTEROP_THREADS_PS if job.has_chief else _MIN_INTEROP_THREADS)
    threads = {"OMP_NUM_THREADS": intra, "TF_NUM_INTRAOP_THREADS": intra, "TF_NUM_INTEROP_THREADS": inter}
    if job.has_chief and (cores or intra) < _MIN_INTEROP_THREADS_PS:
        threads["TF_GRPC_WORKER_CACHE_THREADS"] = _MIN_INTEROP_THREADS_PS
    # A flag was given for this very launch; it wins over what an environment carries along.
    told = {"OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"} if job.threads_per_task else set()
    return {name: str(n) for name, n in threads.items() if name in told or not job.env.get(name)}
