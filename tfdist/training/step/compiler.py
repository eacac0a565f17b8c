"""Whether XLA compiles a model's steps: where one device is alone whole ones, elsewhere forward and backward passes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data.sources.source import Source, has_varying_shapes
from tfdist.errors import ConfigError
from tfdist.training.monitoring import clock
from tfdist.training.step.compute import Compute
from tfdist.training.step.replica import ReplicaStep
from tfdist.training.step.single_device import SingleDeviceStep

_log = logging.getLogger("tfdist")
_ON = "jit_compile=on: XLA compiles for the GPU in the first step, which takes longer for it"


class Compiler:
    """Decides on XLA, and gives it up where it has no code for a model and nobody has insisted on it.

    Args:
        model: Built.
        step: What runs it.
        replicas: How many there are, and how many of them in this process.
        all_reduce_sum: Returns the sums of some numbers over all processes.

    Attributes:
        compute: What XLA compiles where replicas meet; None: nothing.
    """

    def __init__(
        self,
        *,
        model: keras.Model,
        step: ReplicaStep | SingleDeviceStep,
        replicas: tuple[int, int],
        all_reduce_sum: Callable[[list[float]], list[float]],
    ) -> None:
        self._model = model
        self._step = step
        self._num_replicas, self._num_local = replicas
        self._all_reduce_sum = all_reduce_sum
        self._alone = isinstance(step, SingleDeviceStep)
        self._asked: tuple[str | None, int] | None = None
        self._choice: bool | None = None if self._alone else False
        self._may_give_up = clock.has_gpu()
        self.compute: Compute | None = None

    @property
    def is_on(self) -> bool:
        """Whether XLA compiles."""
        return bool(self._model.jit_compile) if self._choice is None else self._choice

    def choose(self, jit_compile: str | None, source: Source, global_batch_size: int) -> str:
        """Decides for the steps to come; returns a line that says what was found, empty where nothing was asked for.

        None means as `compile` says where a device is alone, else "auto" on GPUs and "off" on CPUs. "auto" compiles on
        a GPU what can be; on CPUs, where XLA is as often the slower one, it times both on the first examples, and all
        workers take the faster.

        Raises:
            ConfigError: If the model's step cannot be compiled so.
        """
        has_gpu = clock.has_gpu()
        if jit_compile is None and not self._alone:
            jit_compile = "auto" if has_gpu else "off"
        asked = jit_compile, global_batch_size if jit_compile == "auto" else 0
        if asked == self._asked:
            return ""
        self._asked = asked
        self._choice = None if jit_compile is None else jit_compile == "on"
        self._may_give_up = has_gpu and jit_compile != "on"
        self.compute = None
        if jit_compile == "auto":
            return self._if_possible(source) if has_gpu else self._if_faster(source, global_batch_size)
        if self._choice and not self._alone:
            self.compute = Compute(self._model, self._step.metric_names)
        return _ON if has_gpu and self.is_on else ""

    def gives_up(self, error: tf.errors.OpError) -> bool:
        """Tells whether to go on without XLA after a first call that failed so; from then on it is off.

        Raises:
            ConfigError: If XLA has no code for the model, and was insisted on.
        """
        if not self.is_on or not isinstance(
            error, (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError)
        ):
            return False
        found = re.search(r"[Uu]nsupported operations[^:]*: *(\w+)", error.message)
        if not self._may_give_up:
            if found is None:
                return False
            raise ConfigError(
                f"jit_compile=on, but XLA has no code for this model's {found[1]}; pass jit_compile=off, or auto, "
                "which uses XLA where it can."
            ) from error
        self._choice, self.compute = False, None
        why = found[1] if found else error.message.partition("\n")[0][:200]
        _log.warning("jit_compile=off, since XLA has no code for this model: %s", why)
        return True

    def _if_possible(self, source: Source) -> str:
        obstacle = ""
        if not keras_internals.supports_xla(self._model):
            obstacle = "of a layer, or of deterministic operations"
        elif has_varying_shapes(source):
            obstacle = "of examples of many shapes, each of which would be compiled anew"
        elif not self._alone:
            try:
                self.compute = Compute(self._model, self._step.metric_names)
            except ConfigError:
                obstacle = "of a train_step of the model's own, or several optimizers"
        self._choice = not obstacle
        return f"jit_compile=off, because {obstacle}" if obstacle else _ON

    def _if_faster(self, source: Source, global_batch_size: int) -> str:
        compute = Compute(self._model, self._step.metric_names)
        part = source.sample_batch(max(1, global_batch_size // self._num_replicas))
        parts = [part] * self._num_local
        own = [self._step.time_compute(compute, parts, jit=jit) for jit in (False, True)]
        num_workers = self._num_replicas // self._num_local
        plain_secs, jit_secs = (secs / num_workers for secs in self._all_reduce_sum(own))
        self._choice = jit_secs < plain_secs
        self.compute = compute if self._choice and not self._alone else None
        what = "on" if self._choice else "off"
        return f"jit_compile={what}: a pass took {1e3 * plain_secs:.1f} ms without XLA, {1e3 * jit_secs:.1f} ms with it"
