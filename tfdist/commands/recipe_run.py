"""What is done with a recipe on this task: its model is built, trained, evaluated, asked, saved, exported."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.api.run import Run
from tfdist.commands.companion import Companion
from tfdist.commands.environment import describe_environment
from tfdist.commands.keep_best import KeepBest
from tfdist.commands.samples import predict_samples, write_samples
from tfdist.config.run_config import RunConfig, parse_profile
from tfdist.config.run_dir import RunDir, read_object
from tfdist.data.sources.source import Source, build_source
from tfdist.data.sources.tfds import TfdsSplit
from tfdist.errors import ConfigError, TfdistError
from tfdist.launcher.job import RESTART_VARIABLE
from tfdist.optimizers import build_optimizer, rate_factor
from tfdist.recipe import Recipe
from tfdist.reporting import is_wanted
from tfdist.training.checkpoint.store import Checkpoints
from tfdist.training.loop import plan_steps
from tfdist.training.metrics import single_numbers
from tfdist.training.monitoring.callbacks import ConfigFile, MetricsFile, TensorBoardScalars
from tfdist.training.monitoring.profile import ProfileSteps
from tfdist.training.monitoring.progress import ProgressBar

_log = logging.getLogger("tfdist")


class RecipeRun:
    """What is done with a recipe's model and data on this task."""

    def __init__(self, run: Run, recipe: Recipe, config: RunConfig, say: Callable[[str], None]) -> None:
        self._run = run
        self._recipe = recipe
        self._config = config
        self._say = say
        self._run_dir = RunDir(Path(config.run_dir))

    def carry_out(self, overrides: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
        """Does it; returns the test metrics, if the mode has any."""
        model_kwargs, data_kwargs = overrides
        run, recipe, config = self._run, self._recipe, self._config
        if run.is_chief:
            self._run_dir.create(config)
        test = with_data_dir(recipe.build_data("test", **data_kwargs), config)
        if config.mode == "train":
            return self._train(*build_for_training(run, recipe, config, overrides), test)
        with run.strategy.scope():
            model = recipe.build_model(**model_kwargs)
        self._load(model, test)
        if config.mode == "predict":
            self._predict(model, test)
        elif config.mode == "export":
            self._export(test)
        else:
            return self._evaluate(model, test)
        return {}

    def _load(self, model: keras.Model, test: Any) -> None:
        if not self._run_dir.model_file.exists():
            raise ConfigError(
                f"run_dir={self._config.run_dir!r} holds no finished model (model.keras); train there first, "
                "or go on with --mode=train --resume."
            )
        self._run.build(model, test, self._config.global_batch_size)
        with warnings.catch_warnings():
            # Its slots lie in other shards, as the tables may; nothing is trained here.
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            with keras_internals.loading_present():
                model.load_weights(self._run_dir.model_file)

    def _train(self, model: keras.Model, source: Source, test: Any) -> dict[str, Any]:
        run, config, run_dir = self._run, self._config, self._run_dir
        start = time.monotonic()
        with self._evaluator():
            self._fit(model, source, test)
        results = self._evaluate(model, test)
        secs = time.monotonic() - start
        samples = predict_samples(run, model, build_source(test)) if is_wanted(config.report) else None
        try:
            run.save(model, run_dir.model_file)
            if run.is_chief:
                if samples is not None:
                    write_samples(run_dir.samples_file, samples)
                best = read_object(run_dir.best_file)
                run_dir.write_results(
                    {"test": results, "trained_secs": round(secs, 1)} | ({"best": best} if best else {})
                )
        except OSError as error:
            raise TfdistError(
                f"{run_dir.model_file} could not be written ({error.strerror or error}): make room, and run the same "
                "command with --resume."
            ) from error
        if config.export:
            self._export(test)
        self._say(f"trained in {secs:.1f} s; the run is in {run_dir.path}")
        return results

    def _evaluator(self) -> contextlib.AbstractContextManager[Any]:
        if self._config.evaluator != "on" or not self._run.is_chief:
            return contextlib.nullcontext()
        return Companion(self._config, _log.warning)

    def _fit(self, model: keras.Model, source: Source, test: Any) -> None:
        run, config, run_dir = self._run, self._config, self._run_dir
        checkpoints = Checkpoints(
            directory=run_dir.checkpoints_dir,
            every_steps=config.checkpoint_every_steps,
            every_secs=config.checkpoint_every_secs,
            keep=config.keep_checkpoints,
            why=_explain_resume(os.environ),
            config=config.to_dict(),
        )
        if config.resume and run.is_chief and not checkpoints.files():
            self._say(
                f"nothing to resume: {run_dir.path} holds no checkpoint yet; starting at the first epoch"
            )
        self._say(
            f"training {config.recipe} under {run.strategy_name}: {source.num_examples or 'streamed'} examples, "
            f"global batch {config.global_batch_size}, {config.epochs} epochs, "
            f"{keras_internals.count_parameters(model):,} parameters"
        )
        if run.strategy_name == "mirrored" and not tf.config.list_logical_devices("GPU"):
            self._say(
                "mirrored without GPUs is for trying things out: its replicas share the cores; one_device is as fast"
            )
        run.fit(
            model,
            source,
            batch_size=config.global_batch_size,
            epochs=config.epochs,
            steps_per_epoch=config.steps_per_epoch,
            validation_data=test if config.evaluator == "off" else None,
            validation_freq=config.validation_freq,
            callbacks=[
                ProgressBar(),
                ConfigFile(
                    run_dir=run_dir,
                    config=config,
                    environment=describe_environment(run.cluster, self._recipe),
                ),
                MetricsFile(run_dir=run_dir),
                TensorBoardScalars(run_dir=run_dir),
                *_profile(run_dir, config),
                *_keep_best(run_dir, config, run),
            ],
            verbose=config.verbose,
            checkpoints=checkpoints,
            on_nan=config.on_nan,
            max_loss_spike=config.max_loss_spike,
            drop_remainder=config.drop_remainder,
            shard=config.shard,
            data_service=config.data_service,
            # A profile begins and ends between two steps.
            steps_per_loop=1 if config.profile and config.strategy != "ps" else config.steps_per_loop,
            ps=config.ps_options,
            sync=config.sync_options,
            privacy=config.privacy_options,
            jit_compile=config.jit_compile,
        )

    def _evaluate(self, model: keras.Model, test: Any) -> dict[str, Any]:
        config = self._config
        results = self._run.evaluate(
            model, test, batch_size=config.global_batch_size, verbose=0, return_dict=True, shard=config.shard
        )
        numbers = {name: number for log in results.items() for name, number in single_numbers(*log).items()}
        self._say("test  " + "  ".join(f"{name} {number:.4f}" for name, number in numbers.items()))
        return results

    def _predict(self, model: keras.Model, test: Any) -> None:
        # Here: only this mode handles arrays itself.
        import numpy as np

        outputs = self._run.predict(model, test, batch_size=self._config.global_batch_size)
        if self._run.is_chief:
            path = self._run_dir.path / "predictions.npz"
            named = outputs if isinstance(outputs, dict) else {"predictions": outputs}
            np.savez(path, **named)
            self._say(f"predictions are in {path}")

    def _export(self, test: Any) -> None:
        if not self._run.is_chief:
            return
        # Through the file: the copy is made of plain variables, so the SavedModel serves without a cluster.
        with keras.device("cpu:0"):
            plain = keras.models.load_model(self._run_dir.model_file)
        signature = None
        if not hasattr(plain, "inputs"):
            # A subclassed model knows what it takes only once it was called, and Keras exports all of it as float32.
            inputs, _, _ = keras.utils.unpack_x_y_sample_weight(build_source(test).sample_batch(2))
            plain(inputs)
            signature = [tf.nest.map_structure(_input_spec, inputs)]
        plain.export(str(self._run_dir.export_dir), verbose=False, input_signature=signature)
        self._say(f"the SavedModel is in {self._run_dir.export_dir}")


def build_for_training(
    run: Run, recipe: Recipe, config: RunConfig, overrides: tuple[dict[str, Any], dict[str, Any]]
) -> tuple[keras.Model, Source]:
    """Builds a recipe's model, with the config's optimizer, and opens the data that it is trained on.

    Args:
        run: Where.
        recipe: The recipe.
        config: How it is to be trained.
        overrides: Of the recipe's own settings, the model's and the data's.

    Raises:
        ConfigError: If the recipe, or the cluster, does not take a setting.
    """
    model_kwargs, data_kwargs = overrides
    with run.strategy.scope():
        model = recipe.build_model(**model_kwargs)
    source = build_source(with_data_dir(recipe.build_data("train", **data_kwargs), config))
    if config.optimizer is not None:
        with run.strategy.scope():
            keras_internals.set_optimizer(model, _build_optimizer(config.optimizer, config, source))
    run.build(model, source, config.global_batch_size)
    return model, source


def _build_optimizer(name: str, config: RunConfig, source: Source) -> keras.optimizers.Optimizer:
    steps = plan_steps(
        source, config.global_batch_size, config.steps_per_epoch, drop_remainder=config.drop_remainder
    )
    factor = 1.0
    if config.lr_scaling is not None and config.base_batch_size is not None:
        sizes = {"global_batch_size": config.global_batch_size, "base_batch_size": config.base_batch_size}
        factor = rate_factor(config.lr_scaling, **sizes)
    return build_optimizer(
        name,
        learning_rate=config.learning_rate,
        rate_factor=factor,
        schedule=config.schedule or "constant",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        total_steps=None if steps is None else steps * config.epochs,
    )


def _explain_resume(environ: Mapping[str, str]) -> str:
    if int(environ.get(RESTART_VARIABLE) or 0):
        return "the newest that is whole, since the launcher has started this task again"
    if int(environ.get("SLURM_RESTART_COUNT") or 0):
        return "the newest that is whole, since Slurm has started this job again"
    return "the newest that is whole, as --resume asks for"


def _profile(run_dir: RunDir, config: RunConfig) -> list[ProfileSteps]:
    if config.profile is None:
        return []
    first, last = parse_profile(config.profile)
    return [ProfileSteps(log_dir=run_dir.tensorboard_dir, first=first, last=last)]


def _keep_best(run_dir: RunDir, config: RunConfig, run: Run) -> list[KeepBest]:
    if config.keep_best is None or config.evaluator != "off":
        return []
    return [KeepBest(run_dir=run_dir, metric=config.keep_best, is_chief=run.is_chief)]


def _input_spec(batch: tf.Tensor) -> keras.InputSpec:
    return keras.InputSpec(shape=(None, *batch.shape[1:]), dtype=batch.dtype.name)


def with_data_dir(data: Any, config: RunConfig) -> Any:
    """Says to a split of a TFDS dataset where the run keeps datasets."""
    if config.data_dir and isinstance(data, TfdsSplit):
        return dataclasses.replace(data, data_dir=config.data_dir)
    return data
