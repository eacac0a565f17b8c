"""Which batches an epoch consists of, and when its logs are worth an exchange."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One pass over a source.

    Attributes:
        epoch: Zero-based; with `seed` it fixes the order.
        num_steps: Steps to run, or None: until the data ends.
        log_every_steps: Logs are computed at each such step; under several workers that is a collective,
            so all processes must agree on it.
    """

    epoch: int = 0
    seed: int = 0
    shuffle: bool = False
    global_batch_size: int
    num_steps: int | None = None
    log_every_steps: int = 0

    def wants_logs(self, step: int) -> bool:
        """Tells whether the logs after zero-based `step` are wanted."""
        return self.log_every_steps > 0 and (step + 1) % self.log_every_steps == 0
