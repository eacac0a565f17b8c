"""Carries out one `RunConfig` on this task: build, train, evaluate, save. What the commands call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from tfdist import keras_internals
from tfdist.config import RunConfig
from tfdist.data import TfdsSplit, build_source
from tfdist.errors import ConfigError
from tfdist.optimizers import build_optimizer
from tfdist.recipe import Recipe, load_recipe, parse_overrides
from tfdist.runtime import Run, initialize
from tfdist.training.callbacks import MetricsFile, TensorBoardScalars
from tfdist.training.checkpoint_dir import Checkpoints
from tfdist.training.loop import plan_steps
from tfdist.training.progress import ProgressBar
from tfdist.training.run_dir import RunDir


def execute(config: RunConfig, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Carries out a run's mode on this task.

    Args:
        config: What to do.
        say: Takes the few lines meant for a person; called on the chief alone.

    Returns:
        The final test metrics, empty for `predict` and `export`.

    Raises:
        ConfigError: If a setting cannot be honoured.
    """
    recipe = load_recipe(config.recipe)
    overrides = parse_overrides(recipe, config.overrides)
    run = initialize(
        strategy=config.strategy,
        num_replicas=config.num_replicas,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
    )
    results = _carry_out(run, recipe, overrides, config, say if run.is_chief else _say_nothing)
    run.wait_for_others()
    return results


def _carry_out(
    run: Run,
    recipe: Recipe,
    overrides: tuple[dict[str, Any], dict[str, Any]],
    config: RunConfig,
    say: Callable[[str], None],
) -> dict[str, Any]:
    model_kwargs, data_kwargs = overrides
    run_dir = RunDir(Path(config.run_dir))
    if run.is_chief:
        run_dir.create(config)
    test = _with_data_dir(recipe.build_data("test", **data_kwargs), config)
    with run.strategy.scope():
        model = recipe.build_model(**model_kwargs)
    if config.mode == "train":
        train = _with_data_dir(recipe.build_data("train", **data_kwargs), config)
        return _train(run, run_dir, model, train, test, config, say)
    if not run_dir.model_file.exists():
        raise ConfigError(
            f"run_dir={config.run_dir!r} holds no finished model (model.keras); train there first, "
            "or go on with --mode=train --resume."
        )
    run.build(model, test)
    model.load_weights(run_dir.model_file)
    if config.mode == "predict":
        return _predict(run, run_dir, model, test, config, say)
    if config.mode == "export":
        _export(run, run_dir, model, say)
        return {}
    return _report(run.evaluate(model, test, global_batch_size=config.global_batch_size), say)


def _train(
    run: Run,
    run_dir: RunDir,
    model: keras.Model,
    train: Any,
    test: Any,
    config: RunConfig,
    say: Callable[[str], None],
) -> dict[str, Any]:
    source = build_source(train)
    if config.optimizer is not None:
        steps = plan_steps(source, config.global_batch_size, config.steps_per_epoch)
        with run.strategy.scope():
            optimizer = build_optimizer(
                config.optimizer,
                learning_rate=config.learning_rate,
                schedule=config.schedule or "constant",
                warmup_steps=config.warmup_steps,
                weight_decay=config.weight_decay,
                total_steps=None if steps is None else steps * config.epochs,
            )
            keras_internals.set_optimizer(model, optimizer)
    run.build(model, source)
    checkpoints = Checkpoints(
        directory=run_dir.checkpoints_dir,
        every_steps=config.checkpoint_every_steps,
        every_secs=config.checkpoint_every_secs,
        keep=config.keep_checkpoints,
    )
    if config.resume and run.is_chief and not checkpoints.files():
        say(f"nothing to resume: {run_dir.path} holds no checkpoint yet; starting at the first epoch")
    say(
        f"training {config.recipe} under {run.strategy_name}: {source.num_examples or 'streamed'} examples, "
        f"global batch {config.global_batch_size}, {config.epochs} epochs, {model.count_params():,} parameters"
    )
    start = time.monotonic()
    run.fit(
        model,
        source,
        global_batch_size=config.global_batch_size,
        epochs=config.epochs,
        steps_per_epoch=config.steps_per_epoch,
        validation_data=test,
        callbacks=[
            ProgressBar(),
            MetricsFile(run_dir=run_dir),
            TensorBoardScalars(run_dir=run_dir),
        ],
        verbose=config.verbose,
        checkpoints=checkpoints,
        stop_on_nan=config.on_nan == "stop",
    )
    results = _report(run.evaluate(model, test, global_batch_size=config.global_batch_size), say)
    run.save(model, run_dir.model_file)
    if config.export:
        _export(run, run_dir, model, say)
    say(f"trained in {time.monotonic() - start:.1f} s; the run is in {run_dir.path}")
    return results


def _predict(
    run: Run, run_dir: RunDir, model: keras.Model, test: Any, config: RunConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    # Here: only this mode handles arrays itself.
    import numpy as np

    outputs = run.predict(model, test, global_batch_size=config.global_batch_size)
    if run.is_chief:
        path = run_dir.path / "predictions.npz"
        named = outputs if isinstance(outputs, dict) else {"predictions": outputs}
        np.savez(path, **named)
        say(f"predictions are in {path}")
    return {}


def _export(run: Run, run_dir: RunDir, model: keras.Model, say: Callable[[str], None]) -> None:
    if not run.is_chief:
        return
    run.save(model, run_dir.model_file)
    # Through the file: the copy is made of plain variables, so the SavedModel serves without a cluster.
    with keras.device("cpu:0"):
        plain = keras.models.load_model(run_dir.model_file)
    plain.export(str(run_dir.export_dir), verbose=False)
    say(f"the SavedModel is in {run_dir.export_dir}")


def _report(results: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    say("test  " + "  ".join(f"{name} {value:.4f}" for name, value in results.items()))
    return results


def _with_data_dir(data: Any, config: RunConfig) -> Any:
    if config.data_dir and isinstance(data, TfdsSplit):
        return dataclasses.replace(data, data_dir=config.data_dir)
    return data


def _say_nothing(line: str) -> None:
    del line
