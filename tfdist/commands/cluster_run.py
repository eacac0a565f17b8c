"""A run of `tfdist.train` on a cluster that is started for it, here or on other hosts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tfdist.commands.flags import build_config
from tfdist.commands.run_report import reporting
from tfdist.config.job_options import JobOptions
from tfdist.config.run_dir import RunDir
from tfdist.config.settings import settings_of
from tfdist.launcher.hosts import read_hosts, read_ssh_options
from tfdist.launcher.job import Job, build_python_command, parse_num_workers
from tfdist.launcher.local import render_dry_run_local, run_local
from tfdist.launcher.process.fork import quiet_imports
from tfdist.recipe import check_recipe_exists, load_recipe

# What every task of a local cluster imports.
_PRELOAD = ("tensorflow", "keras", "tfdist.commands.execute", "tfdist.runtime.server")


def run_cluster(words: Sequence[str], fields: Mapping[str, Any], values: flags.FlagValues) -> int:
    """Starts this command once for each task, or shows how.

    Args:
        words: The command line.
        fields: Of the run's config.
        values: The flags.

    Returns:
        The exit code: 0, or that of the task that failed first.

    Raises:
        ConfigError: If the run or the job cannot be as it was asked for.
    """
    check_recipe_exists(fields["recipe"])
    config = build_config(fields, None)
    if not values.dry_run:
        RunDir(Path(config.run_dir)).check(config)
    # TensorFlow's notes on how it was built would bury ours; whoever wants them has set the variable.
    env = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    command = build_python_command(["tfdist.train", *words, f"--run_dir={config.run_dir}"], module=True)
    options: dict[str, Any] = {name: values[name].value for name in settings_of(JobOptions)}
    job = Job(
        command=[values.python, *command[1:]] if values.python else command,
        num_workers=config.num_workers,
        num_ps=config.num_ps,
        strategy=config.strategy,
        run_dir=config.run_dir,
        env=env,
        min_workers=parse_num_workers(values.num_workers)[0] if values.num_workers else None,
        hosts=read_hosts(values.hosts, values.hostfile),
        ssh=read_ssh_options(values),
        exchange=config.exchange,
        preload=_PRELOAD if values.preload else (),
        **options,
    )
    if values.dry_run:
        print(render_dry_run_local(job))
        if config.strategy == "pipeline":
            _print_stages(fields)
        return 0
    with reporting(config):
        return run_local(job)


def _print_stages(fields: Mapping[str, Any]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with quiet_imports():
        # Here: TensorFlow takes seconds to import.
        from tfdist.commands.stages import describe_stages

        print(describe_stages(build_config(fields, load_recipe(fields["recipe"]))))
