"""Learning rates: schedules by name, built from Keras's own classes, and how a rate grows with the batch.

Nothing but stock classes, so that a saved `.keras` file loads where tfdist is not installed. Warm-up and constant or
cosine are one `CosineDecay`; the step schedule, and a warm-up in front of it, are one `PiecewiseConstantDecay`.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

from tfdist.errors import ConfigError

if TYPE_CHECKING:
    import keras

SCHEDULES = ("constant", "cosine", "step")
LR_SCALINGS = ("linear", "sqrt")

# A tenth of the rate after each of these fractions of the run.
STEP_DROPS_AT = (0.5, 0.75)
STEP_FACTOR = 0.1

# PiecewiseConstantDecay computes every one of its intervals at every optimizer step, so a long warm-up in front of the
# step schedule rises by this many stairs instead of one per step.
MAX_WARMUP_STAIRS = 20


def build_schedule(
    name: str, *, learning_rate: float, total_steps: int | None = None, warmup_steps: int = 0
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Builds a learning-rate schedule, with a linear warm-up in front of it if asked for.

    During the warm-up, step k (from 0) has the rate `learning_rate * (k + 1) / (warmup_steps + 1)`, so that the first
    step moves and step `warmup_steps` is the first with the whole rate. In front of "step" a warm-up of more than 20
    steps rises by 20 equal stairs.

    Args:
        name: "constant"; "cosine", from the whole rate after the warm-up to zero at `total_steps`; or "step", to a
            tenth at half and a hundredth at three quarters of `total_steps`.
        learning_rate: The rate at its highest.
        total_steps: Batches in the whole run (the schedules of Keras count batches, also where gradients are
            accumulated over several). "constant" does not need it.
        warmup_steps: Batches that the warm-up takes, counted in `total_steps`.

    Returns:
        The bare number if it never changes, else a schedule.

    Raises:
        ConfigError: If the name is unknown, a number is out of range, or `total_steps` is missing.

    Source: warm-up: Goyal et al. 2017, section 2.2; cosine: Loshchilov and Hutter 2017, without restarts; step: He et
    al. 2016, section 4.2.

    Examples:
        >>> import tfdist
        >>> rate = tfdist.optimizers.build_schedule("cosine", learning_rate=0.1, total_steps=100, warmup_steps=9)
        >>> [round(float(rate(step)), 3) for step in (0, 9, 99)]
        [0.01, 0.1, 0.0]
    """
    name = parse_choice(name, SCHEDULES, what="schedule")
    _check_steps(name, learning_rate=learning_rate, total_steps=total_steps, warmup_steps=warmup_steps)
    if name == "constant" and not warmup_steps:
        return learning_rate

    # Here, not at the top: this floor is imported by processes that must start without TensorFlow.
    import keras

    if name == "step":
        assert total_steps is not None  # checked above
        if total_steps == 1:
            return learning_rate  # no second step at which to drop, and Keras wants a boundary
        boundaries, values = _stairs(learning_rate, total_steps=total_steps, warmup_steps=warmup_steps)
        return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)
    decay_steps = 1 if name == "constant" else (total_steps or 0) - warmup_steps
    alpha = 1.0 if name == "constant" else 0.0  # alpha 1: the cosine part ends where it began
    if not warmup_steps:
        return keras.optimizers.schedules.CosineDecay(learning_rate, decay_steps, alpha=alpha)
    return keras.optimizers.schedules.CosineDecay(
        learning_rate / (warmup_steps + 1),
        decay_steps,
        alpha=alpha,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )


def rate_factor(scaling: str, *, global_batch_size: int, base_batch_size: int) -> float:
    """Says by how much a learning rate changes with the batch.

    A larger batch averages more gradients, so that each step may be longer. Beside this it wants a warm-up
    (`build_schedule`), and past a few thousand examples an optimizer that measures its steps by each layer's weights:
    `lars` in place of momentum SGD, `lamb` in place of Adam.

    Args:
        scaling: "linear" with the batch, which keeps the sum of the steps over an epoch: the rule for SGD; or "sqrt"
            with its square root, which keeps the variance of that sum: milder, and usual with Adam and its like.
        global_batch_size: Examples per optimizer step, over all replicas and accumulated batches.
        base_batch_size: Those of the run for which the rate was found.

    Returns:
        What to multiply the rate by.

    Raises:
        ConfigError: If the scaling is unknown, or a size is not at least 1.

    Source: linear: Goyal et al. 2017, section 2.1; square root: Krizhevsky 2014, section 5.

    Examples:
        >>> import tfdist
        >>> tfdist.optimizers.rate_factor("sqrt", global_batch_size=1024, base_batch_size=256)
        2.0
    """
    scaling = parse_choice(scaling, LR_SCALINGS, what="scaling of the learning rate")
    for name, size in (("global_batch_size", global_batch_size), ("base_batch_size", base_batch_size)):
        if size < 1:
            raise ConfigError(f"{name}={size}: it must be 1 or more.")
    ratio = global_batch_size / base_batch_size
    return ratio if scaling == "linear" else ratio**0.5


def parse_choice(name: str, choices: tuple[str, ...], *, what: str) -> str:
    """Returns the choice that a name means, whatever its case and with `-` for `_`.

    Raises:
        ConfigError: If it is unknown, with the nearest name and all of them.
    """
    plain = name.strip().lower().replace("-", "_")
    if plain in choices:
        return plain
    matches = difflib.get_close_matches(plain, choices, n=1)
    nearest = f" Did you mean {matches[0]!r}?" if matches else ""
    raise ConfigError(f"There is no {what} {name!r}.{nearest} Choose one of {', '.join(choices)}.")


def _check_steps(name: str, *, learning_rate: float, total_steps: int | None, warmup_steps: int) -> None:
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"learning_rate={learning_rate!r}: it must be greater than 0 and finite.")
    if warmup_steps < 0:
        raise ConfigError(f"warmup_steps={warmup_steps!r}: it must be 0 (no warm-up) or more.")
    if name == "constant":
        return
    if total_steps is None:
        raise ConfigError(
            f"The schedule {name!r} needs total_steps, the batches of the whole run; give it (steps per epoch × "
            "epochs), or choose the schedule 'constant'."
        )
    if total_steps <= warmup_steps:
        raise ConfigError(
            f"total_steps={total_steps!r} with warmup_steps={warmup_steps!r}: the run must be longer than its warm-up."
        )


def _stairs(learning_rate: float, *, total_steps: int, warmup_steps: int) -> tuple[list[int], list[float]]:
    """The last step at each rate but the last one, and the rates: `PiecewiseConstantDecay` includes the boundary."""
    boundaries, values = [], []
    num_stairs = min(warmup_steps, MAX_WARMUP_STAIRS)
    for stair in range(num_stairs):
        first, end = stair * warmup_steps // num_stairs, (stair + 1) * warmup_steps // num_stairs
        middle = (first + end - 1) / 2  # the linear warm-up's mean over the stair
        boundaries.append(end - 1)
        values.append(learning_rate * (middle + 1) / (warmup_steps + 1))
    rate = learning_rate
    for fraction in STEP_DROPS_AT:
        # A drop that falls into the warm-up, or twice on one step of a very short run, would make boundaries that do
        # not rise; it takes effect at the warm-up's end.
        drop = int(fraction * total_steps)
        if drop - 1 > (boundaries[-1] if boundaries else -1):
            boundaries.append(drop - 1)
            values.append(rate)
        rate *= STEP_FACTOR
    return boundaries, [*values, rate]
