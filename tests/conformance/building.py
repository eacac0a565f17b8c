"""Builds a model for plain Keras and for a strategy alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras


def build_in_scope(run: Any, build: Callable[[], keras.Model]) -> keras.Model:
    """Makes a model from seed 1, in the scope of a run's strategy; None: in plain Keras."""
    keras.utils.set_random_seed(1)
    if run is None:
        return build()
    with run.strategy.scope():
        return build()
