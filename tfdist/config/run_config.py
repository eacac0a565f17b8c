"""What a run is: one frozen value, made from flags, kept as `config.json`, checked where it is made."""

import dataclasses
import json
import math
import os
import re
import types
import typing
from datetime import datetime
from pathlib import PurePath
from typing import Any

from tfdist.cluster.spec import STRATEGIES, find_nearest, split_address
from tfdist.config.sync_options import SyncOptions
from tfdist.errors import ConfigError

MODES = ("train", "eval", "predict", "export")
PRECISIONS = ("bfloat16", "float16")
SHARDS = ("auto", "file", "data", "off")
LOCAL_SERVICE = "local"
ON_NAN = ("stop", "skip", "rollback", "ignore")
PS_MODES = ("async", "sync")
STALENESS_LR = ("inverse",)
JIT_COMPILE = ("off", "on", "auto")
EXPORTS = ("savedmodel",)
VERBOSITIES = (0, 1, 2, "auto")
_SYNC_FIELDS = [field.name for field in dataclasses.fields(SyncOptions)]


def check_jit(strategy: str, jit_compile: str | None) -> None:
    """Checks what is asked of XLA.

    Args:
        strategy: Canonical name.
        jit_compile: One of `JIT_COMPILE`, or None.

    Raises:
        ConfigError: If it is none of them, or the strategy cannot have it.
    """
    if jit_compile not in (None, *JIT_COMPILE):
        raise ConfigError(f"jit_compile={jit_compile!r}: choose one of {', '.join(JIT_COMPILE)}.")
    if jit_compile not in (None, "off") and strategy == "ps":
        raise ConfigError(
            f"jit_compile={jit_compile!r} with strategy='ps': its steps read and write other machines' variables; "
            "leave it out."
        )


