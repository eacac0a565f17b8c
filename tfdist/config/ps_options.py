"""How a ps run shares out its steps."""

from __future__ import annotations

import dataclasses

from tfdist.config.run_config import PS_MODES, STALENESS_LR
from tfdist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PsOptions:
    """What `fit` says about parameter servers.

    Attributes:
        steps_per_loop: Steps that a worker makes between two words with the chief; None: as many as are worth it.
        mode: One of `PS_MODES`.
        max_staleness: Most optimizer steps of others between a gradient's reading of the weights and its applying;
            None: any number.
        staleness_lr: One of `STALENESS_LR`, or None.
        num_backup_workers: How many workers' parts of a batch a synchronous step does not wait for.

    Raises:
        ConfigError: If a value breaks its rule, or does not go with another.
    """

    steps_per_loop: int | None = None
    mode: str = "async"
    max_staleness: int | None = None
    staleness_lr: str | None = None
    num_backup_workers: int = 0

    def __post_init__(self) -> None:
        if self.mode not in PS_MODES:
            raise ConfigError(f"ps_mode={self.mode!r}: choose one of {', '.join(PS_MODES)}.")
        if self.mode == "sync" and self.steps_per_loop is not None:
            raise ConfigError(
                f"steps_per_loop={self.steps_per_loop} with ps_mode='sync': all workers meet at each step; leave it "
                "out, or choose ps_mode='async'."
            )
        if self.num_backup_workers < 0:
            raise ConfigError(f"num_backup_workers={self.num_backup_workers}: it must be 0 or more.")
        if self.num_backup_workers and self.mode != "sync":
            raise ConfigError(
                f"num_backup_workers={self.num_backup_workers} with ps_mode={self.mode!r}: nobody waits for another "
                "there; leave it out, or choose ps_mode='sync'."
            )
        if self.staleness_lr not in (None, *STALENESS_LR):
            raise ConfigError(
                f"staleness_lr={self.staleness_lr!r}: choose {', '.join(STALENESS_LR)} or None."
            )
        if self.steps_per_loop is not None and self.steps_per_loop < 1:
            raise ConfigError(f"steps_per_loop={self.steps_per_loop}: it must be 1 or more, or None.")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ConfigError(f"max_staleness={self.max_staleness}: it must be 0 or more, or None.")

    def check_strategy(self, strategy: str) -> None:
        """Checks that whoever asked for something has a strategy that can honour it.

        Args:
            strategy: Canonical name.

        Raises:
            ConfigError: If it cannot.
        """
        # All strategies have steps_per_loop.
        fields = [f for f in dataclasses.fields(self) if f.name != "steps_per_loop"]
        asked = [f.name for f in fields if getattr(self, f.name) != f.default]
        if strategy != "ps" and asked:
            name = "ps_mode" if asked[0] == "mode" else asked[0]
            raise ConfigError(
                f"{name}={getattr(self, asked[0])!r} with strategy={strategy!r}: only 'ps' has it; leave it out, or "
                "choose strategy='ps'."
            )
