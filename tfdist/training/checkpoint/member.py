"""What a member of an elastic cluster knows of its own last step, and brings along when the cluster is formed anew."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np

from tfdist import keras_internals
from tfdist.cluster.membership import Membership
from tfdist.training.checkpoint.snapshot import Snapshot, parse_checkpoint, render_checkpoint
from tfdist.training.model_loop import Loop


class Member:
    """One process of a cluster that may be formed anew in the middle of a step.

    Args:
        membership: Who belongs to the cluster.
        carried: What this process brings along from the cluster before; None if it was not in it.
        loop: The strategy's loop.
        model: Built.
        steps_per_epoch: To tell who came furthest.
        is_chief: Whether this process is the chief.
    """

    def __init__(
        self,
        *,
        membership: Membership,
        carried: Snapshot | None,
        loop: Loop,
        model: keras.Model,
        steps_per_epoch: int,
        is_chief: bool,
    ) -> None:
        self.membership = membership
        self._carried = carried
        self._loop = loop
        self._model = model
        self._steps_per_epoch = steps_per_epoch
        self._is_chief = is_chief
        self._place = (0, 0)
        self._num_steps = 0
        self._metrics: list[Any] = []

    def begin(self) -> None:
        """Starts to count."""
        self._metrics = [np.zeros_like(metric) for metric in self._loop.own_metrics()]

    def go_on_from(self, snapshot: Snapshot) -> None:
        """Counts from a state."""
        self._place, self._num_steps = (snapshot.epoch, snapshot.step), self._count()
        if snapshot.metrics and self._is_chief:
            # The first replica's; the others have added nothing.
            origins = self._loop.metric_origins
            self._metrics = [m - o for m, o in zip(snapshot.metrics, origins, strict=True)]

    def note_step(self, num_steps: int) -> None:
        """Remembers a step that all have made; `num_steps` are the epoch's so far."""
        self._place = (self._place[0], num_steps)
        self._num_steps, self._metrics = self._count(), self._loop.own_metrics()

    def note_epoch(self, epoch: int) -> None:
        """Remembers that all have finished so many epochs."""
        self._place = (epoch, 0)
        self._metrics = [np.zeros_like(metric) for metric in self._metrics]

    def rescue(self) -> tuple[int, int, list[Any]]:
        """Returns epochs, steps and own metrics after the last step that this process has finished."""
        has_moved = self._count() > self._num_steps
        epoch, step = self._place
        # Metrics may have moved in a step that the weights have not made.
        return epoch, step + has_moved, self._loop.own_metrics() if has_moved else self._metrics

    def agree(self) -> Snapshot:
        """Gives every member the state of the one that came furthest, which may be a step ahead of the others."""
        own, rank = self._carried, self.membership.rank
        steps = [0.0] * self.membership.num_members
        if own is not None:
            steps[rank] = 1.0 + own.epoch * self._steps_per_epoch + own.step
        steps = self._loop.all_reduce_sum(steps)
        source = steps.index(max(steps))
        content = render_checkpoint(own) if own is not None and rank == source else b""
        snapshot = parse_checkpoint(self._loop.broadcast(content, source=source), name="of a member")
        if not snapshot.extra.get("metrics_are_parts"):
            return snapshot
        # What each has counted itself; the share of those that are gone is gone with them.
        parts = self._metrics if own is None else own.metrics
        if not parts:
            return snapshot
        flat = np.concatenate([np.ravel(part) for part in parts])
        sums = np.split(
            np.array(self._loop.all_reduce_sum(flat.tolist())),
            np.cumsum([np.size(part) for part in parts])[:-1],
        )
        metrics = [
            origin + np.reshape(total, np.shape(part)).astype(part.dtype)
            for origin, total, part in zip(self._loop.metric_origins, sums, parts, strict=True)
        ]
        return dataclasses.replace(snapshot, metrics=metrics)

    def _count(self) -> int:
        optimizer = self._model.optimizer
        return 0 if optimizer is None else int(keras_internals.batch_counter(optimizer).numpy())
