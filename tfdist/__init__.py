"""Trains Keras 3 models under TensorFlow's distribution strategies.

Names are handed on lazily, so that `import tfdist` alone loads no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfdist.cluster import Cluster, Task, parse_tf_config, render_tf_config
    from tfdist.data import tfds_split
    from tfdist.errors import (
        ClusterError,
        ConfigError,
        LaunchError,
        NonFiniteError,
        Preempted,
        TfdistError,
    )
    from tfdist.recipe import Recipe
    from tfdist.runtime import Run, initialize
    from tfdist.sync_options import SyncOptions
    from tfdist.training.checkpoint_dir import Checkpoints

__version__ = "0.1.0"

_HOMES = {
    "Cluster": "cluster",
    "Task": "cluster",
    "parse_tf_config": "cluster",
    "render_tf_config": "cluster",
    "tfds_split": "data",
    "ClusterError": "errors",
    "ConfigError": "errors",
    "LaunchError": "errors",
    "NonFiniteError": "errors",
    "Preempted": "errors",
    "TfdistError": "errors",
    "Recipe": "recipe",
    "Run": "runtime",
    "Checkpoints": "training.checkpoint_dir",
    "initialize": "runtime",
    "SyncOptions": "sync_options",
}

__all__ = [
    "Checkpoints",
    "Cluster",
    "ClusterError",
    "ConfigError",
    "LaunchError",
    "NonFiniteError",
    "Preempted",
    "Recipe",
    "Run",
    "SyncOptions",
    "Task",
    "TfdistError",
    "initialize",
    "parse_tf_config",
    "render_tf_config",
    "tfds_split",
]


# Whole rooms, for `tfdist.layers.Embedding` after `import tfdist`.
_ROOMS = ("layers", "optimizers")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"tfdist.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'tfdist' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tfdist.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES, *_ROOMS]
