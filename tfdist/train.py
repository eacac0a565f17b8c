"""`python -m tfdist.train`: trains, evaluates, predicts or exports a recipe under any strategy.

python -m tfdist.train                               # digits_cnn on this machine
python -m tfdist.train --strategy=ps --num_workers=2 # a local cluster is started
python -m tfdist.train --recipe=wide_deep --set data=breast_cancer --epochs=3
python -m tfdist.train --mode=eval --run_dir=runs/my_run
python -m tfdist.train --list_recipes
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.spec import CLUSTER_STRATEGIES, EVALUATOR, Cluster, check_strategy, render_tf_config
from tfdist.commands.flags import build_config, collect_settings, parse_flags, resolve_run, settle_words
from tfdist.config.config_file import render_config_file
from tfdist.config.job_options import JobOptions
from tfdist.config.run_config import RunConfig
from tfdist.config.run_dir import RunDir, write_named
from tfdist.config.settings import settings_of
from tfdist.errors import ConfigError, NonFiniteError, OutOfMemoryError, TfdistError
from tfdist.launcher.hosts import read_hosts, read_ssh_options
from tfdist.launcher.job import ONEDNN, Job, build_python_command, parse_num_workers
from tfdist.launcher.local import render_dry_run_local, run_local
from tfdist.launcher.process.fork import quiet_imports
from tfdist.recipe import check_recipe_exists, list_recipes, load_recipe
from tfdist.report import write_report
from tfdist.reporting import is_wanted

# What every task of a local cluster imports.
_PRELOAD = ("tensorflow", "keras", "tfdist.commands.execute", "tfdist.runtime.server")
# How long the others wait for the chief to say what is wrong, and to be ended for it.
_CHIEF_SPEAKS_FIRST_SECS = 20.0
# How long the one who evaluates it waits for a run.
_RUN_BEGINS_SECS = 600.0
_TELL_SECS = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 2 for a mistake in the settings, else the failed task's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cluster = None
    try:
        words = settle_words(words)
        values = parse_flags(words)
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        if values.list_recipes:
            print("\n".join(f"{name:<14} {line}" for name, line in list_recipes()))
            return 0
        if values.write_config:
            _write_config(values)
            return 0
        cluster, fields = _settle_place(values)
        if fields["strategy"] in CLUSTER_STRATEGIES and cluster is None:
            return _launch(words, fields, values)
        if values.dry_run:
            print(_render_place(cluster))
            return 0
        return _execute(fields, cluster)
    except (NonFiniteError, OutOfMemoryError) as error:
        _let_the_chief_speak(cluster)
        print(f"tfdist.train: {error}", file=sys.stderr)
        return 1
    except (TfdistError, flags.Error) as error:
        _let_the_chief_speak(cluster)
        print(f"tfdist.train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tfdist.train: interrupted", file=sys.stderr)
        return 130


def _settle_place(values: flags.FlagValues) -> tuple[Cluster | None, dict[str, Any]]:
    """Returns the cluster that this process is a part of, and what is known of the run."""
    cluster = None
    if values.mode != "follow":  # who does is nobody's peer, wherever it was started
        cluster = detect_cluster(os.environ, strategy=values.strategy, num_ps=values.num_ps)
    if cluster is not None and cluster.task is not None and cluster.task.type == EVALUATOR:
        values["mode"].value = "follow"
    if values.mode == "follow":
        _wait_for_run(values.run_dir or os.environ.get("TFDIST_RUN_DIR"))
        return None, resolve_run(values, None, os.environ)
    fields = resolve_run(values, cluster, os.environ)
    if cluster is not None:
        # Again: an earlier run's strategy may be what deals the roles.
        cluster = detect_cluster(os.environ, strategy=fields["strategy"], num_ps=fields["num_ps"])
        fields |= _count_workers(cluster, fields["strategy"])
    return cluster, fields


def _wait_for_run(folder: str | None) -> None:
    """Waits for a run that begins at the same time elsewhere; of none the one who asks for it says so."""
    start, has_said = time.monotonic(), False
    while folder and not RunDir(Path(folder)).config_file.exists():
        waited_secs = time.monotonic() - start
        if waited_secs > _RUN_BEGINS_SECS:
            return
        if waited_secs > _TELL_SECS and not has_said:
            print(f"evaluator: waiting for a run in {folder}, which is not there yet", flush=True)
            has_said = True
        time.sleep(0.2)


def _write_config(values: flags.FlagValues) -> None:
    path = Path(values.write_config).expanduser()
    if path.exists():
        raise ConfigError(f"write_config={str(path)!r} exists; name another file, or remove it.")
    write_named(path, render_config_file(collect_settings(values)), flag="write_config")
    print(f"the settings are in {path}; python -m tfdist.train --config={path} takes them")


def _launch(words: Sequence[str], fields: Mapping[str, Any], values: flags.FlagValues) -> int:
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
    before = _stamp(config)
    try:
        return run_local(job)
    finally:
        _report(config, before)


def _print_stages(fields: Mapping[str, Any]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with quiet_imports():
        # Here, as in `_execute`.
        from tfdist.commands.stages import describe_stages
        from tfdist.recipe import load_recipe

        print(describe_stages(build_config(fields, load_recipe(fields["recipe"]))))


def _stamp(config: RunConfig) -> tuple[int, int] | None:
    """Returns what changes when a run begins: whoever was refused has changed nothing, and shall not."""
    path = RunDir(Path(config.run_dir)).config_file
    found = path.stat() if path.exists() else None
    return found and (found.st_ino, found.st_mtime_ns)


def _report(config: RunConfig, before: tuple[int, int] | None) -> None:
    """Writes the run's page, of one that has died too; what keeps it from being written ends nothing."""
    if config.mode != "train" or not is_wanted(config.report) or _stamp(config) == before:
        return
    try:
        path = write_report([config.run_dir])
    except Exception as error:  # noqa: BLE001 - the run is what counts
        print(f"tfdist.train: no report ({type(error).__name__}: {error})", file=sys.stderr)
        return
    print(f"the report is in {path}", flush=True)