def check_deterministic(strategy: str, deterministic: bool) -> None:
    """Checks whether a strategy can give the same bits again.

    Args:
        strategy: Canonical name.
        deterministic: Whether it is to.

    Raises:
        ConfigError: If it cannot.
    """
    if deterministic and strategy == "ps":
        raise ConfigError(
            "deterministic with strategy='ps': its workers' updates come in whatever order they are ready; choose "
            "another strategy, or leave it out."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes and where it leaves it.

    Names of recipes, optimizers and schedules are checked by those who know them.

    Args:
        recipe: A recipe's name, dotted module or file path.
        global_batch_size: Examples per optimizer step over all replicas.
        epochs: Passes over the training data; the total, resumed epochs included.
        run_dir: The folder of this run.
        strategy: One of `tfdist.cluster.spec.STRATEGIES`.
        mode: One of `MODES`.
        num_workers: Tasks that compute: 1 unless the strategy is multiworker or ps.
        num_ps: Tasks that hold variables: 0 unless the strategy is ps.
        num_replicas: Copies of the model in one process; None takes one per GPU, and without GPUs what the
            strategy finds best.
        steps_per_epoch: Optimizer steps that count as one epoch, at most those of the whole data, which None is; the
            next epoch goes on with the rest.
        drop_remainder: Whether an epoch's last batch is left out if it is short.
        shard: One of `SHARDS`: how workers share a stream.
        data_service: "local" or the dispatcher's host:port: a tf.data service prepares the training stream; None: the
            workers do.
        seed: Of initial weights, order and dropout.
        data_dir: Where the data lie, TFDS's or what the recipe reads; None is TFDS's folder, or the recipe's own data.
        optimizer: Replaces the optimizer that the recipe compiled in; None keeps it.
        learning_rate: Highest rate; None is the optimizer's or the recipe's own.
        lr_scaling: How the rate grows with the batch, such as "linear"; None: it does not.
        base_batch_size: With `lr_scaling`, the global batch for which the rate was found.
        schedule: How the rate moves; None leaves it constant or to the recipe.
        warmup_steps: Steps over which the rate rises from 0.
        weight_decay: Decoupled decay per step; None is the optimizer's own.
        mixed_precision: One of `PRECISIONS`; None computes in float32.
        export: One of `EXPORTS`, besides the `.keras` file; None is none.
        checkpoint_every_steps: Steps between checkpoints; None: at each epoch's end alone.
        checkpoint_every_secs: Seconds between checkpoints; None: at each epoch's end alone.
        keep_checkpoints: How many of the newest checkpoints are kept.
        on_nan: One of `ON_NAN`: what to do when a step's loss or gradients are NaN or infinite.
        max_loss_spike: A loss more than this many times its running mean counts as NaN; None: none does.
        ps_mode: One of `PS_MODES`: under ps, whether workers step each for itself or all together.
        steps_per_loop: Steps in one call of a graph, under ps in a worker's closure; None: as many as are worth it.
        max_staleness: Under ps, most optimizer steps of others that a gradient may miss; None: any number.
        staleness_lr: One of `STALENESS_LR`, to scale the rate by a gradient's staleness; None leaves it.
        num_backup_workers: Under ps_mode="sync", how many late workers' parts of a batch are left out.
        sync: How the workers of multiworker share what they learn; see `SyncOptions` for this and those that follow.
        sync_period: Steps between two exchanges of a sync that does not exchange at each.
        sync_warmup_steps: Steps before which it exchanges at each all the same.
        sync_graph: With whom a worker exchanges under sync="gossip".
        outer_learning_rate: Of sync="diloco".
        outer_momentum: Of sync="diloco".
        exchange: What carries gradients from worker to worker.
        exchange_dtype: The type in which they cross.
        error_feedback: Whether what that type leaves out comes with the next step's.
        bucket_mb: In pieces of what size they cross.
        compression: How they are made smaller; None: not at all.
        compression_rank: How small.
        jit_compile: One of `JIT_COMPILE`: whether XLA compiles forward and backward pass; None: on GPUs, if it can.
        gpu_memory_gb: What a process, or a replica that shares a GPU, may take of it (10**9 bytes); None: all it needs.
        deterministic: Whether the same run gives the same bits again, on GPUs too, where that makes it slower.
        profile: "START:STOP": TensorBoard's profile of these steps, counted from 1; None: none.
        resume: Whether to go on from the checkpoints in `run_dir`.
        overrides: The recipe's own settings, each as "name=value".
        verbose: 0 silent, 1 progress, 2 a line per epoch, "auto" as Keras.

    Raises:
        ConfigError: If a value has another type or breaks its rule.
    """

    recipe: str
    global_batch_size: int
    epochs: int
    run_dir: str
    strategy: str = "one_device"
    mode: str = "train"
    num_workers: int = 1
    num_ps: int = 0
    num_replicas: int | None = None
    steps_per_epoch: int | None = None
    drop_remainder: bool = False
    shard: str = "auto"
    data_service: str | None = None
    seed: int = 0
    data_dir: str | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    lr_scaling: str | None = None
    base_batch_size: int | None = None
    schedule: str | None = None
    warmup_steps: int = 0
    weight_decay: float | None = None
    mixed_precision: str | None = None
    export: str | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_every_secs: float | None = None
    keep_checkpoints: int = 3
    on_nan: str = "stop"
    max_loss_spike: float | None = None
    ps_mode: str = "async"
    steps_per_loop: int | None = None
    max_staleness: int | None = None
    staleness_lr: str | None = None
    num_backup_workers: int = 0
    sync: str = SyncOptions.sync
    sync_period: int | None = None
    sync_warmup_steps: int = 0
    sync_graph: str = SyncOptions.sync_graph
    outer_learning_rate: float = SyncOptions.outer_learning_rate
    outer_momentum: float = SyncOptions.outer_momentum
    exchange: str = SyncOptions.exchange
    exchange_dtype: str = SyncOptions.exchange_dtype
    error_feedback: bool = False
    bucket_mb: float = SyncOptions.bucket_mb
    compression: str | None = None
    compression_rank: int = SyncOptions.compression_rank
    jit_compile: str | None = None
    gpu_memory_gb: float | None = None
    deterministic: bool = False
    profile: str | None = None
    resume: bool = False
    overrides: tuple[str, ...] = ()
    verbose: int | str = "auto"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choices()
        self._check_numbers()
        self._check_sizes()
        self._check_devices()
        self._check_backups()
        self._check_text()
        self._check_optimizer()
        if self.sync_options != SyncOptions() and self.strategy != "multiworker":
            raise ConfigError(
                f"{self._first_sync_setting()} with strategy={self.strategy!r}: only 'multiworker' has it; leave it "
                "out."
            )

    @classmethod
    def field_names(cls) -> list[str]:
        """Returns the names of all settings."""
        return [field.name for field in dataclasses.fields(cls)]

    @property
    def sync_options(self) -> SyncOptions:
        """What crosses between workers, checked."""
        return SyncOptions(**{name: getattr(self, name) for name in _SYNC_FIELDS})

    def _first_sync_setting(self) -> str:
        default = SyncOptions()
        changed = [name for name in _SYNC_FIELDS if getattr(self, name) != getattr(default, name)]
        return f"{changed[0]}={getattr(self, changed[0])!r}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings by name."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Renders the config as indented JSON, every field spelled out; `from_json` undoes it."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Parses what `to_json` rendered.

        Args:
            text: A JSON object whose keys are fields of `RunConfig`.

        Returns:
            The same config.

        Raises:
            ConfigError: If it is not a JSON object, names an unknown field, leaves one out that has no
                default, or holds a value that breaks its rule.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"The run's config is not JSON: {error}; restore the file, or start a new run_dir."
            ) from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"The run's config is a JSON {type(values).__name__}; it must be an object of settings."
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values.keys() - fields.keys():
            nearest = find_nearest(name, fields)
            hint = f"did you mean {nearest!r}?" if nearest else f"the settings are {', '.join(fields)}."
            raise ConfigError(f"Unknown setting {name!r} in the run's config; {hint}")
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if missing := sorted(required - values.keys()):
            raise ConfigError(
                f"The run's config lacks {', '.join(missing)}; add them, or start a new run_dir."
            )
        if isinstance(values.get("overrides"), list):
            values["overrides"] = tuple(values["overrides"])
        return cls(**values)

    def _check_types(self) -> None:
        for name, annotation in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _has_type(value, annotation):
                raise ConfigError(f"{name}={value!r}: it must be {_describe_type(annotation)}.")

    def _check_choices(self) -> None:
        for name, choices in (
            ("strategy", STRATEGIES),
            ("mode", MODES),
            ("mixed_precision", (None, *PRECISIONS)),
            ("export", (None, *EXPORTS)),
            ("on_nan", ON_NAN),
            ("shard", SHARDS),
            ("ps_mode", PS_MODES),
            ("staleness_lr", (None, *STALENESS_LR)),
            ("jit_compile", (None, *JIT_COMPILE)),
            ("verbose", VERBOSITIES),
        ):
            value = getattr(self, name)
            if value not in choices:
                known = [str(choice) for choice in choices if choice is not None]
                nearest = find_nearest(str(value), known)
                hint = f" Did you mean {nearest!r}?" if nearest else ""
                raise ConfigError(f"{name}={value!r}: choose one of {', '.join(known)}.{hint}")

    def _check_numbers(self) -> None:
        for name in (
            "global_batch_size",
            "epochs",
            "num_workers",
            "num_replicas",
            "steps_per_epoch",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "base_batch_size",
            "steps_per_loop",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: it must be 1 or more.")
        for name in (
            "num_ps",
            "warmup_steps",
            "weight_decay",
            "checkpoint_every_secs",
            "max_staleness",
            "num_backup_workers",
        ):
            value = getattr(self, name)
            # `not >=` instead of `<`: NaN breaks the rule too.
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name}={value}: it must be 0 or more.")
        if self.learning_rate is not None and not (
            self.learning_rate > 0 and math.isfinite(self.learning_rate)
        ):
            raise ConfigError(f"learning_rate={self.learning_rate}: it must be more than 0.")
        if self.max_loss_spike is not None and not 1 < self.max_loss_spike < math.inf:
            raise ConfigError(
                f"max_loss_spike={self.max_loss_spike}: it must be a factor of more than 1, such as 10."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: Keras takes seeds from 0 to {2**32 - 1}.")

    def _check_sizes(self) -> None:
        if self.strategy == "ps" and self.num_ps < 1:
            raise ConfigError(
                "num_ps=0 with strategy='ps': variables need a task to live on; give num_ps=1 or more."
            )
        if self.strategy != "ps" and self.num_ps:
            raise ConfigError(
                f"num_ps={self.num_ps} with strategy={self.strategy!r}: only 'ps' has them; leave it out."
            )
        if self.strategy in ("one_device", "mirrored") and self.num_workers > 1:
            raise ConfigError(
                f"num_workers={self.num_workers} with strategy={self.strategy!r}: that is one process; leave it out, "
                "or choose 'multiworker' or 'ps'."
            )
        for name in ("max_staleness", "staleness_lr"):
            if self.strategy != "ps" and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} with strategy={self.strategy!r}: only 'ps' has it; leave it out."
                )
        if self.num_replicas not in (None, 1) and self.strategy == "one_device":
            raise ConfigError(
                f"num_replicas={self.num_replicas} with strategy='one_device': choose 'mirrored' for several."
            )
        if self.strategy != "ps" and self.ps_mode != "async":
            raise ConfigError(
                f"ps_mode={self.ps_mode!r} with strategy={self.strategy!r}: only 'ps' has it; leave it out."
            )
        # An asynchronous ps worker takes a whole global batch.
        takes_whole = self.strategy == "ps" and self.ps_mode == "async"
        num_parts = 1 if takes_whole else self.num_workers * (self.num_replicas or 1)
        if self.global_batch_size < num_parts:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} for {num_parts} replicas: every replica needs an example; "
                f"give {num_parts} or more, or fewer replicas."
            )

    def _check_devices(self) -> None:
        check_deterministic(self.strategy, self.deterministic)
        check_jit(self.strategy, self.jit_compile)
        if self.gpu_memory_gb is not None and self.gpu_memory_gb <= 0:
            raise ConfigError(f"gpu_memory_gb={self.gpu_memory_gb}: it must be more than 0.")

    def _check_backups(self) -> None:
        if self.num_backup_workers and self.ps_mode != "sync":
            raise ConfigError(
                f"num_backup_workers={self.num_backup_workers} with ps_mode={self.ps_mode!r}: only ps_mode='sync' has "
                "them; leave it out."
            )
        if self.num_backup_workers >= self.num_workers:
            raise ConfigError(
                f"num_backup_workers={self.num_backup_workers} with num_workers={self.num_workers}: somebody's part "
                f"must count; give at most {self.num_workers - 1}, or more workers."
            )

    def _check_text(self) -> None:
        for name in ("recipe", "run_dir"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name}={getattr(self, name)!r}: it must not be empty.")
        if self.data_service is not None:
            check_data_service(self.data_service)
        if self.profile is not None:
            parse_profile(self.profile)
        for override in self.overrides:
            name, equals, _ = override.partition("=")
            if not (equals and name.strip().isidentifier()):
                raise ConfigError(f"override {override!r}: write it as name=value, such as filters=64.")

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            for name in ("learning_rate", "lr_scaling", "schedule", "warmup_steps", "weight_decay"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} without an optimizer: the recipe has compiled its own in; "
                        "name one too, such as --optimizer=adam, or use the recipe's own setting, such as "
                        "--set learning_rate=0.01."
                    )
        if (self.base_batch_size is None) != (self.lr_scaling is None):
            raise ConfigError(
                f"base_batch_size={self.base_batch_size} with lr_scaling={self.lr_scaling!r}: the one says from which "
                "batch the rate grows, the other how; give both, or leave both out."
            )


def parse_profile(text: str) -> tuple[int, int]:
    """Reads which steps to profile.

    Args:
        text: START:STOP, or one step.

    Returns:
        The first and the last, counted from 1.

    Raises:
        ConfigError: If it is neither.
    """
    first, colon, last = text.partition(":")
    steps = [word.strip() for word in ((first, last) if colon else (first, first))]
    if not all(word.isdecimal() for word in steps) or not 1 <= int(steps[0]) <= int(steps[1]):
        raise ConfigError(f"profile={text!r}: write START:STOP, steps counted from 1, such as 20:30.")
    return int(steps[0]), int(steps[1])


def check_data_service(data_service: str) -> None:
    """Checks how a tf.data service is named.

    Args:
        data_service: "local" or host:port.

    Raises:
        ConfigError: If it is neither.
    """
    if data_service == LOCAL_SERVICE:
        return
    try:
        split_address(data_service)
    except ConfigError as error:
        raise ConfigError(
            f"data_service={data_service!r}: write {LOCAL_SERVICE!r}, or the dispatcher's host:port; {error}"
        ) from None


def default_num_tasks(strategy: str) -> tuple[int, int]:
    """Says how large the cluster is that is started when nobody says.

    Args:
        strategy: One of `tfdist.cluster.spec.STRATEGIES`.

    Returns:
        The number of workers and the number of ps.
    """
    return {"multiworker": (2, 0), "ps": (2, 1)}.get(strategy, (1, 0))


def default_run_dir(recipe: str, strategy: str, now: datetime) -> str:
    """Names the folder of a run that was given none.

    Args:
        recipe: A recipe's name, dotted module or file path.
        strategy: One of `tfdist.cluster.spec.STRATEGIES`.
        now: When the run starts.

    Returns:
        A relative path such as `runs/digits_cnn-ps-20260131-120000`.
    """
    is_file = recipe.endswith(".py") or os.sep in recipe
    short = PurePath(recipe).stem if is_file else recipe.rpartition(".")[2]
    return os.path.join("runs", f"{re.sub(r'[^A-Za-z0-9_-]+', '_', short)}-{strategy}-{now:%Y%m%d-%H%M%S}")


def _has_type(value: Any, annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_has_type(value, member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    # bool is an int to Python; `epochs=True` is a mistake to everyone else.
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))


def _describe_type(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(annotation, types.UnionType):
        return " or ".join(_describe_type(member) for member in typing.get_args(annotation))
    return words.get(annotation, "a tuple of texts")
