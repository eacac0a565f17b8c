"""How the workers of a sync run share what they learn: at each step, a step later, or now and then."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives import GradientExchange, choose_communicator
from tfdist.config.sync_options import SyncOptions
from tfdist.errors import ConfigError
from tfdist.training.step.finite_check import SOUND
from tfdist.training.step.gradient_aggregation import (
    AccumulatedGradients,
    AllReducedGradients,
    DelayedGradients,
    LocalGradients,
)
from tfdist.training.step.replica import ReplicaStep
from tfdist.training.sync.local_steps import LocalSteps

_NUM_FAULTS = 4


class GradientSynchronizer:
    """Lets a `ReplicaStep` share as `options` say; the loop tells it of every step.

    Args:
        options: What crosses between workers.
        model: Built.
        step: Of the model, on this process's replicas.
        rank: This worker's place.
        num_workers: More than one.
        all_reduce_sum: Returns the sums of some numbers over all processes.

    Attributes:
        reason: What carries it, and why.

    Raises:
        ConfigError: If the model or the strategy cannot have it.
    """

    def __init__(
        self,
        *,
        options: SyncOptions,
        model: keras.Model,
        step: ReplicaStep,
        rank: int,
        num_workers: int,
        all_reduce_sum: Callable[[list[float]], list[float]],
    ) -> None:
        self.options = options
        self._model = model
        self._step = step
        self._all_reduce_sum = all_reduce_sum
        _check(options, model, step.replicas.num_local)
        variables = [keras_internals.native(v) for v in model.trainable_variables]
        num_bytes = sum(v.shape.num_elements() * v.dtype.size for v in variables)
        communicator, self.reason = choose_communicator(
            options.exchange,
            rank=rank,
            num_workers=num_workers,
            num_local=step.replicas.num_local,
            num_bytes=num_bytes,
            build=step.replicas.build,
        )
        step.communicator = communicator if communicator.name == "mpi" else None
        self._gradients = GradientExchange(communicator, options, variables)
        self._shared = AllReducedGradients(self._gradients, model.trainable_variables)
        self._accumulated = self._build_accumulated()
        self._delayed: DelayedGradients | None = None
        self._local: LocalSteps | None = None
        if options.sync == "delayed":
            self._delayed = DelayedGradients(self._gradients, model.trainable_variables)
        if options.is_local:
            self._own = LocalGradients()
            self._local = LocalSteps(
                options=options,
                model=model,
                communicator=communicator,
                build=step.replicas.build,
                local=functools.partial(step.replicas.local, index=0),
                num_seen=step.num_seen,
            )
        self._num_steps = 0
        self._worst, self._last_loss = SOUND, 0.0
        self._first_unchecked: int | None = None
        self._num_bytes_before = self._num_shared_steps = 0
        self._late_fault = SOUND

    def _build_accumulated(self) -> AccumulatedGradients | None:
        optimizers = keras_internals.find_optimizers(self._model)
        self._num_accumulated = (len(optimizers) == 1 and optimizers[0].gradient_accumulation_steps) or 1
        if (
            self._num_accumulated == 1
            or self.options.sync != "every_step"
            or self._step.replicas.num_local > 1
        ):
            self._agree_accumulated = None
            return None
        found = keras_internals.accumulators(optimizers[0])
        accumulated = AccumulatedGradients(
            self._gradients,
            optimizers[0],
            self._model.trainable_variables,
            {key: self._step.replicas.first_local(sums) for key, sums in found.items()},
        )
        self._agree_accumulated = self._step.replicas.build(accumulated.agree_in)
        return accumulated

    @property
    def is_local(self) -> bool:
        """Whether the workers step each for itself now."""
        return self._step.gradient_aggregation.is_local

    @property
    def shares_each_step(self) -> bool:
        """Whether every step's gradients are exchanged and applied inside it."""
        return self._delayed is None and self._local is None and self._accumulated is None

    def start(self) -> None:
        """Begins with the weights that the model has now."""
        optimizer = self._model.optimizer
        self._num_steps = 0 if optimizer is None else int(keras_internals.batch_counter(optimizer).numpy())
        self._gradients.forget()
        if self._accumulated is not None:
            self._accumulated.forget()
        if self._local is not None:
            self._local.start()
        if self._delayed is not None:
            self._delayed.is_waiting = False

    def begin_epoch(self) -> None:
        """Starts counting what crosses."""
        self._num_shared_steps = 0
        self._num_bytes_before = 0 if self._local is None else self._local.num_bytes

    def mode(self) -> Any:
        """Chooses what the next step does with its gradients, and returns what tells it from the others."""
        if self._delayed is not None:
            self._step.gradient_aggregation = self._delayed
            return "delayed", self._delayed.is_waiting
        if self._local is not None and self._num_steps >= self.options.sync_warmup_steps:
            if self._step.gradient_aggregation is not self._own:
                self._local.start()
            self._step.gradient_aggregation = self._own
            return "own"
        if self._accumulated is not None:
            self._step.gradient_aggregation = self._accumulated
            self._accumulated.updates = (self._num_steps + 1) % self._num_accumulated == 0
            return "accumulated", self._accumulated.updates
        self._step.gradient_aggregation = self._shared
        return "shared"

    def after_step(
        self,
        step: int,
        fault: int,
        loss: float,
        *,
        agrees: bool,
        is_saved: bool,
        limit: Callable[[], float] | None,
    ) -> tuple[int, int, float]:
        """Takes what a step of this worker found, and exchanges what is due.

        Args:
            step: Zero-based in its epoch.
            fault: What was wrong with its numbers.
            loss: The batch's.
            agrees: Whether the weights must be the same everywhere behind it.
            is_saved: Whether, if they agree, a checkpoint follows.
            limit: As `BatchPlan.loss_limit`.

        Returns:
            The first step that the fault is about, the fault, the same on every worker, and a loss.
        """
        self._num_steps += fault == SOUND
        if self._delayed is not None:
            found = self._after_delayed(step, fault, loss, agrees=agrees, limit=limit)
        elif self._step.gradient_aggregation.is_local:
            found = self._after_own(step, fault, loss, agrees=agrees, is_saved=is_saved)
        else:
            self._num_shared_steps += self._accumulated is None or self._accumulated.updates
            found = step, fault, loss
            if agrees and self._agree_accumulated is not None:
                self._agree_accumulated()
        if agrees and is_saved:
            # What the exchanges have left out is this worker's own, and no checkpoint holds it.
            self._gradients.forget()
        return found

    def end_epoch(self, *, is_saved: bool) -> None:
        """Brings the workers together where an epoch ended that nobody knew the length of."""
        if self._local is not None:
            self._local.agree(with_slots=is_saved and self._step.gradient_aggregation.is_local)
        if self._agree_accumulated is not None:
            self._agree_accumulated()
        if self._delayed is not None and self._delayed.is_waiting:
            self._late_fault, _ = self._step.apply_waiting(None)
            self._delayed.is_waiting = False
        if is_saved:
            self._gradients.forget()

    def measures(self) -> dict[str, Any]:
        """Returns `exchange_mb`: megabytes (10**6 bytes) that this worker has sent in the epoch so far."""
        num_bytes = self._num_shared_steps * self._gradients.num_bytes
        num_bytes += 0 if self._local is None else self._local.num_bytes - self._num_bytes_before
        return {"exchange_mb": round(num_bytes / 1e6, 3)}

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint must hold besides the model."""
        return {} if self._local is None else self._local.state()

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `state` returned."""
        if self._local is not None:
            self._local.set_state(arrays)

    def _after_delayed(
        self, step: int, fault: int, loss: float, *, agrees: bool, limit: Callable[[], float] | None
    ) -> tuple[int, int, float]:
        assert self._delayed is not None
        self._num_shared_steps += 1
        # What the step reports is about the gradients that it has applied: those of the step before.
        first = max(step - 1, 0)
        fault = fault or self._late_fault
        self._late_fault = SOUND
        self._delayed.is_waiting = True
        if agrees:
            rest, loss_of_rest = self._step.apply_waiting(None if limit is None else limit())
            self._delayed.is_waiting = False
            fault, loss = fault or rest, loss if fault else loss_of_rest
        return first, fault, loss

    def _after_own(
        self, step: int, fault: int, loss: float, *, agrees: bool, is_saved: bool
    ) -> tuple[int, int, float]:
        assert self._local is not None
        if self._first_unchecked is None:
            self._first_unchecked = step
        self._worst = max(self._worst, fault)
        self._last_loss = loss if fault == SOUND else self._last_loss
        compares = self._local.after_step()
        if agrees:
            self._local.agree(with_slots=is_saved)
        if not (compares or agrees):
            return step, SOUND, self._last_loss
        first, self._first_unchecked = self._first_unchecked, None
        counts = self._all_reduce_sum([float(self._worst == kind) for kind in range(_NUM_FAULTS)] + [loss])
        found = next((kind for kind in range(1, _NUM_FAULTS) if counts[kind]), SOUND)
        self._worst = SOUND
        return first, found, self._last_loss if found == SOUND else loss


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
