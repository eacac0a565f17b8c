"""Where a job can run: on this machine or by ssh on others, under Slurm, on Kubernetes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tfdist.cluster.spec import canonical_strategy
from tfdist.config.settings import settings_of
from tfdist.errors import ConfigError
from tfdist.launcher.job import Job
from tfdist.launcher.kubernetes import pods
from tfdist.launcher.kubernetes.manifest import render_kubernetes
from tfdist.launcher.kubernetes.submit import run_kubernetes
from tfdist.launcher.local import render_dry_run_local, run_local
from tfdist.launcher.slurm import script
from tfdist.launcher.slurm.submit import run_slurm

# What the launcher does for processes that it starts itself, and a scheduler does not.
_LOCAL_ONLY = (
    "restart_window_secs", "hang_timeout_secs", "rescale_every_secs", "chaos", "hosts", "hostfile", "listen_interface",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Here:
    """This machine, or the hosts of the job: a place of which nothing more is asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One kind of place where jobs run.

    Attributes:
        help: What its switch does.
        kind: Of place: a dataclass, whose settings are its own flags.
        render: Shows what would run.
        run: Runs a job to its end, and gives its exit code.
        holds_program: Whether the program lies on this machine too, so that it can be looked up here.
    """

    help: str = ""
    kind: type[Any] = Here
    render: Callable[[Job, Any], str]
    run: Callable[[Job, Any], int]
    holds_program: bool = True


LOCAL = Backend(render=lambda job, _: render_dry_run_local(job), run=lambda job, _: run_local(job))
BACKENDS = {
    "slurm": Backend(
        help="submit to Slurm, and follow the job; --max_restarts requeues it",
        kind=script.Allocation,
        render=script.render_sbatch,
        run=run_slurm,
    ),
    "kubernetes": Backend(
        help="hand to the cluster that kubectl knows, and follow the pods",
        kind=pods.Pods,
        render=render_kubernetes,
        run=run_kubernetes,
        holds_program=False,
    ),
}


def choose_backend(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Backend, Any]:
    """Chooses the backend that was asked for, and makes its place.

    Args:
        values: All flags, by their names; None where a backend's own was not given.
        defaults: What they are if nobody says anything.

    Raises:
        ConfigError: If two worlds are asked for, or a flag belongs to one that is not.
    """
    chosen = [name for name in BACKENDS if values[name]]
    if len(chosen) > 1:
        raise ConfigError(f"--{' and --'.join(chosen)}: a job runs in one place; choose one")
    backend = BACKENDS[chosen[0]] if chosen else LOCAL
    own = settings_of(backend.kind)
    for name, other in BACKENDS.items():
        for flag in settings_of(other.kind):
            if values[flag] is not None and flag not in own:
                raise ConfigError(f"--{flag} is a flag of --{name}: add --{name}, or leave --{flag} out")
    if chosen:
        for name in _LOCAL_ONLY:
            if values[name] != defaults[name]:
                raise ConfigError(
                    f"--{name} is for processes on this machine: leave it out with --{chosen[0]}"
                )
        if ":" in (values["num_workers"] or ""):
            raise ConfigError(
                f"num_workers is {values['num_workers']!r}: with --{chosen[0]} write one number"
            )
    return backend, backend.kind(**{flag: values[flag] for flag in own if values[flag] is not None})


def count_workers(values: Mapping[str, Any], place: Any) -> str:
    """Says how many workers there are where nobody has: what fills a Slurm job's machines, else one."""
    num_tasks = place.num_tasks if isinstance(place, script.Allocation) else None
    if num_tasks is None:
        return "1"
    is_ps = values["strategy"] is not None and canonical_strategy(values["strategy"]) == "ps"
    num_ps = int(is_ps) if values["num_ps"] is None else values["num_ps"]
    return str(max(1, num_tasks - num_ps - bool(num_ps)))
