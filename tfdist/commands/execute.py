"""Carries out one `RunConfig` on this task, again where the cluster has changed. What the commands call."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist import keras_internals
from tfdist.api.initialize import initialize
from tfdist.api.run import Run
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.cluster.membership import Membership
from tfdist.cluster.spec import Cluster
from tfdist.commands.companion import PARENT_VARIABLE
from tfdist.commands.follow import Follower
from tfdist.commands.recipe_run import RecipeRun, with_data_dir
from tfdist.config.run_config import RunConfig
from tfdist.data.addressed import forget_readers
from tfdist.data.sources.source import build_source
from tfdist.errors import ConfigError, OutOfMemoryError, Regroup
from tfdist.recipe import Recipe, load_recipe, parse_overrides

# How long a task waits for the launcher to say who goes on: as long as another takes to start.
_REGROUP_SECS = 300.0


def execute(
    config: RunConfig, *, cluster: Cluster | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Carries out a run's mode on this task.

    Args:
        config: What to do.
        cluster: With this process's task; None reads it from the environment.
        say: Takes the few lines meant for a person; called on the chief alone.

    Returns:
        The final test metrics, empty for `predict` and `export`.

    Raises:
        ConfigError: If a setting cannot be honoured.
        OutOfMemoryError: If a tensor finds no memory.
    """
    recipe = load_recipe(config.recipe)
    overrides = parse_overrides(recipe, config.overrides, data_dir=config.data_dir)
    members = Membership.from_environment(os.environ) if config.mode == "train" else None
    carried: Any = None
    if members is not None and members.is_joining:
        Heartbeat.from_environment(os.environ).wait()
        cluster = members.wait_for_cluster(timeout_secs=_REGROUP_SECS)
    if config.mode == "follow":
        _follow(recipe, overrides, config, say)
        return {}
    while True:
        try:
            return _carry_out_in(cluster, recipe, overrides, config, say, members, carried)
        except Regroup as regroup:
            carried = regroup.snapshot
        # Outside: nothing that was made in the old cluster, and the exception leads to all of it, may be left.
        assert members is not None
        keras_internals.forget_cluster()
        forget_readers()
        cluster = members.wait_for_cluster(timeout_secs=_REGROUP_SECS)


def _follow(
    recipe: Recipe,
    overrides: tuple[dict[str, Any], dict[str, Any]],
    config: RunConfig,
    say: Callable[[str], None],
) -> None:
    """Evaluates what another process trains."""
    if PARENT_VARIABLE in os.environ:
        os.nice(19)  # what the training leaves
    run = join_cluster(config, Cluster())
    model_kwargs, data_kwargs = overrides
    test = build_source(with_data_dir(recipe.build_data("test", **data_kwargs), config))
    model = recipe.build_model(**model_kwargs)
    run.build(model, test, config.global_batch_size)
    Follower(run, model, test, config, say).follow()


def _carry_out_in(
    cluster: Cluster | None,
    recipe: Recipe,
    overrides: tuple[dict[str, Any], dict[str, Any]],
    config: RunConfig,
    say: Callable[[str], None],
    members: Membership | None,
    carried: Any,
) -> dict[str, Any]:
    run = join_cluster(config, cluster)
    if members is not None:
        run.join(members, carried)
        config = dataclasses.replace(config, resume=config.resume or members.generation > 0)
    try:
        work = RecipeRun(run, recipe, config, say if run.is_chief else lambda line: None)
        results = work.carry_out(overrides)
    except tf.errors.ResourceExhaustedError as error:
        # TensorFlow says it in many lines, and where in the graph; the tensor's shape is in the first.
        found = re.search(r"OOM when allocating.*", error.message) or re.match(r".*", error.message)
        raise OutOfMemoryError(
            f"{run.task or 'this process'} is out of memory: {found[0] if found else ''}; give a smaller "
            "--global_batch_size, a smaller model, --mixed_precision=bfloat16, or more workers."
        ) from error
    except tf.errors.InvalidArgumentError as error:
        # What a layer or a reader of data asserts is said in one line, without the graph around it.
        found = re.search(r"assertion failed: (.*)", error.message)
        if found is None:
            raise
        raise ConfigError(found[1].strip().replace("] [", " ").strip("[]")) from error
    run.wait_for_others()
    return results


def join_cluster(config: RunConfig, cluster: Cluster | None = None) -> Run:
    """Joins a run's cluster, by default the environment's; a task that only serves never returns."""
    return initialize(
        strategy=config.strategy,
        num_replicas=config.num_replicas,
        seed=config.seed,
        cluster=cluster,
        mixed_precision=config.mixed_precision,
        gpu_memory_gb=config.gpu_memory_gb,
        deterministic=config.deterministic,
        pipeline=config.pipeline_options,
    )
