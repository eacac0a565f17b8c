"""What a task's devices must be told before TensorFlow starts."""

from __future__ import annotations

import os

import tensorflow as tf

from tfdist.cluster.gpus import DEALT_VARIABLE, VISIBLE_VARIABLE, deal_gpus
from tfdist.cluster.spec import Cluster
from tfdist.errors import ConfigError


def take_gpus(cluster: Cluster, strategy: str) -> None:
    """Lets this process see its own GPUs alone; it must be called before CUDA is asked for any.

    Raises:
        ConfigError: If there are fewer than asked for.
    """
    own = deal_gpus(os.environ, cluster, strategy)
    if own.visible is not None:
        os.environ[VISIBLE_VARIABLE] = own.visible
    if cluster.task is not None:
        os.environ[DEALT_VARIABLE] = "shared" if own.is_shared else "own"


def has_own_gpus() -> bool:
    """Says whether this task computes on GPUs that no other worker uses."""
    return bool(tf.config.list_physical_devices("GPU")) and os.environ.get(DEALT_VARIABLE) != "shared"


def configure_devices(*, strategy: str, num_replicas: int | None, gpu_memory_gb: float | None = None) -> None:
    """Sets what must be set before TensorFlow starts: how much of a GPU it takes, and logical devices.

    Args:
        strategy: Canonical strategy name.
        num_replicas: Replicas that `mirrored` shall have; None means every GPU, or two CPU replicas.
        gpu_memory_gb: Of each GPU, or of each replica where several share one (10**9 bytes); None: what is needed.

    Raises:
        ConfigError: If there are fewer GPUs than replicas, or TensorFlow has already started otherwise.
    """
    gpus = tf.config.list_physical_devices("GPU")
    wanted = num_replicas or len(gpus) or 2
    if gpus:
        _divide_gpus(gpus, wanted if strategy == "mirrored" else len(gpus), gpu_memory_gb)
    elif strategy == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        _set_logical_devices(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted, "CPU")


def _divide_gpus(
    gpus: list[tf.config.PhysicalDevice], num_replicas: int, gpu_memory_gb: float | None
) -> None:
    if gpu_memory_gb is None:
        if num_replicas > len(gpus):
            raise ConfigError(
                f"num_replicas={num_replicas}, but there are {len(gpus)} GPUs: ask for at most that many, or, to try "
                "it out, let several share one: say how much each may take by gpu_memory_gb"
            )
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        return
    limit = tf.config.LogicalDeviceConfiguration(memory_limit=gpu_memory_gb * 1e9 / 2**20)
    each, more = divmod(max(num_replicas, len(gpus)), len(gpus))
    for place, gpu in enumerate(gpus):
        _set_logical_devices(gpu, [limit] * (each + (place < more)), "GPU")


def _set_logical_devices(
    device: tf.config.PhysicalDevice, logical: list[tf.config.LogicalDeviceConfiguration], kind: str
) -> None:
    try:
        tf.config.set_logical_device_configuration(device, logical)
    except RuntimeError:
        have = len(tf.config.list_logical_devices(kind))
        if have < len(logical):
            raise ConfigError(
                f"{len(logical)} {kind} replicas asked for, but TensorFlow has already started with {have}; "
                "call tfdist.initialize before any other TensorFlow operation."
            ) from None
