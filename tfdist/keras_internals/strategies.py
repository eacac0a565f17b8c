"""TensorFlow's strategies, and what it keeps of a cluster."""

from __future__ import annotations

import functools
import gc
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.distribute import distribute_lib
from tensorflow.python.eager import context
from tensorflow.python.framework.config import is_op_determinism_enabled

from tfdist.keras_internals.attributes import holding

# By its private name: `tf.distribute.get_strategy` makes a graph, with which TensorFlow starts a thread and draws its
# first random names. Processes forked after that would share both.
DEFAULT_STRATEGY: tf.distribute.Strategy = distribute_lib._get_default_strategy()
# A day: whoever waits at a barrier is told at once of a task that dies.
_BARRIER_MSECS = 24 * 60 * 60 * 1000


def is_deterministic() -> bool:
    """Says whether TensorFlow may run deterministic operations alone, as a call or TF_DETERMINISTIC_OPS has told it."""
    return bool(is_op_determinism_enabled())


def forget_cluster() -> None:
    """Lets this process forget its cluster and everything made in it, so that it may join another.

    Leans on `tensorflow.python.eager.context._reset_context`.
    """
    keras.backend.clear_session()
    # What is left of the old cluster would be deleted in the new context, where its devices are unknown.
    gc.collect()
    context._reset_context()


def wait_at_barrier() -> None:
    """Returns once every task of a sync cluster has called it, by TensorFlow's coordination service.

    Leans on `context.wait_at_barrier`. It takes 1 to 4 ms, and Python runs nothing else while it waits.

    Raises:
        tf.errors.OpError: If a task is gone, or the one that keeps the barrier.
    """
    context.context().wait_at_barrier("tfdist", _BARRIER_MSECS)


def is_available(value: tf.distribute.experimental.coordinator.RemoteValue) -> bool:
    """Tells whether a coordinator's closure has ended; its public `get` and `fetch` wait until it has.

    Leans on `RemoteValueImpl._status_available_event`.
    """
    return bool(value._status_available_event.is_set())


def num_ps(strategy: tf.distribute.Strategy) -> int:
    """Returns how many ps tasks hold a strategy's variables, 0 where there are none.

    Leans on `ParameterServerStrategyV2Extended._num_ps`; the strategy's public `cluster_resolver` is None. A cluster is
    needed to make one: `tests/conformance/test_tables.py` fails when a version changes the name.
    """
    if not isinstance(strategy, tf.distribute.ParameterServerStrategy):
        return 0
    return int(strategy.extended._num_ps)


def reuse_instance_keys(strategy: tf.distribute.MirroredStrategy) -> None:
    """Lets a sum keep its number, where TensorFlow gives it another one each step, and 1.6 kB that stay.

    One process traces once for all replicas, which then number alike; workers, who may trace at different times, need
    new ones. So does what changes its shape, as what is gathered does.

    Leans on `MirroredExtended._collective_ops`, its `_launchers`, their `all_reduce` and `_use_unique_instance_key`.
    """
    for launcher in getattr(strategy.extended._collective_ops, "_launchers", ()):
        launcher.all_reduce = functools.partial(_reduce_by_one_key, launcher)


def _reduce_by_one_key(launcher: Any, tensor: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
    with holding(launcher, _use_unique_instance_key=lambda: not tensor.shape.is_fully_defined()):
        return type(launcher).all_reduce(launcher, tensor, *args, **kwargs)


def place_by_bytes(strategy: tf.distribute.ParameterServerStrategy) -> None:
    """Lets every new variable go to the ps task that holds the fewest bytes; TensorFlow deals them out in turn.

    What is created beside another variable, as an optimizer's slots are, stays with that one.

    Leans on `ParameterServerStrategyV2Extended._create_variable`, `._variable_count` and `._num_ps`.
    """
    extended = strategy.extended
    create = extended._create_variable
    num_bytes = [0] * extended._num_ps

    def create_variable(next_creator: Any, **kwargs: Any) -> Any:
        extended._variable_count = num_bytes.index(min(num_bytes))
        variable = create(next_creator, **kwargs)
        place = tf.DeviceSpec.from_string(variable.device)
        if place.job == "ps":
            num_bytes[place.task] += variable.shape.num_elements() * variable.dtype.size
        return variable

    extended._create_variable = create_variable
