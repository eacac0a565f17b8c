"""The ε that private training comes to, counted by the library `dp_accounting`."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfdist.errors import ConfigError

# A noise multiplier, the probability that an example is part of a sum, and the number of such sums.
Spent = tuple[float, float, int]
# Of privacy losses, rounded up: ε comes out larger by some 0.1%, and ten times as fast as with the library's own.
_STEP = 1e-3
_MISSING = (
    "private training counts ε by dp-accounting, which is not installed: pip install 'tfdist[privacy]'."
)


def count_epsilon(spent: Sequence[Sequence[float]], delta: float) -> float:
    """Returns ε of what was done with the data, each as `Spent`, by privacy loss distributions (Koskela et al. 2020).

    Raises:
        ConfigError: If `dp_accounting` is missing.
    """
    return _count(tuple((float(noise), float(share), int(count)) for noise, share, count in spent), delta)


@functools.lru_cache(maxsize=1024)
def _count(spent: tuple[Spent, ...], delta: float) -> float:
    try:
        # Here: it brings SciPy's statistics, which no other run needs.
        import dp_accounting
        from dp_accounting import pld
    except ImportError:
        raise ConfigError(_MISSING) from None
    accountant = pld.PLDAccountant(value_discretization_interval=_STEP)
    for noise, share, count in spent:
        event: Any = dp_accounting.GaussianDpEvent(noise)
        if share < 1:
            event = dp_accounting.PoissonSampledDpEvent(share, event)
        if count:
            accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def most_epochs(before: Sequence[Spent], epoch: Spent, *, delta: float, target: float, epochs: int) -> int:
    """Returns how many epochs, at most `epochs`, keep within an ε of `target` after what was spent before."""
    noise, share, count = epoch

    def epsilon_of(num_epochs: int) -> float:
        return count_epsilon([*before, (noise, share, num_epochs * count)], delta)

    return bisect.bisect_right(range(1, epochs + 1), target, key=epsilon_of)


def least_noise(before: Sequence[Spent], *, share: float, count: int, delta: float, target: float) -> float:
    """Returns the smallest noise multiplier, of two decimals, that keeps within an ε of `target`.

    There are `count` sums to come, of each of which an example is part with probability `share`.

    Raises:
        ConfigError: If none does.
    """

    def epsilon_of(hundredths: int) -> float:
        return count_epsilon([*before, (hundredths / 100, share, count)], delta)

    unreachable = ConfigError(
        f"dp_target_epsilon={target} cannot be reached with any noise; take fewer epochs, or a larger ε."
    )
    if before and count_epsilon(before, delta) > target:
        raise unreachable
    # From above: little noise is what takes long to count.
    high = 100
    while epsilon_of(high) > target:
        high *= 2
        if high > 10**6:
            raise unreachable
    low = high // 2
    while low > 1 and epsilon_of(low) <= target:
        low, high = low // 2, low
    # More noise is a smaller ε: the first that fits.
    between = range(low + 1, high)
    return (low + 1 + bisect.bisect_left(between, -target, key=lambda noise: -epsilon_of(noise))) / 100


class PrivacyBudget(keras.callbacks.Callback):
    """Adds `epsilon` to the logs of each epoch, and keeps within the one that was asked for.

    Args:
        epoch: What an epoch spends.
        before: What was spent on the model earlier.
        delta: The δ of ε.
        target: The ε not to be passed; None: any.

    Attributes:
        spent: Since ever; a checkpoint holds it.
    """

    writes = False
    state_names = ("spent",)

    def __init__(self, *, epoch: Spent, before: Sequence[Spent], delta: float, target: float | None) -> None:
        super().__init__()
        self.spent: list[Any] = list(before)
        self._epoch = epoch
        self._delta = delta
        self._target = target

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Makes sure that the epoch is still within it.

        Raises:
            ConfigError: If it is not: the run that is gone on with has spent more than this one would have.
        """
        if self._target is None:
            return
        after = count_epsilon(self._with_one_more(), self._delta)
        if after > self._target:
            raise ConfigError(
                f"dp_target_epsilon={self._target} would be passed by epoch {epoch + 1} (ε {after:.2f}): the run has "
                f"spent {count_epsilon(self.spent, self._delta):.2f} so far; give a larger ε, or more noise."
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Counts."""
        self.spent = self._with_one_more()
        if logs is not None:
            logs["epsilon"] = count_epsilon(self.spent, self._delta)

    def _with_one_more(self) -> list[Any]:
        noise, share, count = self._epoch
        if self.spent and tuple(self.spent[-1][:2]) == (noise, share):
            return [*self.spent[:-1], (noise, share, self.spent[-1][2] + count)]
        return [*self.spent, self._epoch]
