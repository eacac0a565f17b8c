"""What a task's devices must be told before TensorFlow starts."""

from __future__ import annotations

import tensorflow as tf

from tfdist.errors import ConfigError


def configure_devices(*, strategy: str, num_replicas: int | None) -> None:
    """Sets what must be set before TensorFlow starts: GPU memory growth and, without GPUs, logical CPU devices.

    Args:
        strategy: Canonical strategy name.
        num_replicas: Replicas that `mirrored` shall have; None means every GPU, or two CPU replicas.

    Raises:
        ConfigError: If there are fewer GPUs than replicas, or TensorFlow has already started otherwise.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if strategy != "mirrored" or gpus:
        return
    wanted = num_replicas or 2
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
    except RuntimeError:
        have = len(tf.config.list_logical_devices("CPU"))
        if have < wanted:
            raise ConfigError(
                f"{wanted} CPU replicas asked for, but TensorFlow has already started with {have}; "
                "call tfdist.initialize before any other TensorFlow operation."
            ) from None
