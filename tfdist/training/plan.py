"""Which batches an epoch consists of, and when its logs are worth an exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def _never(step: int) -> bool:
    del step
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One pass over a source.

    Attributes:
        epoch: Zero-based; with `seed` it fixes the order.
        num_steps: Where the pass ends, counted in steps from its start; None: with the data.
        first_step: Where it begins, when it goes on after an interruption.
        metrics: The metrics' state after the steps left out; None: zeros.
        is_boundary: Asked once a step, in order: is the state to be looked at when it, and nothing after it, is
            finished?
        log_every_steps: Logs are computed at each such step; under several workers that is a collective,
            so all processes must agree on it.
    """

    epoch: int = 0
    seed: int = 0
    shuffle: bool = False
    global_batch_size: int
    num_steps: int | None = None
    first_step: int = 0
    metrics: list[Any] | None = None
    is_boundary: Callable[[int], bool] = _never
    log_every_steps: int = 0

    def wants_logs(self, step: int) -> bool:
        """Tells whether the logs after zero-based `step` are wanted."""
        return self.log_every_steps > 0 and (step + 1) % self.log_every_steps == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedStep:
    """One step of training that is done.

    Attributes:
        step: Zero-based in its epoch.
        logs: The metrics over the epoch so far, where they were wanted.
        is_boundary: Whether nothing after it has begun, and the state may be looked at.
    """

    step: int
    logs: dict[str, Any] | None
    is_boundary: bool
