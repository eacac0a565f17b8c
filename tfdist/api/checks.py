"""What `fit` was asked for, held against the strategy, the model's loop and the data before anything is trained."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.config.settings import changed_settings, check_owner
from tfdist.config.sync_options import SyncOptions
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import SelfShardedSource, Source
from tfdist.errors import ConfigError
from tfdist.training.model_loop import Loop
from tfdist.training.monitoring.callbacks import split_callbacks


def check_sync(options: SyncOptions, strategy: str, *, is_elastic: bool) -> None:
    """Checks that workers can share as they are told.

    Args:
        options: What crosses between them.
        strategy: Canonical name.
        is_elastic: Whether workers may come and go in mid-training.

    Raises:
        ConfigError: If they cannot.
    """
    carriers = ("exchange", "bucket_mb")
    check_owner(options, strategy, owner="multiworker", shared=carriers)
    if is_elastic and changed_settings(options, besides=carriers):
        raise ConfigError(
            f"sync={options.sync!r} with elastic='in_process': what workers keep for themselves would be lost with "
            "one of them; choose elastic='restart'."
        )


def choose_steps_per_loop(
    steps_per_loop: int | None, *, on_nan: str, max_loss_spike: float | None, is_elastic: bool
) -> int | None:
    """Returns the steps of a call, one where each must be known before the next begins.

    Raises:
        ConfigError: If several were asked for all the same.
    """
    if on_nan == "skip":
        obstacle = "on_nan='skip'"
    elif max_loss_spike is not None:
        obstacle = f"max_loss_spike={max_loss_spike}"
    elif is_elastic:
        obstacle = "elastic='in_process'"
    else:
        return steps_per_loop
    if steps_per_loop not in (None, 1):
        raise ConfigError(
            f"steps_per_loop={steps_per_loop} with {obstacle}, which must know of each step before the next one "
            "begins: leave one of the two out."
        )
    return 1


def check_batches(
    loop: Loop, source: Source, strategy: str, *, batch_size: int, drop_remainder: bool, on_nan: str
) -> None:
    """Checks what is asked of batches, those too that somebody else makes.

    Raises:
        ConfigError: If replicas would find nothing in them, or workers would find different ones.
    """
    if batch_size < loop.num_replicas:
        raise ConfigError(
            f"batch_size={batch_size} is smaller than the {loop.num_replicas} replicas that share it; take at least "
            f"{loop.num_replicas}."
        )
    if not isinstance(source, BatchedSource):
        return
    if drop_remainder:
        raise ConfigError(
            "drop_remainder with data that yield batches: leave out their last one where they are made, as "
            "dataset.batch(…, drop_remainder=True) does."
        )
    if on_nan == "rollback" and source.peeked is not None:
        raise ConfigError(
            "on_nan='rollback' with a generator, which cannot be read again: choose 'skip', or pass what can be."
        )
    if strategy in ("multiworker", "pipeline"):
        _check_same(loop, source)


def _check_same(loop: Loop, source: BatchedSource) -> None:
    """Makes sure that workers which read the same batches see the same: each takes its part of them."""
    tensors = [t for t in tf.nest.flatten(source.first_batch) if isinstance(t, tf.Tensor)]
    own = float(zlib.crc32(b"".join(np.asarray(t).tobytes() for t in tensors)))
    total, count = loop.all_reduce_sum([own, 1.0])
    if total != own * count:
        raise ConfigError(
            "the workers' first batches differ, and each would take its part of another one: let the data come in "
            "the same order everywhere (a seed for each shuffle), or pass examples and a batch_size."
        )


def check_stages(
    sources: Sequence[Source | None], *, is_served: bool = False, is_elastic: bool = False
) -> None:
    """Checks that all stages of a model see the same batches, and stay.

    Args:
        sources: The data, as they were given.
        is_served: Whether a tf.data service deals them out.
        is_elastic: Whether workers may come and go in mid-training.

    Raises:
        ConfigError: If they do not.
    """
    if is_served:
        raise ConfigError(
            "data_service with strategy='pipeline': it would give each stage other batches, and all need the same; "
            "leave it out."
        )
    if any(isinstance(source, SelfShardedSource) for source in sources):
        raise ConfigError(
            "a function of the input context with strategy='pipeline': it makes each worker's own batches, and all "
            "stages need the same; pass the dataset itself."
        )
    if is_elastic:
        raise ConfigError(
            "elastic='in_process' with strategy='pipeline': who is gone has taken its layers along; choose "
            "elastic='restart'."
        )


def check_callbacks(callbacks: Any, strategy: str) -> None:
    """Checks that callbacks do what they say under a strategy.

    Raises:
        ConfigError: If one cannot.
    """
    everyone, _ = split_callbacks(callbacks, is_chief=True)
    if strategy == "pipeline":
        for callback in everyone:
            if isinstance(callback, (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)):
                raise ConfigError(
                    f"{type(callback).__name__} asks the model for all of its weights, and each stage has its own: "
                    "pass checkpoints=tfdist.Checkpoints(directory=…) to fit, and call run.save."
                )
    if strategy == "multiworker" and any(
        isinstance(callback, keras.callbacks.BackupAndRestore) for callback in everyone
    ):
        raise ConfigError(
            "BackupAndRestore would restore the chief's weights alone, and only whole epochs; leave it out, and "
            "pass checkpoints=tfdist.Checkpoints(directory=…) to fit (--resume on the command line)."
        )
