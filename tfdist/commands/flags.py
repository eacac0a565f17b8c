"""The flags of `tfdist.train`, and the `RunConfig` that they and an earlier run's config make."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tfdist.cluster.environments.ranks import read_num_ps
from tfdist.cluster.spec import Cluster, canonical_strategy, find_nearest
from tfdist.config.config_file import render_flags, take_config
from tfdist.config.job_options import TRAIN_DEFAULTS, JobOptions
from tfdist.config.parser import canonical_flag
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.config.ps_options import PsOptions
from tfdist.config.run_config import EVALUATORS, RunConfig, default_num_tasks, default_run_dir
from tfdist.config.run_dir import RunDir
from tfdist.config.settings import Setting, settings_of, types_of
from tfdist.config.sync_options import SyncOptions
from tfdist.errors import ConfigError
from tfdist.launcher.hosts import Host, SshOptions, read_hosts
from tfdist.launcher.job import RESTART_VARIABLE, parse_num_workers
from tfdist.optimizers import LR_SCALINGS, OPTIMIZERS, SCHEDULES
from tfdist.recipe import Recipe, resolve_recipe_name

_ALIASES = {
    "batch_size": "global_batch_size",
    "model_dir": "run_dir",
    "np": "num_workers",
    "preemption_grace_secs": "grace_secs",
}
# Stands for a recipe's own batch size where the recipe is not loaded: larger than any number of replicas.
_UNKNOWN_BATCH_SIZE = 2**31
# What another strategy than the earlier run's cannot take over.
_SIZES = (
    *("num_workers", "num_ps", "num_replicas"),
    *(name for options in (PsOptions, SyncOptions, PipelineOptions) for name in settings_of(options)),
)
# Where the command line says nothing, these are found out: from the environment, the recipe, an earlier run.
_DEFAULTS: dict[str, Any] = {"recipe": "digits_cnn", "strategy": None, "num_ps": None}
# What may be said to a task that evaluates beside the training.
OF_A_FOLLOWER = ("global_batch_size", "data_dir", "keep_best")
# Flags that take more than their setting's values.
_DEFINED_APART = ("resume", "evaluator", "overrides", "verbose", "num_workers")
# What a setting's own module does not know: names, some of which take a number, and choices.
_NAMES = {"optimizer": ", ".join(OPTIMIZERS), "schedule": ", ".join(SCHEDULES)}
_CHOICES = {"lr_scaling": tuple(LR_SCALINGS)}


# What a command is to do, and not how.
_NO_SETTINGS = ("config", "write_config", "help", "h", "list_recipes", "dry_run", "H")


class _WordFlag(flags.BooleanFlag):
    """A boolean flag that may also be one of some words; `values` stand for false and for true."""

    def __init__(self, name: str, words: Sequence[str], values: tuple[Any, Any] = (False, True)) -> None:
        self._words, self._values = words, values  # first: the default is parsed too
        super().__init__(name, values[0], _help_of(name))

    def _parse(self, argument: Any) -> Any:
        return argument if argument in self._words else self._values[bool(super()._parse(argument))]


def _help_of(name: str) -> str:
    return settings_of(RunConfig)[name][1].help


def _define(values: flags.FlagValues, name: str, kinds: set[type], default: Any, rule: Setting) -> None:
    """Defines a setting's flag."""
    own: Any = {"flag_values": values}
    text = f"{rule.help} One of {_NAMES[name]}." if name in _NAMES else rule.help
    choices = rule.choices or _CHOICES.get(name, ())
    # Several names of a strategy are the same.
    if choices and name != "strategy":
        flags.DEFINE_enum(name, default, choices, text, **own)
    elif kinds == {bool}:
        flags.DEFINE_bool(name, default, text, **own)
    elif kinds == {int}:
        flags.DEFINE_integer(name, default, text, **own)
    elif kinds == {float}:
        flags.DEFINE_float(name, default, text, **own)
    else:
        flags.DEFINE_string(name, default, text, **own)


def define_flags() -> flags.FlagValues:
    """Returns the flags, not yet parsed."""
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    own: Any = {"flag_values": values}
    kinds = types_of(RunConfig)
    for name, (field, rule) in settings_of(RunConfig).items():
        if name not in _DEFINED_APART:
            default = None if field.default is dataclasses.MISSING else field.default
            _define(values, name, kinds[name], _DEFAULTS.get(name, default), rule)
    flags.DEFINE_flag(_WordFlag("resume", ("auto",)), **own)
    flags.DEFINE_flag(_WordFlag("evaluator", EVALUATORS, ("off", "on")), **own)
    flags.DEFINE_multi_string("set", [], _help_of("overrides"), **own)
    flags.DEFINE_string("verbose", "auto", _help_of("verbose"), **own)
    flags.DEFINE_string("num_workers", None, _help_of("num_workers"), **own)
    for options in (JobOptions, SshOptions):
        kinds = types_of(options)
        for name, (field, rule) in settings_of(options).items():
            _define(values, name, kinds[name], TRAIN_DEFAULTS.get(name, field.default), rule)
    flags.DEFINE_string(
        "hosts", None, "Run on these machines by ssh: h1:2,h2:4, with slots.", short_name="H", **own
    )
    flags.DEFINE_string("hostfile", None, "File that lists --hosts: a line `h1 slots=2` for each.", **own)
    flags.DEFINE_bool("preload", True, "Import TensorFlow once, and fork a local cluster's tasks.", **own)
    flags.DEFINE_string(
        "config", None, "File of settings, YAML or a run's config.json; what flags say wins.", **own
    )
    flags.DEFINE_string("write_config", None, "Write the settings of this command line, and stop.", **own)
    flags.DEFINE_bool("list_recipes", False, "Print the recipes and stop.", **own)
    flags.DEFINE_bool("dry_run", False, "Print what would be started and stop.", **own)
    flags.DEFINE_bool("help", False, "Print this help.", short_name="h", **own)
    return values


def parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """Parses a command line, given without the program's name.

    Raises:
        Error: `absl.flags.Error` if a flag is unknown or its value malformed.
    """
    values = define_flags()
    rest = values(["tfdist.train", *settle_words(argv)], known_only=True)[1:]
    for word in rest:
        nearest = find_nearest(word.lstrip("-").partition("=")[0], list(values))
        hint = f"did you mean --{nearest}?" if nearest else "--help lists the flags."
        raise flags.Error(f"unknown flag or argument {word!r}; {hint}")
    return values


def settle_words(argv: Sequence[str]) -> list[str]:
    """Returns a command line whose names are those of the flags, with a config file's settings in it.

    Args:
        argv: Without the program's name; `-` and `_` are the same in names.

    Raises:
        ConfigError: If the file that `--config` names cannot be read, or holds what is no setting.
    """
    words = [_normalise(word) for word in argv]
    known = [name for name in define_flags() if name not in _NO_SETTINGS]
    settings, rest = take_config(words, known, canonical=lambda name: _ALIASES.get(name, name))
    strategies = [word.partition("=")[2] for word in rest if word.startswith("--strategy=")]
    own = str(settings.get("strategy", "one_device"))
    if strategies and canonical_strategy(strategies[-1]) != canonical_strategy(own):
        settings = {name: value for name, value in settings.items() if name not in _SIZES}
    # In front of the others, which win.
    return [*render_flags(settings), *rest]


def collect_settings(values: flags.FlagValues) -> dict[str, Any]:
    """Returns what a command line has said, by name, for a config file."""
    given = {name: values[name].value for name in values if values[name].present}
    return {name: value for name, value in given.items() if name not in _NO_SETTINGS}


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
    num_restarts = environ.get(RESTART_VARIABLE) or environ.get("SLURM_RESTART_COUNT") or 0
    is_restart = int(num_restarts) > 0 and values.mode == "train"
    wants_to = values.resume is True
    if values.resume == "auto" or is_restart:
        wants_to |= bool(run_dir) and RunDir(Path(str(run_dir))).config_file.exists()
    resume = wants_to and (values.mode == "train" or values.resume is True)
    if resume or values.mode != "train":
        if not run_dir:
            what = "--resume" if values.resume else f"--mode={values.mode}"
            raise ConfigError(f"{what} needs a finished or interrupted run; name its folder with --run_dir.")
        earlier = RunDir(Path(run_dir)).read_config().to_dict()
    if values.mode == "follow":
        # Alone, whatever the run that it follows: its settings, but for the few that are its own.
        kept = {name: value for name, value in earlier.items() if name not in _SIZES}
        kept |= {name: given[name] for name in OF_A_FOLLOWER if name in given}
        kept |= {"mode": "follow", "strategy": "one_device", "resume": False}
        return kept | {"run_dir": str(Path(str(run_dir)))}
    told = values.strategy or environ.get("TFDIST_STRATEGY") or earlier.get("strategy")
    hosts = read_hosts(values.hosts, values.hostfile)
    alone = "multiworker" if hosts else "one_device"
    strategy = canonical_strategy(told or (alone if cluster is None else cluster.usual_strategy))
    if strategy != earlier.get("strategy"):
        earlier = {name: value for name, value in earlier.items() if name not in _SIZES}
    num_workers, num_ps = default_num_tasks(strategy)
    num_ps = read_num_ps(environ, strategy) or num_ps
    fields = {"num_workers": num_workers, "num_ps": num_ps, "recipe": values.recipe} | earlier
    fields |= {name: value for name, value in given.items() if name in RunConfig.field_names()}
    fields |= _count_workers(values, hosts, fields | {"strategy": strategy})
    fields |= {"mode": values.mode, "resume": resume, "strategy": strategy}
    if "set" in given:
        fields["overrides"] = tuple(values.set)
    if str(fields.get("verbose")) in ("0", "1", "2"):
        fields["verbose"] = int(fields["verbose"])
    fields["recipe"] = resolve_recipe_name(fields["recipe"])
    run_dir = run_dir or default_run_dir(fields["recipe"], strategy, datetime.datetime.now())
    return fields | {"run_dir": str(Path(run_dir))}


def _count_workers(
    values: flags.FlagValues, hosts: Sequence[Host], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns how many workers a command line means, where it says so in whatever words."""
    if values.num_workers is not None:
        num_workers = parse_num_workers(values.num_workers)[1]
    elif hosts:
        num_workers = sum(host.num_slots for host in hosts)
    elif fields["strategy"] == "pipeline" and (values.num_stages or values.tensor_parallel):
        num_workers = (fields.get("num_stages") or 1) * (fields.get("tensor_parallel") or 1)
    else:
        return {}
    return {"num_workers": num_workers}


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
    if fields.get("lr_scaling") and fields.get("base_batch_size") is None:
        fields = {**fields, "base_batch_size": sizes["global_batch_size"]}
    return RunConfig(**{**sizes, **fields})


def _normalise(word: str) -> str:
    """Accepts `-` for `_` in flag names, and the names that other tools use."""
    if not word.startswith("--"):
        return word
    name, equals, value = canonical_flag(word)[2:].partition("=")
    return f"--{_ALIASES.get(name, name)}{equals}{value}"
