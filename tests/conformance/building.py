"""Builds a model for plain Keras and for a strategy alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def start(strategy: str, parts: str | None) -> Any:
    """Joins the cluster of a world.

    Args:
        strategy: Of the world.
        parts: Replicas of `mirrored`, or `pipeline`'s stages x micro-batches x blocks.
    """
    # Here: plain Keras does without.
    import tfdist

    if strategy == "pipeline":
        num_stages, num_micro_batches, num_blocks = map(int, str(parts).split("x"))
        options = tfdist.PipelineOptions(
            num_stages=num_stages, num_micro_batches=num_micro_batches, tensor_parallel=num_blocks
        )
        return tfdist.initialize(strategy=strategy, seed=1, pipeline=options)
    return tfdist.initialize(strategy=strategy, num_replicas=parts and int(parts), seed=1)


def weights_of(run: Any, model: keras.Model) -> dict[str, np.ndarray]:
    """Returns a model's weights by their places, wherever they are; run None: in plain Keras."""
    # As they are kept: under a strategy a table may lie in several parts.
    is_cut = run is not None and run.strategy_name == "pipeline"
    weights = run.get_weights(model) if is_cut else [v.numpy() for v in model.weights]
    return {f"weight_{i}": np.asarray(weight) for i, weight in enumerate(weights)}


def build_in_scope(run: Any, build: Callable[[], keras.Model]) -> keras.Model:
    """Makes a model from seed 1, in the scope of a run's strategy; None: in plain Keras."""
    keras.utils.set_random_seed(1)
    if run is None:
        return build()
    with run.strategy.scope():
        return build()
