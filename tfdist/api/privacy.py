"""What private training needs besides the model: how batches are drawn, how much noise, and how many epochs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

from tfdist.api.arguments import FitArguments, FitData
from tfdist.data.poisson import poisson_batches
from tfdist.data.sources.indexed import IndexedSource
from tfdist.data.sources.source import ArraySource
from tfdist.errors import ConfigError
from tfdist.training.loop import plan_steps
from tfdist.training.privacy.accountant import PrivacyBudget, Spent, least_noise, most_epochs
from tfdist.training.privacy.gradients import Mechanism

# A Poisson batch of fewer examples on average is empty now and then, and an empty one has no loss.
_LEAST_BATCH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateFit:
    """What a private `fit` does in place of what it was asked for.

    Attributes:
        data: With batches that are drawn as ε is counted.
        mechanism: What is done to gradients.
        budget: Counts ε; None where there is no noise.
        epochs: Epoch to stop at.
        line: What a person should know; may be empty.
    """

    data: FitData
    mechanism: Mechanism
    budget: PrivacyBudget | None
    epochs: int
    line: str

    @property
    def callbacks(self) -> list[PrivacyBudget]:
        """Those that `fit` needs."""
        return [] if self.budget is None else [self.budget]

    @property
    def spent(self) -> Sequence[Spent]:
        """What the model was trained with so far."""
        return () if self.budget is None else self.budget.spent


# Long: each way to ask for a private run is refused or counted here.
def plan_private(
    given: FitArguments,
    data: FitData,
    *,
    broadcast: Callable[[bytes], bytes],
    before: Sequence[Spent],
) -> PrivateFit:
    """Settles what the options leave open.

    Args:
        given: With `privacy` that is on.
        data: As `fit` was given it.
        broadcast: Returns the chief's bytes on every process.
        before: What was spent on the model earlier.

    Raises:
        ConfigError: If the data cannot be drawn so, or the ε cannot be kept.
    """
    options, epochs = given.privacy, given.epochs
    assert options is not None
    if given.data_service is not None:
        raise ConfigError(
            "data_service with private training: where it goes on after an interruption examples come twice, of which "
            "ε would not know; leave it out."
        )
    num_examples = data.source.num_examples
    delta = options.dp_delta
    if delta is None:
        if num_examples is None:
            raise ConfigError(
                "private training on data of which nobody knows how many examples they hold: give dp_delta, a number "
                "well below 1 / examples."
            )
        delta = num_examples**-1.1
    share, count = 1.0, 1  # Each example is in one batch of a pass, and its place there hides nothing.
    if options.dp_sampling == "poisson":
        data = _draw_poisson(given, data, broadcast, seed=options.dp_noise_seed)
        assert num_examples is not None
        share = min(1.0, data.batch_size / num_examples)
        count = plan_steps(data.source, data.batch_size, given.steps_per_epoch) or 0
    planned = epochs - given.initial_epoch
    total = count * max(1, planned)
    noise, target = options.dp_noise_multiplier, options.dp_target_epsilon
    line = ""
    if noise is None:
        assert target is not None
        noise = least_noise(before, share=share, count=total, delta=delta, target=target)
        line = f"dp_noise_multiplier={noise}, for ε={target:g} after {epochs} epochs"
    elif target is not None:
        num_epochs = most_epochs(before, (noise, share, count), delta=delta, target=target, epochs=planned)
        if num_epochs == 0:
            needed = least_noise(before, share=share, count=total, delta=delta, target=target)
            raise ConfigError(
                f"dp_target_epsilon={target} would be passed in the first epoch with dp_noise_multiplier={noise}; all "
                f"{epochs} epochs keep within it with {needed}."
            )
        if num_epochs < planned:
            epochs = given.initial_epoch + num_epochs
            line = f"{epochs} epochs, with which ε stays within {target:g}"
    budget = None
    if noise > 0:
        budget = PrivacyBudget(epoch=(noise, share, count), before=before, delta=delta, target=target)
    else:
        line = "dp_noise_multiplier=0: gradients are cut, but nothing is private"
    mechanism = Mechanism(
        clip_norm=options.dp_clip_norm,
        noise_multiplier=noise,
        noise_seed=options.dp_noise_seed,
        micro_batch_size=options.dp_micro_batch_size,
        divisor=data.batch_size if options.dp_sampling == "poisson" else None,
    )
    return PrivateFit(data=data, mechanism=mechanism, budget=budget, epochs=epochs, line=line)


def _draw_poisson(
    given: FitArguments, data: FitData, broadcast: Callable[[bytes], bytes], *, seed: int | None
) -> FitData:
    source = data.source
    if not isinstance(source, (ArraySource, IndexedSource)):
        raise ConfigError(
            "dp_sampling='poisson' with data that come one after the other: each step draws from all examples; pass "
            "arrays or what reads examples by number, or choose dp_sampling='shuffle', whose ε is larger."
        )
    if not given.shuffle or given.drop_remainder:
        what = "drop_remainder" if given.drop_remainder else "shuffle=False"
        raise ConfigError(
            f"{what} with dp_sampling='poisson', whose batches are drawn anew at each step: leave it out."
        )
    if not _LEAST_BATCH <= data.batch_size <= source.num_examples:
        raise ConfigError(
            f"batch_size={data.batch_size} of {source.num_examples} examples with dp_sampling='poisson': it must be "
            f"at least {_LEAST_BATCH}, or batches come out empty, and at most all; choose another, or "
            "dp_sampling='shuffle'."
        )
    key = broadcast(os.urandom(32) if seed is None else seed.to_bytes(32, "little"))
    return dataclasses.replace(data, source=poisson_batches(source, batch_size=data.batch_size, key=key))
