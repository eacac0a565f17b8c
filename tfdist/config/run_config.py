"""What a run is: one frozen value, made from flags, kept as `config.json`, checked where it is made."""

import dataclasses
import json
import math
import os
import re
from datetime import datetime
from pathlib import PurePath
from typing import Any

from tfdist.cluster.spec import STRATEGIES, find_nearest, split_address
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.config.privacy_options import PrivacyOptions
from tfdist.config.ps_options import PS_SHARED, PsOptions
from tfdist.config.settings import check_owner, check_settings, setting, settings_of
from tfdist.config.sync_options import SyncOptions
from tfdist.errors import ConfigError

MODES = ("train", "eval", "predict", "export", "follow")
PRECISIONS = ("bfloat16", "float16")
SHARDS = ("auto", "file", "data", "off")
LOCAL_SERVICE = "local"
ON_NAN = ("stop", "skip", "rollback", "ignore")
JIT_COMPILE = ("off", "on", "auto")
EXPORTS = ("savedmodel",)
REPORTS = ("on", "off")
EVALUATORS = ("off", "on", "elsewhere")
VERBOSITIES = (0, 1, 2, "auto")


def check_jit(strategy: str, jit_compile: str | None) -> None:
    """Checks what is asked of XLA.

    Raises:
        ConfigError: If it is none of `JIT_COMPILE`, or the strategy cannot have it.
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

    Raises:
        ConfigError: If it cannot.
    """
    if deterministic and strategy == "ps":
        raise ConfigError(
            "deterministic with strategy='ps': its workers' updates come in whatever order they are ready; choose "
            "another strategy, or leave it out."
        )


