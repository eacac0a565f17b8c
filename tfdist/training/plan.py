"""Which batches an epoch consists of, and when its logs are worth an exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tfdist.data.segment import Share
from tfdist.training.step.finite_check import SOUND


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the data an epoch begins: as in Keras one of fewer steps than the data have leaves the rest to the next.

    Attributes:
        lap: Passes through the data before.
        step: Batches of this pass that earlier epochs have had.
    """

    lap: int
    step: int = 0


# Wide: one field for each thing that an epoch may be told.
@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """An epoch: a pass over a source, or a part of one.

    Attributes:
        epoch: Zero-based.
        place: Where it begins; with `seed` the pass fixes the order.
        num_steps: Where it ends, counted in steps from its start; None: with the data.
        first_step: Where it begins, when it goes on after an interruption.
        drop_remainder: Leave out a last batch that is short.
        input_state: Where the input stood before `first_step`, as the loop saved it; empty: to be found again.
        metrics: The metrics' state after the steps left out; None: zeros.
        is_boundary: Asked once a step, in order: is the state to be looked at when it, and nothing after it, is
            finished?
        is_saved: Whether a checkpoint follows the pass.
        log_every_steps: Logs are computed at each such step; under several workers that is a collective,
            so all processes must agree on it.
        steps_per_loop: Steps to make in one call of a graph, where nobody looks in between; None: as many as are
            worth it for the epochs after this one.
        num_epochs_after: Passes that follow this one, over the same source and as long.
        is_due: Whether a checkpoint follows a zero-based step by its number; unlike `is_boundary`, asked at any time.
        is_stopped: Asked after each step: is the epoch to end with it? What ends an epoch is done all the same.
        loss_limit: Asked once a step for the largest loss that it may have; a step with a larger one, or with a
            loss or gradients that are not finite, changes nothing and reports a fault. None checks nothing.
    """

    epoch: int = 0
    place: Place = Place(0)
    seed: int = 0
    shuffle: bool = False
    global_batch_size: int
    num_steps: int | None = None
    first_step: int = 0
    drop_remainder: bool = False
    input_state: bytes = b""
    metrics: list[Any] | None = None
    is_boundary: Callable[[int], bool] = lambda step: False
    is_saved: bool = False
    log_every_steps: int = 0
    steps_per_loop: int | None = 1
    num_epochs_after: int = 0
    is_due: Callable[[int], bool] = lambda step: False
    is_stopped: Callable[[], bool] = lambda: False
    loss_limit: Callable[[], float] | None = None

    @property
    def first_in_pass(self) -> int:
        """The first step, counted from the start of the pass."""
        return self.place.step + self.first_step

    @property
    def end_in_pass(self) -> int | None:
        """The step after the last one, counted from the start of the pass; None: the data's end."""
        return None if self.num_steps is None else self.place.step + self.num_steps

    def share(self, num_replicas: int, replica_ids: Sequence[int], *, fixed_sizes: bool = True) -> Share:
        """Returns what some of the replicas read of it."""
        return Share(
            lap=self.place.lap,
            seed=self.seed,
            shuffle=self.shuffle,
            global_batch_size=self.global_batch_size,
            num_replicas=num_replicas,
            replica_ids=replica_ids,
            first_step=self.first_in_pass,
            num_steps=self.end_in_pass,
            drop_remainder=self.drop_remainder,
            num_epochs_after=self.num_epochs_after,
            fixed_sizes=fixed_sizes,
        )

    def total_steps(self, num_steps: int) -> int:
        """Returns the steps since the run began, when `num_steps` of this pass are done."""
        return self.epoch * (self.num_steps or 0) + num_steps

    def is_watched(self, step: int) -> bool:
        """Tells whether logs or a checkpoint are due after zero-based `step`, before the next one begins."""
        return self.wants_logs(step) or self.is_due(step)

    def wants_logs(self, step: int) -> bool:
        """Tells whether the logs after zero-based `step` are wanted."""
        return self.log_every_steps > 0 and (step + 1) % self.log_every_steps == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedStep:
    """One step of training that is done.

    Attributes:
        step: Zero-based in its epoch.
        first_step: The first of those that `fault` is about, where it was found later; None: this one alone.
        logs: The metrics over the epoch so far, where they were wanted.
        is_boundary: Whether nothing after it has begun, and the state may be looked at.
        fault: What was wrong with its numbers, one of those in `step_check`; it has changed nothing then.
        loss: The batch's, where it was checked.
    """

    step: int
    logs: dict[str, Any] | None
    is_boundary: bool
    first_step: int | None = None
    fault: int = SOUND
    loss: float = 0.0
