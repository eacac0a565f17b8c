"""The flags of `tfdist.train`, and the `RunConfig` that they and an earlier run's config make."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tfdist.cluster import Cluster, canonical_strategy, find_nearest
from tfdist.config import EXPORTS, MODES, ON_NAN, PRECISIONS, RunConfig, default_num_tasks, default_run_dir
from tfdist.errors import ConfigError
from tfdist.launcher.job import RESTART_VARIABLE
from tfdist.optimizers import OPTIMIZERS, SCHEDULES
from tfdist.recipe import Recipe, resolve_recipe_name
from tfdist.training.run_dir import RunDir

_ALIASES = {"batch_size": "global_batch_size", "model_dir": "run_dir", "np": "num_workers"}
# Stands for a recipe's own batch size where the recipe is not loaded: larger than any number of replicas.
_UNKNOWN_BATCH_SIZE = 2**31
# What another strategy than the earlier run's cannot take over.
_SIZES = ("num_workers", "num_ps", "num_replicas")


def define_flags() -> flags.FlagValues:
    """Returns the flags, not yet parsed."""
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    own: Any = {"flag_values": values}
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
    flags.DEFINE_integer("checkpoint_every_steps", None, "Besides each epoch's end.", **own)
    flags.DEFINE_float("checkpoint_every_secs", None, "Besides each epoch's end.", **own)
    flags.DEFINE_integer("keep_checkpoints", 3, "How many of the newest stay.", **own)
    flags.DEFINE_enum("on_nan", "stop", ON_NAN, "When the loss is NaN or infinite.", **own)
    flags.DEFINE_integer("max_restarts", 3, "How often a local cluster's killed tasks start again.", **own)
    flags.DEFINE_float("grace_secs", 30.0, "Seconds to save the state in, after SIGTERM.", **own)
    flags.DEFINE_multi_string("set", [], "A recipe's own setting, name=value; repeatable.", **own)
    flags.DEFINE_string("verbose", "auto", "0 silent, 1 progress, 2 a line per epoch, auto.", **own)
    flags.DEFINE_bool("list_recipes", False, "Print the recipes and stop.", **own)
    flags.DEFINE_bool("dry_run", False, "Print what would be started and stop.", **own)
    flags.DEFINE_bool("help", False, "Print this help.", short_name="h", **own)
    return values


def parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """Parses a command line; `-` and `_` are the same in names.

    Args:
        argv: Without the program's name.

    Returns:
        The flags.

    Raises:
        Error: `absl.flags.Error` if a flag is unknown or its value malformed.
    """
    values = define_flags()
    rest = values(["tfdist.train", *(_normalise(word) for word in argv)], known_only=True)[1:]
    for word in rest:
        nearest = find_nearest(word.lstrip("-").partition("=")[0], list(values))
        hint = f"did you mean --{nearest}?" if nearest else "--help lists the flags."
        raise flags.Error(f"unknown flag or argument {word!r}; {hint}")
    return values


def resolve_run(
    values: flags.FlagValues, cluster: Cluster | None, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Settles everything but what only the recipe knows, without importing it.

    What no flag says is taken from the earlier run where run_dir's run is gone on with or looked at, so that
    `--mode=eval --run_dir=X` says enough.

    Args:
        values: The flags.
        cluster: That of the environment, or None.
        environ: Where the launcher left the strategy and run_dir.

    Returns:
        Fields of `RunConfig`; `global_batch_size` and `epochs` only if they are known.

    Raises:
        ConfigError: If the strategy is unknown, or there is no run to go on with.
    """
    given = {name: values[name].value for name in values if values[name].present}
    run_dir = values.run_dir or environ.get("TFDIST_RUN_DIR")
    earlier: dict[str, Any] = {}
    # A task that was killed and is started again goes on, if it came as far as to have something to go on with.
    is_restart = int(environ.get(RESTART_VARIABLE) or 0) > 0 and values.mode == "train"
    resume = values.resume or (is_restart and RunDir(Path(str(run_dir))).config_file.exists())
    if resume or values.mode != "train":
        if not run_dir:
            what = "--resume" if values.resume else f"--mode={values.mode}"
            raise ConfigError(f"{what} needs a finished or interrupted run; name its folder with --run_dir.")
        earlier = RunDir(Path(run_dir)).read_config().to_dict()
    told = values.strategy or environ.get("TFDIST_STRATEGY") or earlier.get("strategy")
    strategy = canonical_strategy(told or ("one_device" if cluster is None else _fitting(cluster)))
    if strategy != earlier.get("strategy"):
        earlier = {name: value for name, value in earlier.items() if name not in _SIZES}
    num_workers, num_ps = default_num_tasks(strategy)
    fields = {"num_workers": num_workers, "num_ps": num_ps, "recipe": values.recipe} | earlier
    fields |= {name: value for name, value in given.items() if name in RunConfig.field_names()}
    fields |= {"mode": values.mode, "resume": resume, "strategy": strategy}
    if "set" in given:
        fields["overrides"] = tuple(values.set)
    if str(fields.get("verbose")) in ("0", "1", "2"):
        fields["verbose"] = int(fields["verbose"])
    fields["recipe"] = resolve_recipe_name(fields["recipe"])
    run_dir = run_dir or default_run_dir(fields["recipe"], strategy, datetime.datetime.now())
    return fields | {"run_dir": str(Path(run_dir))}


def build_config(fields: Mapping[str, Any], recipe: Recipe | None) -> RunConfig:
    """Makes the config of what `resolve_run` settled.

    Args:
        fields: Fields of `RunConfig`.
        recipe: Whose batch size and epochs hold where nothing else was said; None if it is not loaded.

    Returns:
        The config; without a recipe only good for checks.

    Raises:
        ConfigError: If a value breaks its rule.
    """
    sizes = {"global_batch_size": _UNKNOWN_BATCH_SIZE, "epochs": 1}
    if recipe is not None:
        sizes = {"global_batch_size": recipe.global_batch_size, "epochs": recipe.epochs}
    return RunConfig(**{**sizes, **fields})


def _fitting(cluster: Cluster) -> str:
    return "ps" if cluster.num_ps else "multiworker"


def _normalise(word: str) -> str:
    """Accepts `-` for `_` in flag names, and the names that other tools use."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{_ALIASES.get(name, name)}{equals}{value}"
