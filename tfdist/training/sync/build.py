"""Which way of sharing a model's workers get, and what carries it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives import GradientExchange, choose_communicator
from tfdist.config.sync_options import SyncOptions
from tfdist.errors import ConfigError
from tfdist.training.step.replica import ReplicaStep
from tfdist.training.sync.local_steps import GossipSteps, LocalSteps
from tfdist.training.sync.synchronizer import EveryStep, EveryUpdate, NowAndThen, StepLater, Synchronizer


def build_synchronizer(
    options: SyncOptions,
    *,
    model: keras.Model,
    step: ReplicaStep,
    rank: int,
    num_workers: int,
    all_reduce_sum: Callable[[list[float]], list[float]],
) -> Synchronizer:
    """Lets a `ReplicaStep` share as `options` say.

    Args:
        options: What crosses between workers.
        model: Built.
        step: Of the model, on this process's replicas.
        rank: This worker's place.
        num_workers: More than one.
        all_reduce_sum: Returns the sums of some numbers over all processes.

    Raises:
        ConfigError: If the model or the strategy cannot have it.
    """
    replicas = step.replicas
    _check(options, model, replicas.num_local)
    variables = [keras_internals.native(v) for v in model.trainable_variables]
    communicator, reason = choose_communicator(
        options.exchange,
        rank=rank,
        num_workers=num_workers,
        num_local=replicas.num_local,
        num_bytes=sum(v.shape.num_elements() * v.dtype.size for v in variables),
        build=replicas.build,
    )
    step.communicator = communicator if communicator.name == "mpi" else None
    exchange = GradientExchange(communicator, options, variables)
    shared = {"options": options, "reason": reason, "model": model, "step": step, "exchange": exchange}
    if options.sync == "delayed":
        return StepLater(**shared)
    if options.is_local:
        local = (GossipSteps if options.sync == "gossip" else LocalSteps)(
            options=options,
            model=model,
            communicator=communicator,
            build=replicas.build,
            local=functools.partial(replicas.local, index=0),
            num_seen=step.num_seen,
        )
        return NowAndThen(local=local, all_reduce_sum=all_reduce_sum, **shared)
    optimizers = keras_internals.find_optimizers(model)
    is_accumulated = len(optimizers) == 1 and (optimizers[0].gradient_accumulation_steps or 1) > 1
    return (EveryUpdate if is_accumulated and replicas.num_local == 1 else EveryStep)(**shared)


def _check(options: SyncOptions, model: keras.Model, num_local: int) -> None:
    if options.sync == "every_step" and options.compression is None and not options.error_feedback:
        return
    what = f"sync={options.sync!r}" if options.sync != "every_step" else "compression or error_feedback"
    if num_local > 1:
        raise ConfigError(
            f"{what} with {num_local} replicas in each worker: it needs one; give each worker one GPU, or choose "
            "sync='every_step'."
        )
    optimizers = keras_internals.find_optimizers(model)
    if options.sync == "delayed" and len(optimizers) != 1:
        raise ConfigError(
            f"sync='delayed' with {len(optimizers)} optimizers: each would need the other's update; choose another."
        )
    if options.sync == "delayed" and any(o.gradient_accumulation_steps for o in optimizers):
        raise ConfigError(
            "sync='delayed' with gradient_accumulation_steps: leave one of the two out; a larger global_batch_size "
            "does what accumulation does."
        )
    if any(isinstance(v, tf.Variable) and not v.dtype.is_floating for v in model.trainable_variables):
        raise ConfigError(f"{what}: all trainable weights must be floating-point.")
