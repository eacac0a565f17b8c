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

from tfdist.cluster import STRATEGIES, find_nearest
from tfdist.errors import ConfigError

MODES = ("train", "eval", "predict", "export")
PRECISIONS = ("bfloat16", "float16")
ON_NAN = ("stop", "ignore")
EXPORTS = ("savedmodel",)
VERBOSITIES = (0, 1, 2, "auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes and where it leaves it.

    Names of recipes, optimizers and schedules are checked by those who know them.

    Args:
        recipe: A recipe's name, dotted module or file path.
        global_batch_size: Examples per optimizer step over all replicas.
        epochs: Passes over the training data; the total, resumed epochs included.
        run_dir: The folder of this run.
        strategy: One of `tfdist.cluster.STRATEGIES`.
        mode: One of `MODES`.
        num_workers: Tasks that compute: 1 unless the strategy is multiworker or ps.
        num_ps: Tasks that hold variables: 0 unless the strategy is ps.
        num_replicas: Copies of the model in one process; None takes one per GPU, and without GPUs what the
            strategy finds best.
        steps_per_epoch: Optimizer steps that count as one epoch; None is the whole data.
        seed: Of initial weights, order and dropout.
        data_dir: Where TFDS keeps its datasets; None is TFDS's own folder.
        optimizer: Replaces the optimizer that the recipe compiled in; None keeps it.
        learning_rate: Highest rate; None is the optimizer's or the recipe's own.
        schedule: How the rate moves; None leaves it constant or to the recipe.
        warmup_steps: Steps over which the rate rises from 0.
        weight_decay: Decoupled decay per step; None is the optimizer's own.
        mixed_precision: One of `PRECISIONS`; None computes in float32.
        export: One of `EXPORTS`, besides the `.keras` file; None is none.
        checkpoint_every_steps: Steps between checkpoints; None: at each epoch's end alone.
        checkpoint_every_secs: Seconds between checkpoints; None: at each epoch's end alone.
        keep_checkpoints: How many of the newest checkpoints are kept.
        on_nan: One of `ON_NAN`: what to do when the loss is NaN or infinite.
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
    seed: int = 0
    data_dir: str | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    warmup_steps: int = 0
    weight_decay: float | None = None
    mixed_precision: str | None = None
    export: str | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_every_secs: float | None = None
    keep_checkpoints: int = 3
    on_nan: str = "stop"
    resume: bool = False
    overrides: tuple[str, ...] = ()
    verbose: int | str = "auto"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choices()
        self._check_numbers()
        self._check_sizes()
        self._check_text()

    @classmethod
    def field_names(cls) -> list[str]:
        """Returns the names of all settings."""
        return [field.name for field in dataclasses.fields(cls)]

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
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: it must be 1 or more.")
        for name in ("num_ps", "warmup_steps", "weight_decay", "checkpoint_every_secs"):
            value = getattr(self, name)
            # `not >=` instead of `<`: NaN breaks the rule too.
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name}={value}: it must be 0 or more.")
        if self.learning_rate is not None and not (
            self.learning_rate > 0 and math.isfinite(self.learning_rate)
        ):
            raise ConfigError(f"learning_rate={self.learning_rate}: it must be more than 0.")
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
        if self.num_replicas not in (None, 1) and self.strategy == "one_device":
            raise ConfigError(
                f"num_replicas={self.num_replicas} with strategy='one_device': choose 'mirrored' for several."
            )
        # A ps worker takes a whole global batch: there only the synchronous strategies share one.
        num_parts = 1 if self.strategy == "ps" else self.num_workers * (self.num_replicas or 1)
        if self.global_batch_size < num_parts:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} for {num_parts} replicas: every replica needs an example; "
                f"give {num_parts} or more, or fewer replicas."
            )

    def _check_text(self) -> None:
        for name in ("recipe", "run_dir"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name}={getattr(self, name)!r}: it must not be empty.")
        for override in self.overrides:
            name, equals, _ = override.partition("=")
            if not (equals and name.strip().isidentifier()):
                raise ConfigError(f"override {override!r}: write it as name=value, such as filters=64.")
        if self.optimizer is None:
            for name in ("learning_rate", "schedule", "warmup_steps", "weight_decay"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} without an optimizer: the recipe has compiled its own in; "
                        "name one too, such as --optimizer=adam, or use the recipe's own setting, such as "
                        "--set learning_rate=0.01."
                    )


def default_num_tasks(strategy: str) -> tuple[int, int]:
    """Says how large the cluster is that is started when nobody says.

    Args:
        strategy: One of `tfdist.cluster.STRATEGIES`.

    Returns:
        The number of workers and the number of ps.
    """
    return {"multiworker": (2, 0), "ps": (2, 1)}.get(strategy, (1, 0))


def default_run_dir(recipe: str, strategy: str, now: datetime) -> str:
    """Names the folder of a run that was given none.

    Args:
        recipe: A recipe's name, dotted module or file path.
        strategy: One of `tfdist.cluster.STRATEGIES`.
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
