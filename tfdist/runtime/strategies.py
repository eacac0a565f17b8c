"""Strategy name → `tf.distribute.Strategy`."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster.spec import Cluster
from tfdist.errors import ConfigError
from tfdist.runtime.devices import has_own_gpus


class StagedStrategy:
    """What stands for a `tf.distribute.Strategy` where a model's layers lie in different processes.

    Variables that are made in its scope have no memory until a stage wants them.

    Args:
        workers: The cluster's, by which processes tell each other of losses and states.

    Attributes:
        num_replicas_in_sync: Of the whole model.
    """

    num_replicas_in_sync = 1

    def __init__(self, workers: tf.distribute.MultiWorkerMirroredStrategy) -> None:
        self.workers = workers

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Models are built and compiled inside."""
        return keras_internals.deferring_variables()


def build_strategy(
    *, strategy: str, cluster: Cluster | None, num_replicas: int | None
) -> tf.distribute.Strategy | StagedStrategy:
    """Builds the strategy, TensorFlow's default one for `one_device`; under `multiworker` this waits for every peer.

    Args:
        strategy: Canonical strategy name.
        cluster: The cluster with this process's own task; needed by `multiworker` and `ps`.
        num_replicas: Replicas of `mirrored`; None means every GPU, or two CPU replicas.

    Raises:
        ConfigError: If more replicas are asked for than there are devices.
    """
    if strategy == "one_device":
        return tf.distribute.get_strategy()
    keras_internals.allow_bare_values()
    if strategy == "mirrored":
        mirrored = tf.distribute.MirroredStrategy(_mirrored_devices(num_replicas))
        keras_internals.reuse_instance_keys(mirrored)
        return mirrored
    resolver = _build_resolver(cluster)
    if strategy == "multiworker":
        return _build_multiworker(resolver)
    if strategy == "pipeline":
        return StagedStrategy(_build_multiworker(resolver))
    logging.getLogger("tensorflow").addFilter(_is_not_advice_on_datasets)
    ps_strategy = tf.distribute.ParameterServerStrategy(resolver)
    keras_internals.place_by_bytes(ps_strategy)
    return ps_strategy


def _build_resolver(cluster: Cluster | None) -> tf.distribute.cluster_resolver.SimpleClusterResolver:
    """Returns TensorFlow's form of a cluster with its own task."""
    assert cluster is not None and cluster.task is not None
    spec = tf.train.ClusterSpec({role: list(addresses) for role, addresses in cluster.addresses.items()})
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec, task_type=cluster.task.type, task_id=cluster.task.index, rpc_layer="grpc"
    )


def _is_not_advice_on_datasets(record: logging.LogRecord) -> bool:
    """Tells whether TensorFlow says something else than which of its dataset classes a worker with GPUs should use."""
    return "GPUs are allocated per worker" not in record.getMessage()


def is_peer_loss(error: tf.errors.OpError) -> bool:
    """Says whether an operation failed because another task is gone, and not by a fault of its own."""
    return isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError))


def wait_for_workers(strategy: tf.distribute.Strategy | StagedStrategy) -> None:
    """Returns once every worker of a sync cluster has called it, or one is gone; elsewhere at once.

    A worker that has the result of a collective may still hold what another needs for the same one: where it left now,
    the other's would fail, in 3 of 100 runs on a busy machine.
    """
    strategy = strategy.workers if isinstance(strategy, StagedStrategy) else strategy
    is_alone = not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    if is_alone or strategy.num_replicas_in_sync == len(strategy.extended.worker_devices):
        return
    # Who is gone needs nothing any more.
    with contextlib.suppress(tf.errors.OpError):
        keras_internals.wait_at_barrier()


def _build_multiworker(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> tf.distribute.Strategy:
    options = None
    if tf.config.list_physical_devices("GPU"):
        kinds = tf.distribute.experimental.CommunicationImplementation
        # Left to itself TensorFlow takes its ring for GPUs too. NCCL refuses workers that share one.
        implementation = kinds.NCCL if has_own_gpus() else kinds.RING
        options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(
            cluster_resolver=resolver, communication_options=options
        )
    except RuntimeError as error:
        if "program startup" not in str(error):
            raise
        raise ConfigError(
            "TensorFlow has already started, and multiworker must be set up before that; call tfdist.initialize "
            "first, before any dataset, tensor or model is made."
        ) from None


def _mirrored_devices(num_replicas: int | None) -> list[str]:
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    devices = [f"{kind}:{i}" for i in range(len(tf.config.list_logical_devices(kind)))]
    wanted = num_replicas or (len(devices) if kind == "GPU" else 2)
    if wanted > len(devices):
        raise ConfigError(
            f"num_replicas={wanted}, but there are {len(devices)} {kind} devices; ask for at most that many."
        )
    return devices[:wanted]
