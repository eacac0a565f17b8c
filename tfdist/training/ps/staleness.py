"""How many optimizer steps others have made between a gradient's reading of the weights and its applying."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals

# What a step reports that has applied nothing.
UNKNOWN = -1.0


class StepStaleness:
    """One step's staleness, asked when its gradients are there, on the worker.

    Args:
        before: The batches counted when the weights were read, by the id of the optimizer's counter.
        num_own: How many of those since are this worker's own.
        period: Batches for each optimizer step.
        applies: Whether this batch is the last of such a step.
        inverse: Scale the learning rate by `1 / (1 + staleness)`.
    """

    def __init__(
        self, *, before: dict[int, Any], num_own: int, period: int, applies: bool, inverse: bool
    ) -> None:
        self._before = before
        self._num_own = num_own
        self._period = period
        self._applies = applies
        self._inverse = inverse
        self.value: Any = tf.constant(UNKNOWN)
        self._is_known = False
        self._graph = tf.compat.v1.get_default_graph()

    def measure(
        self, optimizer: keras.optimizers.Optimizer, grads: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Asks how far the others have come by now; returns a context in which to apply the gradients."""
        counter = keras_internals.batch_counter(optimizer)
        # What is found in a branch of the step's own cannot leave it.
        is_outside = tf.compat.v1.get_default_graph() is not self._graph
        if not self._applies or is_outside or id(counter) not in self._before:
            return contextlib.nullcontext()
        present = [g for g in grads if g is not None]
        with tf.control_dependencies(tf.nest.flatten(present, expand_composites=True)):
            now = keras_internals.native(counter).read_value()
        others = tf.cast(now - self._before[id(counter)], tf.float32) - self._num_own
        staleness = tf.maximum(others, 0.0) / self._period
        if not self._is_known:  # Of several optimizers the first, which has seen the weights that were read.
            self.value, self._is_known = staleness, True
        if not self._inverse:
            return contextlib.nullcontext()
        return keras_internals.scaling_rate(optimizer, 1.0 / (1.0 + staleness))


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean, 95th percentile and, for 0, 1, 2 and so on, how many, of values that are known; {} if none is."""
    known = [value for value in values if value >= 0]
    if not known:
        return {}
    return {
        "staleness_mean": float(np.mean(known)),
        "staleness_p95": float(np.percentile(known, 95)),
        "staleness_counts": np.bincount(np.round(known).astype(int)).tolist(),
    }