# Wide: one field for each setting of a run.
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(SyncOptions, PsOptions, PrivacyOptions, PipelineOptions):
    """Everything that decides what a run computes and where it leaves it, by the names of the flags.

    Each field tells of itself; those of `SyncOptions`, `PsOptions`, `PrivacyOptions` and
    `PipelineOptions` belong to it too. Names of
    recipes, optimizers and schedules are checked by those who know them.

    Raises:
        ConfigError: If a value has another type or breaks its rule.
    """

    recipe: str = setting(help="Recipe: a name, a dotted module or a file.")
    global_batch_size: int = setting(least=1, help="Examples per optimizer step over all replicas.")
    epochs: int = setting(least=1, help="Passes over the training data; the total, resumed ones included.")
    run_dir: str = setting(help="Folder of the run. Default: runs/RECIPE-STRATEGY-TIME.")
    strategy: str = setting(
        "one_device",
        choices=STRATEGIES,
        help="one_device, mirrored, multiworker, ps or pipeline (or an alias).",
    )
    mode: str = setting("train", choices=MODES, help="What to do with the run in run_dir.")
    num_workers: int = setting(
        1, least=1, help="Workers of a local cluster; 2:4 goes on with 2 when some die."
    )
    num_ps: int = setting(
        0, least=0, help="Parameter servers of ps. Default: 1, or what the environment says."
    )
    num_replicas: int | None = setting(
        None, least=1, help="Replicas of mirrored. Default: one per GPU, without GPUs two."
    )
    steps_per_epoch: int | None = setting(
        None, least=1, help="Steps per epoch; the next one goes on with the rest. Default: all the data."
    )
    validation_freq: int = setting(
        1, least=1, help="Epochs from one validation to the next; --evaluator takes each."
    )
    drop_remainder: bool = setting(False, help="Leave out an epoch's last batch if it is short.")
    shard: str = setting(
        "auto",
        choices=SHARDS,
        help="How workers share a stream of examples: by files, by examples, or each reads all.",
    )
    data_service: str | None = setting(
        None, help="A tf.data service prepares the stream: local, or HOST:PORT of its dispatcher."
    )
    seed: int = setting(0, help="Seed of initial weights, order and dropout.")
    data_dir: str | None = setting(
        None, help="Folder of the data: TFDS datasets, or files that the recipe reads."
    )
    optimizer: str | None = setting(None, help="Optimizer in place of the recipe's.")
    learning_rate: float | None = setting(None, above=0, help="Highest learning rate of --optimizer.")
    lr_scaling: str | None = setting(
        None, help="How the learning rate grows with the batch: with it, or with its root."
    )
    base_batch_size: int | None = setting(
        None, least=1, help="Batch for which the learning rate was found. Default: the recipe's."
    )
    schedule: str | None = setting(
        None, help="How the learning rate moves. Default: not at all, or as the recipe says."
    )
    warmup_steps: int = setting(0, least=0, help="Steps over which the learning rate rises from 0.")
    weight_decay: float | None = setting(
        None, least=0, help="Decoupled weight decay per step. Default: the optimizer's own."
    )
    mixed_precision: str | None = setting(
        None, choices=PRECISIONS, help="Compute in this type, with float32 variables."
    )
    export: str | None = setting(None, choices=EXPORTS, help="Format to write besides model.keras.")
    checkpoint_every_steps: int | None = setting(
        None, least=1, help="Save the state after so many steps, too. Default: at each epoch's end."
    )
    checkpoint_every_secs: float | None = setting(
        None, least=0, help="Save the state after so many seconds, too. Default: at each epoch's end."
    )
    keep_checkpoints: int = setting(3, least=1, help="How many of the newest checkpoints are kept.")
    on_nan: str = setting(
        "stop", choices=ON_NAN, help="What to do with a step whose loss or gradients are NaN or infinite."
    )
    max_loss_spike: float | None = setting(
        None, help="A loss of more than so many times its mean counts as NaN."
    )
    jit_compile: str | None = setting(
        None,
        choices=JIT_COMPILE,
        help="Whether XLA compiles forward and backward pass. Default: auto on GPUs.",
    )
    gpu_memory_gb: float | None = setting(
        None,
        above=0,
        help="Memory of a GPU for a process, or a replica that shares it (10**9 bytes). Default: all.",
    )
    deterministic: bool = setting(False, help="The same run gives the same bits, on GPUs too.")
    profile: str | None = setting(None, help="START:STOP: TensorBoard's profile of these steps.")
    resume: bool = setting(
        False, help="Go on from run_dir's checkpoint; --resume=auto starts anew where there is no run yet."
    )
    overrides: tuple[str, ...] = setting((), help="A recipe's own setting, name=value; repeatable.")
    evaluator: str = setting(
        "off",
        choices=EVALUATORS,
        help="Evaluate beside the training, in one more process, and not between epochs. --evaluator=elsewhere: "
        "another task does (--mode=follow, or an evaluator in TF_CONFIG).",
    )
    keep_best: str | None = setting(
        None, help="Keep the model that is best by this number, such as val_accuracy, as best.keras."
    )
    report: str = setting("on", choices=REPORTS, help="Write a page that tells of the run, at its end.")
    verbose: int | str = setting(
        "auto", choices=VERBOSITIES, help="0 silent, 1 progress, 2 a line per epoch, auto."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        # Each checks itself.
        sync, ps = self.sync_options, self.ps_options
        privacy, pipeline = self.privacy_options, self.pipeline_options
        if self.mode == "train":
            privacy.check_run(self.strategy, sync=sync, on_nan=self.on_nan, jit_compile=self.jit_compile)
        self._check_numbers()
        self._check_sizes()
        self._check_devices()
        self._check_text()
        self._check_optimizer()
        check_owner(ps, self.strategy, owner="ps", shared=PS_SHARED)
        check_owner(pipeline, self.strategy, owner="pipeline")
        check_owner(sync, self.strategy, owner="multiworker")

    @classmethod
    def field_names(cls) -> list[str]:
        """Returns the names of all settings."""
        return list(settings_of(cls))

    @property
    def sync_options(self) -> SyncOptions:
        """What crosses between workers, checked."""
        return SyncOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SyncOptions)})

    @property
    def ps_options(self) -> PsOptions:
        """What parameter servers' workers do together, checked."""
        return PsOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PsOptions)})

    @property
    def privacy_options(self) -> PrivacyOptions:
        """What private training is to be, checked."""
        return PrivacyOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PrivacyOptions)})

    @property
    def pipeline_options(self) -> PipelineOptions:
        """How a model is divided into stages, checked."""
        return PipelineOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PipelineOptions)})

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings by name."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in self.field_names()}

    def to_json(self) -> str:
        """Renders the config as indented JSON, every field spelled out; `from_json` undoes it."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Parses what `to_json` rendered.

        Args:
            text: A JSON object whose keys are fields of `RunConfig`.

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
        fields = {name: field for name, (field, _) in settings_of(cls).items()}
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

    def _check_numbers(self) -> None:
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
        if self.strategy == "pipeline":
            layout = self.pipeline_options.layout(self.num_workers)
            if self.global_batch_size < layout.num_copies * layout.num_micro_batches:
                raise ConfigError(
                    f"global_batch_size={self.global_batch_size} with num_micro_batches={layout.num_micro_batches} in "
                    f"each of {layout.num_copies} copies of the model: every micro-batch needs an example; give fewer."
                )
        if self.num_replicas not in (None, 1) and self.strategy == "one_device":
            raise ConfigError(
                f"num_replicas={self.num_replicas} with strategy='one_device': choose 'mirrored' for several."
            )
        # A stage, and an asynchronous ps worker, takes a whole global batch.
        takes_whole = self.strategy == "pipeline" or (self.strategy == "ps" and self.ps_mode == "async")
        num_parts = 1 if takes_whole else self.num_workers * (self.num_replicas or 1)
        if self.global_batch_size < num_parts:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} for {num_parts} replicas: every replica needs an example; "
                f"give {num_parts} or more, or fewer replicas."
            )

    def _check_devices(self) -> None:
        check_deterministic(self.strategy, self.deterministic)
        check_jit(self.strategy, self.jit_compile)
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
    """Returns how many workers and ps are started when nobody says."""
    return {"multiworker": (2, 0), "ps": (2, 1), "pipeline": (2, 0)}.get(strategy, (1, 0))


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
