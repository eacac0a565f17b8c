"""`python -m tfdist.train`: trains, evaluates, predicts or exports a recipe under any strategy.

python -m tfdist.train                               # digits_cnn on this machine
python -m tfdist.train --strategy=ps --num_workers=2 # a local cluster is started
python -m tfdist.train --recipe=wide_deep --set data=breast_cancer --epochs=3
python -m tfdist.train --list_recipes
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tfdist.cluster import canonical_strategy, find_nearest
from tfdist.config import EXPORTS, MODES, PRECISIONS, RunConfig, default_num_tasks, default_run_dir
from tfdist.environments import detect_cluster
from tfdist.errors import TfdistError
from tfdist.launcher import Job, build_python_command, render_dry_run_local, run_local
from tfdist.optimizers import OPTIMIZERS, SCHEDULES
from tfdist.recipe import list_recipes, load_recipe, resolve_recipe_name

FLAGS = flags.FlagValues()
_ALIASES = {"batch_size": "global_batch_size", "model_dir": "run_dir", "np": "num_workers"}


def _define_flags() -> None:
    own: Any = {"flag_values": FLAGS}
    flags.DEFINE_string("recipe", "digits_cnn", "Recipe: a name, a dotted module or a file.", **own)
    flags.DEFINE_string("strategy", None, "one_device, mirrored, multiworker or ps (or an alias).", **own)
    flags.DEFINE_enum("mode", "train", MODES, "What to do in run_dir.", **own)
    flags.DEFINE_string("run_dir", None, "Folder of the run. Default: runs/RECIPE-STRATEGY-TIME.", **own)
    flags.DEFINE_bool("resume", False, "Go on from run_dir's checkpoint.", **own)
    flags.DEFINE_integer("num_workers", None, "Workers of a local cluster.", lower_bound=1, **own)
    flags.DEFINE_integer("num_ps", None, "Parameter servers of a local cluster.", lower_bound=1, **own)
    flags.DEFINE_integer("num_replicas", None, "Replicas of mirrored.", lower_bound=1, **own)
    flags.DEFINE_integer("global_batch_size", None, "Examples per step over all replicas.", **own)
    flags.DEFINE_integer("epochs", None, "Epochs, resumed ones included.", **own)
    flags.DEFINE_integer("steps_per_epoch", None, "Steps per epoch. Default: all the data.", **own)
    flags.DEFINE_integer("seed", 0, "Of initial weights, order and dropout.", **own)
    flags.DEFINE_string("data_dir", None, "Folder of TFDS datasets.", **own)
    flags.DEFINE_string("optimizer", None, f"Replaces the recipe's: {', '.join(OPTIMIZERS)}.", **own)
    flags.DEFINE_float("learning_rate", None, "Highest rate of --optimizer.", **own)
    flags.DEFINE_string("schedule", None, f"Of the rate: {', '.join(SCHEDULES)}.", **own)
    flags.DEFINE_integer("warmup_steps", 0, "Steps over which the rate rises.", **own)
    flags.DEFINE_float("weight_decay", None, "Decoupled decay per step.", **own)
    flags.DEFINE_enum("mixed_precision", None, PRECISIONS, "Compute in this type.", **own)
    flags.DEFINE_enum("export", None, EXPORTS, "Write this besides model.keras.", **own)
    flags.DEFINE_multi_string("set", [], "A recipe's own setting, name=value; repeatable.", **own)
    flags.DEFINE_string("verbose", "auto", "0 silent, 1 progress, 2 a line per epoch, auto.", **own)
    flags.DEFINE_bool("list_recipes", False, "Print the recipes and stop.", **own)
    flags.DEFINE_bool("dry_run", False, "Print what would be started and stop.", **own)
    flags.DEFINE_bool("help", False, "Print this help.", short_name="h", **own)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 2 for a mistake in the settings, else the failed task's.
    """
    try:
        _parse([*(sys.argv[1:] if argv is None else argv)])
        if FLAGS.help:
            print(f"{__doc__}\n{FLAGS.get_help()}")
        elif FLAGS.list_recipes:
            print("\n".join(f"{name:<14} {line}" for name, line in list_recipes()))
        else:
            return _run([*(sys.argv[1:] if argv is None else argv)])
    except (TfdistError, flags.Error) as error:
        print(f"tfdist.train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tfdist.train: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(argv: list[str]) -> None:
    if not len(FLAGS):
        _define_flags()
    words = [_normalise(word) for word in argv]
    rest = FLAGS(["tfdist.train", *words], known_only=True)[1:]
    for word in rest:
        name = word.lstrip("-").partition("=")[0]
        nearest = find_nearest(name, list(FLAGS))
        hint = f"did you mean --{nearest}?" if nearest else "--help lists the flags."
        raise flags.Error(f"unknown flag or argument {word!r}; {hint}")


def _normalise(word: str) -> str:
    """Accepts `-` for `_` in flag names, and the names that other tools use."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{_ALIASES.get(name, name)}{equals}{value}"


def _run(argv: list[str]) -> int:
    cluster = detect_cluster(os.environ)
    told = FLAGS.strategy or os.environ.get("TFDIST_STRATEGY")
    strategy = canonical_strategy(told or ("one_device" if cluster is None else _fitting(cluster)))
    recipe = resolve_recipe_name(FLAGS.recipe)
    run_dir = FLAGS.run_dir or os.environ.get("TFDIST_RUN_DIR")
    run_dir = run_dir or default_run_dir(recipe, strategy, datetime.datetime.now())
    # TensorFlow's notes on how it was built would bury ours; whoever wants them has set the variable.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if strategy in ("multiworker", "ps") and cluster is None:
        return _launch(argv, strategy=strategy, run_dir=run_dir)
    config = _build_config(strategy=strategy, run_dir=run_dir)
    # Here: TensorFlow takes seconds to import, and a mistake above should not wait for it.
    from tfdist.execute import execute

    execute(config, say=lambda line: print(line, flush=True))
    return 0


def _fitting(cluster: object) -> str:
    return "ps" if getattr(cluster, "num_ps", 0) else "multiworker"


def _launch(argv: list[str], *, strategy: str, run_dir: str) -> int:
    num_workers, num_ps = default_num_tasks(strategy)
    job = Job(
        command=build_python_command(["tfdist.train", *argv, f"--run_dir={run_dir}"], module=True),
        num_workers=FLAGS.num_workers or num_workers,
        num_ps=FLAGS.num_ps or num_ps,
        strategy=strategy,
        run_dir=run_dir,
    )
    if FLAGS.dry_run:
        print(render_dry_run_local(job))
        return 0
    return run_local(job)


def _build_config(*, strategy: str, run_dir: str) -> RunConfig:
    recipe = load_recipe(FLAGS.recipe)
    num_workers, num_ps = default_num_tasks(strategy)
    verbose = FLAGS.verbose
    return RunConfig(
        recipe=FLAGS.recipe,
        strategy=strategy,
        mode=FLAGS.mode,
        num_workers=FLAGS.num_workers or num_workers,
        num_ps=FLAGS.num_ps or num_ps,
        num_replicas=FLAGS.num_replicas,
        global_batch_size=FLAGS.global_batch_size or recipe.global_batch_size,
        epochs=FLAGS.epochs if FLAGS.epochs is not None else recipe.epochs,
        steps_per_epoch=FLAGS.steps_per_epoch,
        seed=FLAGS.seed,
        run_dir=str(Path(run_dir)),
        data_dir=FLAGS.data_dir,
        optimizer=FLAGS.optimizer,
        learning_rate=FLAGS.learning_rate,
        schedule=FLAGS.schedule,
        warmup_steps=FLAGS.warmup_steps,
        weight_decay=FLAGS.weight_decay,
        mixed_precision=FLAGS.mixed_precision,
        export=FLAGS.export,
        resume=FLAGS.resume,
        overrides=tuple(FLAGS.set),
        verbose=int(verbose) if verbose in ("0", "1", "2") else verbose,
    )


if __name__ == "__main__":
    sys.exit(main())
