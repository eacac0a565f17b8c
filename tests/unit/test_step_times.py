"""Where a step's time goes, on every worker, and who holds up the others."""

import itertools

import pytest

from tfdist.training.monitoring.step_times import StepTimes


class Waits:
    share = 0.1


def two_workers(slow_secs):
    """Each worker's summary, when the second computes for so long; steps take 1 s."""
    found, votes = [], []

    def run(rank, all_reduce_sum):
        clock = itertools.count()
        times = StepTimes(num_workers=2, rank=rank, now=lambda: float(next(clock)))
        times.begin_epoch()
        times.end_step(9.0, 9.0, counts=False)  # it compiles
        for _ in range(4):
            compute = 0.2 if rank == 0 else slow_secs
            times.end_step(compute, 0.8 - compute, counts=True)
        times.end_epoch(Waits(), all_reduce_sum)
        return times.summary()

    for rank in (0, 1):
        run(rank, lambda own: votes.append(own) or own)
    total = [a + b for a, b in zip(*votes, strict=True)]
    for rank in (0, 1):
        found.append(run(rank, lambda own: total))
    return found


def test_step_is_split_for_every_worker_and_the_same_everywhere():
    first, second = two_workers(slow_secs=0.3)
    assert first == second
    assert first["step_secs"][0] == pytest.approx(
        {"input": 0.1, "compute": 0.2, "exchange": 0.6, "update": 0.1, "between": 0.0}
    )
    assert first["step_secs"][1]["compute"] == pytest.approx(0.3)
    assert first["slowest_worker"] == 1
    assert "straggler" not in first


def test_what_comes_between_two_calls_is_no_part_of_the_update():
    moments = iter([0.0, 0.0, 2.0, 5.0, 6.0, 10.0, 11.0])
    times = StepTimes(num_workers=1, rank=0, now=moments.__next__)
    times.begin_epoch()
    for _ in range(2):
        times.begin_call()
        times.end_step(1.0, 0.5, counts=True)
    times.end_step(1.0, 0.0, counts=True)  # of the second call
    times.end_epoch(type("Waits", (), {"share": 0.0}), lambda own: own)
    (secs,) = times.summary()["step_secs"]
    assert secs == pytest.approx(
        {"input": 0.0, "compute": 1.0, "exchange": 1 / 3, "update": 4 / 3, "between": 1.0}, abs=1e-6
    )


def test_worker_that_computes_far_longer_than_the_median_is_named():
    first, _ = two_workers(slow_secs=0.7)
    assert first["slowest_worker"] == 1
    assert first["straggler"] == pytest.approx(0.7 / 0.45, abs=0.01)


def times_of(*, rest_secs, trace_secs, step_secs=0.01):
    moments = [0.0, trace_secs, *(trace_secs + step_secs * n for n in range(1, 5))]
    times = StepTimes(num_workers=1, rank=0, now=iter([0.0, *moments]).__next__)
    times.begin_epoch()
    times.end_step(1.0, 0.0, counts=False)
    for _ in range(4):
        times.end_step(0.9 * step_secs - rest_secs, 0.0, counts=True)
    times.end_epoch(Waits(), lambda own: own)
    return times


def test_steps_share_a_call_where_that_pays_for_its_compiling():
    # Of 4 ms a call, loops of four save 3 ms a step; compiling one takes 4 s, and that twice is the bound.
    assert times_of(rest_secs=0.004, trace_secs=1.0).loop_size(2_800) == 4
    assert times_of(rest_secs=0.004, trace_secs=1.0).loop_size(2_600) == 1
    assert times_of(rest_secs=0.004, trace_secs=2.0).loop_size(2_800) == 1
    assert times_of(rest_secs=0.0004, trace_secs=0.0).loop_size(10**6) == 1, "3% of the step's time"


def test_worker_that_saves_least_decides_for_all():
    """Who has no time between two steps wins nothing by sharing a call, and the others wait for it."""

    def size(other_rest_secs):
        times = StepTimes(num_workers=2, rank=0, now=itertools.count().__next__)
        times.begin_epoch()
        times.end_step(0.5, 0.0, counts=False)
        for _ in range(4):
            times.end_step(0.5, 0.0, counts=True)
        other = [0.0, 1.0 - other_rest_secs, 0.0, other_rest_secs / 2, other_rest_secs / 2, 1.0]
        times.end_epoch(Waits(), lambda own: [*own[:6], *other])
        return times.loop_size(10**6)

    assert size(other_rest_secs=0.4) > 1
    assert size(other_rest_secs=0.0) == 1


def test_nothing_is_said_before_a_step_was_measured():
    times = StepTimes(num_workers=1, rank=0)
    times.end_epoch(Waits(), lambda own: own)
    assert times.summary() == {}
    assert times.loop_size(10**9) == 1


@pytest.mark.parametrize(
    ("waited_secs", "split"),
    [
        (0.5, {"input": 0.1, "compute": 0.9, "exchange": 0.0, "update": 0.0, "between": 0.0}),
        (0.05, {"input": 0.1, "compute": 0.05, "exchange": 0.0, "update": 0.85, "between": 0.0}),
    ],
)
def test_host_that_waits_for_a_gpu_does_not_hold_it_up(waited_secs, split):
    clock = itertools.count()
    times = StepTimes(num_workers=1, rank=0, is_ahead=True, now=lambda: float(next(clock)))
    times.begin_epoch()
    for _ in range(4):
        times.end_step(waited_secs, 0.0, counts=True)
    times.end_epoch(Waits(), lambda own: own)
    assert times.summary()["step_secs"] == [pytest.approx(split)]
    # Steps in one call would save the host's time, which is free while it waits.
    assert times.loop_size(100, is_traced=False) == (1 if waited_secs == 0.5 else 4)
