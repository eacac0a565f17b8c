"""Where the tasks of a job on Kubernetes run, and under which names they find each other."""

import dataclasses
import re
from pathlib import PurePosixPath

from tfdist.cluster.spec import Cluster
from tfdist.config.settings import check_settings, setting
from tfdist.errors import ConfigError
from tfdist.launcher.job import Job

JOB_RESTARTS = "batch.kubernetes.io/job-index-failure-count"
JOBSET_RESTARTS = "jobset.sigs.k8s.io/restart-attempt"
INDEX = "batch.kubernetes.io/job-completion-index"
ROLE = "app.kubernetes.io/component"
SCRATCH = "/tmp"  # the only folder that a pod may write, beside its volume
_LETTER_FIRST = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # a Service's name, so the job's too
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DOTTED_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
# What is left of the 63 characters of a host name beside `-worker-0-9999` and the five random ones of a pod's name.
_MAX_NAME = 40
_MEMORY = re.compile(r"\d+(\.\d+)?([KMGT]i?)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pods:
    """Where and in what a job's tasks run: the launcher's flags with --kubernetes.

    Raises:
        ConfigError: If a value breaks a rule of Kubernetes.
    """

    image: str = setting("", help="container image with Python, tfdist and the program")
    namespace: str = setting("default", help="where the pods live (default: default)")
    name: str = setting("tfdist", help="what the job and its pods are called (default: tfdist)")
    cpus: float = setting(2.0, least=0.1, help="cores of each task, and as many threads (default: 2)")
    memory: str = setting("4Gi", help="memory of each task, and its limit, such as 16Gi (default: 4Gi)")
    gpus: int = setting(0, least=0, help="GPUs of each worker (default: 0)")
    volume_claim: str | None = setting(
        None, help="volume that all may write, mounted above --run_dir (default run_dir: /runs/NAME)"
    )
    port: int = setting(2222, help="where each task's server listens (default: 2222)")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.image or any(letter.isspace() for letter in self.image):
            raise ConfigError(
                f"image is {self.image!r}: --kubernetes needs a container image, as in --image=registry/name:tag"
            )
        _check_name(
            "name", self.name, _LETTER_FIRST, _MAX_NAME, "small letters, digits and -, a letter first"
        )
        _check_name("namespace", self.namespace, _NAME, 63, "small letters, digits and -")
        if self.volume_claim is not None:
            _check_name(
                "volume_claim", self.volume_claim, _DOTTED_NAME, 253, "small letters, digits, - and ."
            )
        if not _MEMORY.fullmatch(self.memory):
            raise ConfigError(f"memory is {self.memory!r}: write a size such as 16Gi or 500Mi")
        if not 1024 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}: without root it must be from 1024 to 65535")


def complete_job(job: Job, pods: Pods) -> Job:
    """Gives a job what follows from where it runs: threads, and a run_dir on the shared volume.

    Nothing of this machine's environment comes along.

    Raises:
        ConfigError: If the run_dir would be lost with its pod.
    """
    run_dir = job.run_dir
    if pods.volume_claim is None:
        if run_dir is not None:
            raise ConfigError(
                f"run_dir {run_dir!r} would be lost with its pod: name a volume that all share with --volume_claim"
            )
    else:
        run_dir = run_dir or f"/runs/{pods.name}"
        if str(PurePosixPath(run_dir).parent) in ("/", SCRATCH):
            raise ConfigError(
                f"run_dir is {run_dir!r}: the volume is mounted at the folder above it, "
                f"which cannot be / or {SCRATCH}; write /runs/{pods.name}"
            )
    threads = job.threads_per_task or max(1, int(pods.cpus))
    return dataclasses.replace(job, env={}, run_dir=run_dir, threads_per_task=threads)


def labels(pods: Pods) -> dict[str, str]:
    """Returns the labels that all objects and pods of a job bear, and no other's."""
    return {"app.kubernetes.io/name": "tfdist", "app.kubernetes.io/instance": pods.name}


def build_pod_cluster(job: Job, pods: Pods) -> Cluster:
    """Says under which names the pods of a job find each other; the cluster is seen from outside."""
    counts = {"chief": int(job.has_chief), "worker": job.num_workers, "ps": job.num_ps or 0}
    infix = {role: f"-{role}-0" if job.has_chief else "" for role in counts}
    return Cluster(
        addresses={
            role: tuple(f"{pods.name}{infix[role]}-{i}.{pods.name}:{pods.port}" for i in range(count))
            for role, count in counts.items()
        }
    )


def _check_name(what: str, name: str, pattern: re.Pattern[str], most: int, rule: str) -> None:
    if not pattern.fullmatch(name) or len(name) > most:
        raise ConfigError(f"{what} is {name!r}: write at most {most} {rule}, and no - at an end")
