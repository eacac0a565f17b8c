"""What changes with the batch: a learning rate that suits another number of examples per step.

A larger batch averages more gradients, so that each step may be longer. Beside this it wants a warm-up
(`build_schedule`), and past a few thousand examples an optimizer that measures its steps by each layer's weights:
`lars` in place of momentum SGD, `lamb` in place of Adam.
"""

from __future__ import annotations

from tfdist.errors import ConfigError
from tfdist.optimizers.schedules import parse_choice

LR_SCALINGS = ("linear", "sqrt")


def rate_factor(scaling: str, *, global_batch_size: int, base_batch_size: int) -> float:
    """Says by how much a learning rate changes with the batch.

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
