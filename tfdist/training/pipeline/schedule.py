"""In which order a stage makes the forward and backward passes of a batch's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch."""

    is_forward: bool
    micro_batch: int


def one_forward_one_backward(stage: int, num_stages: int, num_micro_batches: int) -> list[Pass]:
    """Returns PipeDream-flush's order (Narayanan et al. 2021): a stage holds `num_stages - stage` micro-batches.

    Args:
        stage: Zero-based.
        num_stages: Of the model.
        num_micro_batches: Of a batch.
    """
    ahead = min(num_stages - 1 - stage, num_micro_batches)
    passes = [Pass(True, m) for m in range(ahead)]
    for m in range(ahead, num_micro_batches):
        passes += [Pass(True, m), Pass(False, m - ahead)]
    return passes + [Pass(False, m) for m in range(num_micro_batches - ahead, num_micro_batches)]


def all_forward_all_backward(stage: int, num_stages: int, num_micro_batches: int) -> list[Pass]:
    """Returns GPipe's order (Huang et al. 2019), in which every stage holds all micro-batches at once."""
    del stage, num_stages
    micro_batches = range(num_micro_batches)
    return [Pass(True, m) for m in micro_batches] + [Pass(False, m) for m in micro_batches]


SCHEDULES: Mapping[str, Callable[[int, int, int], list[Pass]]] = {
    "1f1b": one_forward_one_backward,
    "gpipe": all_forward_all_backward,
}


def idle_share(num_stages: int, num_micro_batches: int) -> float:
    """Returns the share of a step in which a stage has nothing to do, where all stages take equally long."""
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)
