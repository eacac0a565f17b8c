"""In which order a stage makes the forward and backward passes of a batch's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch."""

    is_forward: bool
    micro_batch: int


def one_forward_one_backward(stage: int, num_stages: int, num_micro_batches: int) -> list[Pass]:
    """Returns PipeDream-flush's order (Narayanan et al. 2021): a stage holds `num_stages - stage` micro-batches."""
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


def foretell_step_secs(
    schedule: str,
    num_micro_batches: int,
    *,
    forward: Sequence[float],
    backward: Sequence[float],
    crossing: Sequence[float],
) -> float:
    """Returns how long a batch's passes take, by playing them through: sends and computing overlap.

    Args:
        schedule: One of `SCHEDULES`.
        num_micro_batches: Of the batch.
        forward: Seconds of a micro-batch's forward pass in each stage.
        backward: Of its backward pass.
        crossing: Seconds that what crosses from each stage but the last takes on the way, and its gradient back; one at
            a time in each direction.

    Raises:
        ValueError: If stages wait for each other.
    """
    num_stages = len(forward)
    orders = [SCHEDULES[schedule](stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    # When a stage, or a direction of a link, has nothing to do any more, and when a pass's outcome is where it goes.
    free, link_free = (
        [0.0] * num_stages,
        dict.fromkeys(((s, way) for s in range(num_stages) for way in (0, 1)), 0.0),
    )
    arrived: dict[tuple[int, Pass], float] = {(0, Pass(True, m)): 0.0 for m in range(num_micro_batches)}
    places = [0] * num_stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        before = list(places)
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                own = order[places[stage]]
                # The last stage turns round: what it waits for, its forward pass, it has made.
                is_turn = stage == num_stages - 1 and not own.is_forward
                if not is_turn and (stage, own) not in arrived:
                    break
                start = max(free[stage], 0.0 if is_turn else arrived[stage, own])
                free[stage] = start + (forward if own.is_forward else backward)[stage]
                places[stage] += 1
                to = stage + 1 if own.is_forward else stage - 1
                if 0 <= to < num_stages:
                    link = (min(stage, to), int(own.is_forward))
                    link_free[link] = max(link_free[link], free[stage]) + crossing[min(stage, to)]
                    arrived[to, own] = link_free[link]
        if places == before:
            raise ValueError(f"{schedule}: the stages wait for each other")
    return max(free)


def idle_share(num_stages: int, num_micro_batches: int) -> float:
    """Returns the share of a step in which a stage has nothing to do, where all stages take equally long."""
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)
