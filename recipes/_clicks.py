"""A click log made up from a known truth: what recommenders are trained on, without a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def make_clicks(
    num_examples: int, *, num_numbers: int, num_values: Sequence[int], intercept: float, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float64], NDArray[np.float32]]:
    """Makes up a click log.

    Few ids are frequent and most are rare, as in real logs (a Zipf law). Whether an example is a click is drawn from
    a known probability: a weight per id, a weight per column of numbers, and how well the last two ids' tastes match.

    Args:
        num_examples: Rows.
        num_numbers: Columns of numbers.
        num_values: How many ids each column of ids has.
        intercept: Added to each logit: the lower, the rarer are clicks.
        seed: Of everything drawn.

    Returns:
        The numbers `[num_examples, num_numbers]`, standard normal; the ids `[num_examples, columns]`, each column's
        from 0 on; the true logits `[num_examples]`; and the labels `[num_examples, 1]`, 0 or 1.
    """
    # Two streams, so that more rows are more draws from the same truth.
    truth, draws = np.random.default_rng(seed).spawn(2)
    numbers = draws.standard_normal((num_examples, num_numbers)).astype(np.float32)
    # However many columns there are, together they say as much.
    logits = numbers @ truth.normal(0, 0.4 * (8 / num_numbers) ** 0.5, num_numbers) + intercept
    ids: list[NDArray[Any]] = []
    tastes: list[NDArray[Any]] = []
    for num in num_values:
        frequency = 1 / np.arange(1, num + 1)
        column = draws.choice(num, num_examples, p=frequency / frequency.sum())
        logits += truth.normal(0, 0.6 * (4 / len(num_values)) ** 0.5, num)[column]
        tastes.append(truth.standard_normal((num, 2))[column])
        ids.append(column)
    logits += (tastes[-2] * tastes[-1]).sum(axis=1)
    clicked = draws.random(num_examples) < 1 / (1 + np.exp(-logits))
    return numbers, np.stack(ids, axis=1).astype(np.int32), logits, clicked.astype(np.float32)[:, np.newaxis]
