"""What differential privacy a run's training is to have: one frozen value, checked where it is made."""

from __future__ import annotations

import dataclasses
import math

from tfdist.config.settings import changed_settings, check_settings, setting
from tfdist.config.sync_options import SyncOptions
from tfdist.errors import ConfigError

SAMPLINGS = ("poisson", "shuffle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """DP-SGD (Abadi et al. 2016): what the trained weights can tell of one example is bounded by (ε, δ).

    The gradient of each example is cut to a norm of at most `dp_clip_norm`; to the sum over a batch one Gaussian is
    added, of the standard deviation `dp_noise_multiplier` × `dp_clip_norm`; the sum is divided by the batch's size.
    Neighbours are data sets of which one holds one example more, or, with `dp_sampling="shuffle"`, nothing in the place
    of one; how many examples there are is no secret. What training prints of the examples themselves (loss and metrics
    on the training data) is not covered by ε: keep it to yourself.

    Args:
        dp_noise_multiplier: None with `dp_target_epsilon`: the smallest that keeps within it over all epochs. 0 adds
            none, and is not private.
        dp_clip_norm: Infinity cuts nothing, and needs a multiplier of 0.
        dp_target_epsilon: Training ends with the last epoch that keeps within it.
        dp_delta: None: 1 / (number of examples) ** 1.1.
        dp_sampling: "poisson" draws each example for each step by itself, with the probability batch size / examples,
            so that batches differ in size: what the accountant assumes when it lets chance protect the examples, too.
            It needs arrays, or data that are read by number. "shuffle" takes each example once per pass, in the usual
            batches, and counts one Gaussian for each pass: chance is not counted, so that ε is larger; a stream or a
            generator must not yield an example twice in one.
        dp_micro_batch_size: Examples whose gradients are in memory at a time; None: as many as 256 MB hold.
        dp_noise_seed: None draws the noise, and the samples, from the operating system's cryptographic generator. A
            seed makes a run repeatable, and unsafe: who knows it can take the noise away.

    Raises:
        ConfigError: If a value breaks its rule, or does not go with another.

    Examples:
        >>> import tfdist
        >>> tfdist.PrivacyOptions(dp_noise_multiplier=1.1).is_on
        True
        >>> tfdist.PrivacyOptions(dp_noise_multiplier=0.0, dp_target_epsilon=3.0)
        Traceback (most recent call last):
        tfdist.errors.ConfigError: dp_target_epsilon=3.0 with dp_noise_multiplier=0.0: ...
    """

    dp_noise_multiplier: float | None = setting(
        None, least=0, help="Train with differential privacy: noise of so many clip norms in each step's sum."
    )
    dp_clip_norm: float = setting(1.0, help="Largest norm of one example's gradient in private training.")
    dp_target_epsilon: float | None = setting(
        None, above=0, help="End before ε passes this; without a noise multiplier: choose it so."
    )
    dp_delta: float | None = setting(None, above=0, help="The δ of ε. Default: 1 / examples ** 1.1.")
    dp_sampling: str = setting(
        "poisson", choices=SAMPLINGS, help="How private training draws batches, as its ε is counted."
    )
    dp_micro_batch_size: int | None = setting(
        None, least=1, help="Examples whose gradients are in memory at a time. Default: 256 MB of them."
    )
    dp_noise_seed: int | None = setting(
        None, least=0, help="Draw noise from this seed, which is unsafe. Default: a cryptographic generator."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.dp_clip_norm > 0:
            raise ConfigError(f"dp_clip_norm={self.dp_clip_norm}: it must be more than 0.")
        if self.dp_delta is not None and not self.dp_delta < 1:
            raise ConfigError(f"dp_delta={self.dp_delta}: it must be less than 1, by much.")
        if not self.is_on and (changed := changed_settings(self)):
            raise ConfigError(
                f"{changed[0]}={getattr(self, changed[0])!r} without dp_noise_multiplier or dp_target_epsilon: "
                "training is not private; give one of them, or leave it out."
            )
        if self.dp_target_epsilon is not None and self.dp_noise_multiplier == 0:
            raise ConfigError(
                f"dp_target_epsilon={self.dp_target_epsilon} with dp_noise_multiplier={self.dp_noise_multiplier}: "
                "without noise ε has no bound; leave the multiplier out, and it is chosen to fit."
            )
        if math.isinf(self.dp_clip_norm) and self.dp_noise_multiplier != 0:
            raise ConfigError(
                f"dp_clip_norm={self.dp_clip_norm} with noise: no noise hides a gradient of any norm; take a number "
                "such as 1."
            )

    @property
    def is_on(self) -> bool:
        """Whether training is private."""
        return self.dp_noise_multiplier is not None or self.dp_target_epsilon is not None

    def check_run(self, strategy: str, *, sync: SyncOptions, on_nan: str, jit_compile: str | None) -> None:
        """Checks that the rest of a run goes with it.

        Args:
            strategy: Canonical name.
            sync: What crosses between workers.
            on_nan: As for `fit`.
            jit_compile: As for `fit`.

        Raises:
            ConfigError: If it does not.
        """
        if not self.is_on:
            return
        if strategy == "ps":
            raise ConfigError(
                "private training with strategy='ps': one noise for each step needs workers that step together; "
                "choose one_device, mirrored or multiworker."
            )
        if sync.sync != "every_step" or sync.compression is not None or sync.exchange_dtype != "float32":
            raise ConfigError(
                "private training with sync, compression or exchange_dtype: noise hides an example in the exact sum "
                "over all workers, at every step; leave them out."
            )
        if on_nan in ("skip", "rollback"):
            raise ConfigError(
                f"on_nan={on_nan!r} with private training: what a step leaves out would tell of the examples; choose "
                "'stop' or 'ignore'."
            )
        if jit_compile == "on":
            raise ConfigError(
                "jit_compile='on' with private training: the noise is drawn outside of what XLA compiles; leave it out."
            )
