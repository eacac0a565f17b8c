"""How workers share what they learn in training steps: at each, a step later, once for several, or now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from tfdist import keras_internals
from tfdist.collectives import GradientExchange
from tfdist.config.sync_options import SyncOptions
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


class Found(NamedTuple):
    """What a step has found out about its numbers.

    Attributes:
        step: Zero-based in its epoch: the first that this is about.
        fault: What was wrong.
        loss: The batch's.
    """

    step: int
    fault: int
    loss: float


class Occasion(NamedTuple):
    """What comes behind a step.

    Attributes:
        agrees: Whether the weights must be the same everywhere by then.
        is_saved: Whether, if they agree, a checkpoint follows.
        limit: As `BatchPlan.loss_limit`.
    """

    agrees: bool
    is_saved: bool
    limit: Callable[[], float] | None


class Synchronizer:
    """What a loop asks at each step; this one is of a single worker, whose replicas TensorFlow brings together.

    Attributes:
        options: What crosses between workers; None: nothing.
        reason: What carries it, and why.
        shares_each_step: Whether every step's gradients are exchanged and applied inside it.
    """

    options: SyncOptions | None = None
    reason = ""
    shares_each_step = True

    @property
    def is_local(self) -> bool:
        """Whether the workers step each for itself now."""
        return False

    def start(self) -> None:
        """Begins with the weights that the model has now."""

    def begin_epoch(self) -> None:
        """Starts counting what crosses."""

    def mode(self) -> Any:
        """Chooses what the next step does with its gradients, and returns what tells it from the others."""
        return None

    def after_step(self, found: Found, occasion: Occasion) -> Found:
        """Takes what a step of this worker found, exchanges what is due, and returns what is known on every worker."""
        return found

    def end_epoch(self, *, is_saved: bool) -> None:
        """Brings the workers together where an epoch ended that nobody knew the length of."""

    def measures(self) -> dict[str, Any]:
        """Returns `exchange_mb`: megabytes (10**6 bytes) that this worker has sent in the epoch so far."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint must hold besides the model."""
        return {}

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `state` returned."""


class EveryStep(Synchronizer):
    """Gradients are summed over the workers in each step, and applied there."""

    def __init__(
        self,
        *,
        options: SyncOptions,
        reason: str,
        model: keras.Model,
        step: ReplicaStep,
        exchange: GradientExchange,
    ) -> None:
        self.options, self.reason = options, reason
        self._model = model
        self._step = step
        self._exchange = exchange
        self._shared = AllReducedGradients(exchange, model.trainable_variables)
        self._num_steps = self._num_exchanges = 0

    def start(self) -> None:
        """Begins with the weights that the model has now."""
        optimizer = self._model.optimizer
        self._num_steps = 0 if optimizer is None else int(keras_internals.batch_counter(optimizer).numpy())
        self._exchange.forget()

    def begin_epoch(self) -> None:
        """Starts counting what crosses."""
        self._num_exchanges = 0

    def mode(self) -> Any:
        """Returns that gradients are shared."""
        self._step.gradient_aggregation = self._shared
        return "shared"

    def after_step(self, found: Found, occasion: Occasion) -> Found:
        """Counts the step, and exchanges what is due."""
        self._num_steps += found.fault == SOUND
        found = self._finish(found, occasion)
        if occasion.agrees and occasion.is_saved:
            # What the exchanges have left out is this worker's own, and no checkpoint holds it.
            self._exchange.forget()
        return found

    def _finish(self, found: Found, occasion: Occasion) -> Found:
        self._num_exchanges += 1
        return found

    def end_epoch(self, *, is_saved: bool) -> None:
        """Forgets what exchanges have left out, where a checkpoint follows."""
        if is_saved:
            self._exchange.forget()

    def measures(self) -> dict[str, Any]:
        """Returns `exchange_mb`."""
        return {"exchange_mb": round(self._count_bytes() / 1e6, 3)}

    def _count_bytes(self) -> int:
        return self._num_exchanges * self._exchange.num_bytes


class EveryUpdate(EveryStep):
    """Each worker sums the gradients of several batches, and the sums are exchanged once for each update."""

    shares_each_step = False

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        (optimizer,) = keras_internals.find_optimizers(self._model)
        self._num_accumulated = optimizer.gradient_accumulation_steps
        replicas, found = self._step.replicas, keras_internals.accumulators(optimizer)
        self._accumulated = AccumulatedGradients(
            self._exchange,
            optimizer,
            self._model.trainable_variables,
            {key: replicas.first_local(sums) for key, sums in found.items()},
        )
        self._agree = replicas.build(self._accumulated.agree_in)

    def start(self) -> None:
        """Begins with the weights, and with the sums, that the model has now."""
        super().start()
        self._accumulated.forget()

    def mode(self) -> Any:
        """Returns whether the next batch is the last before an update."""
        self._step.gradient_aggregation = self._accumulated
        self._accumulated.updates = (self._num_steps + 1) % self._num_accumulated == 0
        return "accumulated", self._accumulated.updates

    def _finish(self, found: Found, occasion: Occasion) -> Found:
        self._num_exchanges += self._accumulated.updates
        if occasion.agrees:
            self._agree()
        return found

    def end_epoch(self, *, is_saved: bool) -> None:
        """Puts the sums where a checkpoint finds them."""
        self._agree()
        super().end_epoch(is_saved=is_saved)


class StepLater(EveryStep):
    """Gradients are exchanged while the next step computes, and applied at its end."""

    shares_each_step = False

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        self._delayed = DelayedGradients(self._exchange, self._model.trainable_variables)
        self._late_fault = SOUND

    def start(self) -> None:
        """Begins with the weights that the model has now, and with no gradients that wait."""
        super().start()
        self._delayed.is_waiting = False

    def mode(self) -> Any:
        """Returns whether gradients wait for the next step."""
        self._step.gradient_aggregation = self._delayed
        return "delayed", self._delayed.is_waiting

    def _finish(self, found: Found, occasion: Occasion) -> Found:
        self._num_exchanges += 1
        # What the step reports is about the gradients that it has applied: those of the step before.
        fault, loss = found.fault or self._late_fault, found.loss
        self._late_fault = SOUND
        self._delayed.is_waiting = True
        if occasion.agrees:
            limit = occasion.limit
            rest, loss_of_rest = self._step.apply_waiting(None if limit is None else limit())
            self._delayed.is_waiting = False
            fault, loss = fault or rest, loss if fault else loss_of_rest
        return Found(max(found.step - 1, 0), fault, loss)

    def end_epoch(self, *, is_saved: bool) -> None:
        """Applies the gradients that wait."""
        if self._delayed.is_waiting:
            self._late_fault, _ = self._step.apply_waiting(None)
            self._delayed.is_waiting = False
        super().end_epoch(is_saved=is_saved)


class NowAndThen(EveryStep):
    """The workers step each for itself, from some step on, and their weights come together now and then."""

    shares_each_step = False

    def __init__(
        self, *, local: LocalSteps, all_reduce_sum: Callable[[list[float]], list[float]], **shared: Any
    ) -> None:
        super().__init__(**shared)
        self._local = local
        self._all_reduce_sum = all_reduce_sum
        self._own = LocalGradients()
        self._worst, self._last_loss = SOUND, 0.0
        self._first_unchecked: int | None = None
        self._num_bytes_before = 0

    @property
    def is_local(self) -> bool:
        """Whether the workers step each for itself now."""
        return self._step.gradient_aggregation is self._own

    def start(self) -> None:
        """Begins where the weights are now."""
        super().start()
        self._local.start()

    def begin_epoch(self) -> None:
        """Starts counting what crosses."""
        super().begin_epoch()
        self._num_bytes_before = self._local.num_bytes

    def mode(self) -> Any:
        """Returns whether gradients are shared, or each worker's own."""
        assert self.options is not None
        if self._num_steps < self.options.sync_warmup_steps:
            return super().mode()
        if not self.is_local:
            self._local.start()
        self._step.gradient_aggregation = self._own
        return "own"

    def _finish(self, found: Found, occasion: Occasion) -> Found:
        if not self.is_local:
            return super()._finish(found, occasion)
        if self._first_unchecked is None:
            self._first_unchecked = found.step
        self._worst = max(self._worst, found.fault)
        self._last_loss = found.loss if found.fault == SOUND else self._last_loss
        compares = self._local.after_step()
        if occasion.agrees:
            self._local.agree(with_slots=occasion.is_saved)
        if not (compares or occasion.agrees):
            return Found(found.step, SOUND, self._last_loss)
        first, self._first_unchecked = self._first_unchecked, None
        faults = [float(self._worst == kind) for kind in range(_NUM_FAULTS)]
        counts = self._all_reduce_sum([*faults, found.loss])
        fault = next((kind for kind in range(1, _NUM_FAULTS) if counts[kind]), SOUND)
        self._worst = SOUND
        return Found(first, fault, self._last_loss if fault == SOUND else found.loss)

    def end_epoch(self, *, is_saved: bool) -> None:
        """Gives all workers the same weights."""
        self._local.agree(with_slots=is_saved and self.is_local)
        super().end_epoch(is_saved=is_saved)

    def _count_bytes(self) -> int:
        return super()._count_bytes() + self._local.num_bytes - self._num_bytes_before

    def state(self) -> dict[str, np.ndarray]:
        """Returns the outer optimizer's velocities."""
        return self._local.state()

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `state` returned."""
        self._local.set_state(arrays)
