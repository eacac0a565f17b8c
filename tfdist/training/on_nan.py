"""What a fit does with a step whose numbers are not finite: end, leave it out, or go back to the last checkpoint."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tfdist.config.run_config import ON_NAN
from tfdist.data.sources.source import Source
from tfdist.errors import ConfigError, NonFiniteError
from tfdist.training.checkpoint.saver import Saver
from tfdist.training.model_loop import Loop
from tfdist.training.nan_diagnosis import describe_step
from tfdist.training.plan import BatchPlan, FinishedStep
from tfdist.training.step.finite_check import GRADIENTS, LOSS, SOUND, SPIKE

_log = logging.getLogger("tfdist")
_FAULTS = {
    LOSS: "the loss is not finite",
    GRADIENTS: "the gradients are not finite",
    SPIKE: "the loss is {loss:.4g}, more than max_loss_spike={factor:g} times its mean of {mean:.4g}",
}
_REMEDY = (
    "Lower the learning rate, clip the gradients (clipnorm), look at those examples, or leave such steps out "
    "(on_nan=skip)."
)
# Weights that make nonsense of every batch are not helped by leaving batches out, or by going back once more.
_MAX_SKIPS_IN_A_ROW = 10
_MAX_ROLLBACKS = 3
# The mean follows about the last so many losses, and says nothing before.
_MEAN_STEPS = 20


class OnNan:
    """Decides after each step, the same on every process; the step itself has changed nothing if it was wrong.

    Args:
        policy: One of `tfdist.config.run_config.ON_NAN`.
        max_loss_spike: A loss more than this many times its running mean counts too; None: none does.
        loop: The strategy's loop.
        model: Built.
        source: The training examples.
        saver: Holds the checkpoints that a rollback goes back to.
        is_chief: Whether this process warns.

    Raises:
        ConfigError: If the policy is unknown, lacks its checkpoints, or `max_loss_spike` is no factor.
    """

    def __init__(
        self,
        *,
        policy: str,
        max_loss_spike: float | None,
        loop: Loop,
        model: keras.Model,
        source: Source,
        saver: Saver,
        is_chief: bool,
    ) -> None:
        _check(policy, max_loss_spike, can_go_back=saver.is_saving)
        self._policy = policy
        self._factor = max_loss_spike
        self._loop = loop
        self._model = model
        self._source = source
        self._saver = saver
        self._warn: Callable[..., None] = _log.warning if is_chief else _log.debug
        self._mean = 0.0
        self._num_seen = self._num_skipped = self._num_in_a_row = 0
        self._num_rollbacks: collections.Counter[tuple[int, int]] = collections.Counter()
        saver.kept["on_nan"] = self._state

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold of it."""
        return {
            "mean": self._mean,
            "seen": self._num_seen,
            "skipped": self._num_skipped,
            "in_a_row": self._num_in_a_row,
            "rollbacks": [[*place, count] for place, count in self._num_rollbacks.items()],
        }

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Goes on with what a checkpoint's `extra` holds; earlier versions' hold nothing."""
        state = extra.get("on_nan")
        if state:
            self._mean, self._num_seen = state["mean"], state["seen"]
            self._num_skipped, self._num_in_a_row = state["skipped"], state["in_a_row"]
            self._num_rollbacks.update({(epoch, step): count for epoch, step, count in state["rollbacks"]})

    @property
    def goes_back(self) -> bool:
        """Whether there must be a checkpoint from the first step on."""
        return self._policy == "rollback"

    @property
    def loss_limit(self) -> Callable[[], float] | None:
        """What a step's loss may be, for `BatchPlan.loss_limit`."""
        return None if self._policy == "ignore" else self._limit

    def after_step(self, finished: FinishedStep, plan: BatchPlan) -> BatchPlan | None:
        """Looks at a step, and returns how its epoch is to go on instead; None: as planned.

        Every process must call it for each.

        Raises:
            NonFiniteError: If the run is to end.
        """
        if self._policy == "ignore":
            return None
        if finished.fault == SOUND:
            self._follow(finished.loss)
            self.check_logs(finished.step, plan, finished.logs)
            return None
        self._num_in_a_row += 1
        if self._policy == "rollback":
            return self._go_back(finished, plan)
        if self._policy == "stop" or self._num_in_a_row >= _MAX_SKIPS_IN_A_ROW:
            raise self._error(finished, plan)
        self._num_skipped += 1
        self._warn("%s: the step is left out (%d so far)", self._name(finished, plan), self._num_skipped)
        return None

    def check_logs(self, step: int, plan: BatchPlan, logs: dict[str, Any] | None) -> None:
        """Ends the run if a loss is NaN in the logs though every step was sound: one that a train_step reports itself.

        Zero-based `step` is the last that the logs cover.

        Raises:
            NonFiniteError: If it is.
        """
        loss = (logs or {}).get("loss")
        if self._policy != "ignore" and isinstance(loss, float) and not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss became {loss} in epoch {plan.epoch + 1}, at step {step + 1} or before; its gradients were "
                "finite, and they were applied. Look at what train_step or the layers add to the loss."
            )

    def _go_back(self, finished: FinishedStep, plan: BatchPlan) -> BatchPlan:
        error = self._error(finished, plan)
        metrics = self._loop.snapshot_metrics()
        snapshot = self._saver.go_back()
        if snapshot is None:
            raise error
        place = (snapshot.epoch, snapshot.step)
        self._num_rollbacks[place] += 1
        if self._num_rollbacks[place] > _MAX_ROLLBACKS:
            raise error
        self._loop.start()
        # The order is the same each time: the batches since the checkpoint would lead to the same weights again.
        self._warn(
            "%s: back to the weights after epoch %d and %d steps, and on with step %d (%d of %d times)",
            self._name(finished, plan),
            *place,
            finished.step + 2,
            self._num_rollbacks[place],
            _MAX_ROLLBACKS,
        )
        return dataclasses.replace(plan, first_step=finished.step + 1, metrics=metrics)

    def _error(self, finished: FinishedStep, plan: BatchPlan) -> NonFiniteError:
        if finished.first_step not in (None, finished.step):
            return NonFiniteError(f"{self._name(finished, plan)}. Its update was not applied. {_REMEDY}")
        try:
            where = describe_step(self._model, self._source, plan, finished.step)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong while looking must not hide what was found
            where = f"looking for the layer failed ({type(error).__name__})"
        where = f": {where}" if where else ""
        return NonFiniteError(f"{self._name(finished, plan)}{where}. Its update was not applied. {_REMEDY}")

    def _name(self, finished: FinishedStep, plan: BatchPlan) -> str:
        what = _FAULTS[finished.fault].format(loss=finished.loss, factor=self._factor or 0.0, mean=self._mean)
        first = finished.step if finished.first_step is None else finished.first_step
        steps = (
            f"at step {finished.step + 1}"
            if first == finished.step
            else f"in steps {first + 1} to {finished.step + 1}"
        )
        return f"{what} in epoch {plan.epoch + 1} {steps}"

    def _follow(self, loss: float) -> None:
        self._num_in_a_row = 0
        self._num_seen += 1
        self._mean += (loss - self._mean) / min(self._num_seen, _MEAN_STEPS)

    def _limit(self) -> float:
        if self._factor is None or self._num_seen < _MEAN_STEPS or self._mean <= 0.0:
            return math.inf
        return self._factor * self._mean


def _check(policy: str, max_loss_spike: float | None, *, can_go_back: bool) -> None:
    if policy not in ON_NAN:
        raise ConfigError(f"on_nan={policy!r}: choose one of {', '.join(ON_NAN)}.")
    if policy == "rollback" and not can_go_back:
        raise ConfigError(
            "on_nan='rollback' has nothing to go back to; pass checkpoints=tfdist.Checkpoints(directory=…) too, or "
            "choose on_nan='skip'."
        )
    if max_loss_spike is None:
        return
    if not (max_loss_spike > 1 and math.isfinite(max_loss_spike)):
        raise ConfigError(f"max_loss_spike={max_loss_spike}: it must be a factor of more than 1, such as 10.")
    if policy == "ignore":
        raise ConfigError(
            f"max_loss_spike={max_loss_spike} with on_nan='ignore': nobody would act on a spike; choose "
            "on_nan=stop, skip or rollback, or leave it out."
        )
