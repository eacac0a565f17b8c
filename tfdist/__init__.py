"""Trains Keras 3 models under TensorFlow's distribution strategies.

Names are handed on lazily, so that `import tfdist` alone loads no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfdist.api.initialize import initialize
    from tfdist.api.run import Run
    from tfdist.cluster.spec import Cluster, Task, parse_tf_config, render_tf_config
    from tfdist.config.pipeline_options import PipelineOptions
    from tfdist.config.privacy_options import PrivacyOptions
    from tfdist.config.ps_options import PsOptions
    from tfdist.config.sync_options import SyncOptions
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
    from tfdist.training.checkpoint.store import Checkpoints

__version__ = "0.2.0"

_HOMES = {
    "Cluster": "cluster.spec",
    "Task": "cluster.spec",
    "parse_tf_config": "cluster.spec",
    "render_tf_config": "cluster.spec",
    "tfds_split": "data",
    "ClusterError": "errors",
    "ConfigError": "errors",
    "LaunchError": "errors",
    "NonFiniteError": "errors",
    "Preempted": "errors",
    "TfdistError": "errors",
    "Recipe": "recipe",
    "Run": "api.run",
    "Checkpoints": "training.checkpoint.store",
    "initialize": "api.initialize",
    "SyncOptions": "config.sync_options",
    "PipelineOptions": "config.pipeline_options",
    "PsOptions": "config.ps_options",
    "PrivacyOptions": "config.privacy_options",
}

__all__ = [
    "Checkpoints",
    "Cluster",
    "ClusterError",
    "ConfigError",
    "LaunchError",
    "NonFiniteError",
    "Preempted",
    "PipelineOptions",
    "PrivacyOptions",
    "PsOptions",
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
