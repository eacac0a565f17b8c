"""How a ps run divides its steps among the workers."""

from __future__ import annotations

import dataclasses

from tfdist.config.settings import check_settings, setting
from tfdist.errors import ConfigError

PS_MODES = ("async", "sync")
STALENESS_LR = ("inverse",)
# What all strategies have.
PS_SHARED = ("steps_per_loop",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PsOptions:
    """What parameter servers' workers do together.

    Args:
        ps_mode: "async" lets each worker step for itself, on whole batches. "sync" divides each batch among the
            workers, adds their gradients up, and steps once: the weights are those of one device. It needs one
            optimizer, and a loss that divides by examples alone.
        steps_per_loop: Steps that a worker makes between two words with the chief; None: as many as are worth it.
        max_staleness: Most optimizer steps of other workers between a gradient's reading of the weights and its
            applying (stale-synchronous, Ho et al. 2013); 0: one step at a time. None: any number.
        staleness_lr: "inverse" multiplies the learning rate of each update by 1 / (1 + its staleness) (Zhang et al.
            2016).
        num_backup_workers: A synchronous step does not wait for the last so many workers (Chen et al. 2016). Their
            parts are dropped, mostly in every step, also where none of them is slow: the step is that of a smaller
            batch, and the epoch one without these examples, which the run's metrics count as `num_dropped`. 0: every
            example counts. A worker that hangs may hold up the others all the same.

    Raises:
        ConfigError: If a value breaks its rule, or does not go with another.

    Examples:
        >>> import tfdist
        >>> tfdist.PsOptions(ps_mode="sync", num_backup_workers=1).ps_mode
        'sync'
    """

    ps_mode: str = setting(
        "async", choices=PS_MODES, help="Whether workers of ps step each for itself or together."
    )
    steps_per_loop: int | None = setting(
        None, least=1, help="Steps in one call of a graph, or of a ps worker. Default: found out."
    )
    max_staleness: int | None = setting(
        None,
        least=0,
        help="Most optimizer steps of others that a gradient of ps may miss. Default: any number.",
    )
    staleness_lr: str | None = setting(
        None, choices=STALENESS_LR, help="Multiply the learning rate of ps by 1 / (1 + staleness)."
    )
    num_backup_workers: int = setting(
        0, least=0, help="A step of --ps_mode=sync leaves out the parts of the last so many workers."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.ps_mode == "sync" and self.steps_per_loop is not None:
            raise ConfigError(
                f"steps_per_loop={self.steps_per_loop} with ps_mode='sync': all workers meet at each step; leave it "
                "out, or choose ps_mode='async'."
            )
        if self.num_backup_workers and self.ps_mode != "sync":
            raise ConfigError(
                f"num_backup_workers={self.num_backup_workers} with ps_mode={self.ps_mode!r}: nobody waits for another "
                "there; leave it out, or choose ps_mode='sync'."
            )