def _count_workers(cluster: Cluster | None, strategy: str) -> dict[str, int]:
    """Returns how many there are, for a config that shall tell the truth; the launcher has told those it started."""
    if cluster is None or strategy not in CLUSTER_STRATEGIES or "TFDIST_LAUNCHED" in os.environ:
        return {}
    return {"num_workers": (cluster.num_workers if strategy == "ps" else len(cluster.tasks)) or 1}


def _render_place(cluster: Cluster | None) -> str:
    if cluster is None or cluster.task is None:
        return "# nothing to start: this process runs it alone"
    return f"# nothing to start: this process is {cluster.task}\nTF_CONFIG={render_tf_config(cluster)}"


def _execute(fields: Mapping[str, Any], cluster: Cluster | None) -> int:
    for name, value in ({"TF_CPP_MIN_LOG_LEVEL": "3"} | ONEDNN).items():
        os.environ.setdefault(name, value)
    if cluster is not None and cluster.only_serves(fields["strategy"]):
        build_config(fields, None)  # The recipe is the chief's alone.
        _serve(cluster)
    with quiet_imports():
        # Here: TensorFlow takes seconds to import, and a mistake above should not wait for it.
        from tfdist.commands.execute import execute
    config = build_config(fields, load_recipe(fields["recipe"]))
    before = _stamp(config)
    # A launcher does when all have ended.
    reports = "TFDIST_LAUNCHED" not in os.environ and (cluster is None or cluster.is_chief)
    try:
        execute(config, cluster=cluster, say=lambda line: print(line, flush=True))
    except Exception as error:
        if reports and config.mode == "train" and _stamp(config) != before:
            _note_failure(config, error)
        raise
    finally:
        if reports:
            _report(config, before)
    return 0


def _note_failure(config: RunConfig, error: Exception) -> None:
    """Keeps what has ended a run that no launcher watches."""
    with contextlib.suppress(OSError):  # a full disk, maybe
        RunDir(Path(config.run_dir)).write_results({"error": f"{type(error).__name__}: {error}"})


def _serve(cluster: Cluster) -> NoReturn:
    check_strategy(cluster, "ps")
    if importlib.util.find_spec("tf_keras") is None:
        # TensorFlow imports Keras on its own, and that scikit-learn: a second and 90 MB that a server has no use for.
        # With this it looks for the package that is not there, and goes on without.
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
    with quiet_imports():
        # Here, as the variable above must come first.
        from tfdist.runtime.server import serve
    serve(cluster)


def _let_the_chief_speak(cluster: Cluster | None) -> None:
    """Of several launched tasks that make the same mistake one says so: the launcher ends the others meanwhile."""
    if "TFDIST_LAUNCHED" in os.environ and cluster is not None and not cluster.is_chief:
        time.sleep(_CHIEF_SPEAKS_FIRST_SECS)


if __name__ == "__main__":
    sys.exit(main())
