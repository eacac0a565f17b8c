import itertools
import math

import pytest

from tfdist.training.ps.dispatch import Dispatch


class Clock:
    def __init__(self):
        self.secs = 5.0

    def __call__(self):
        return self.secs


def run_closures(dispatch, clock, *, number, secs, busy_secs, num_steps=1):
    for _ in range(number):
        clock.secs += secs
        dispatch.end_closure(busy_secs, num_steps=num_steps)


def test_share_is_what_the_workers_did_not_work():
    clock = Clock()
    dispatch = Dispatch(num_workers=2, now=clock)
    assert dispatch.share is None
    run_closures(dispatch, clock, number=10, secs=1.0, busy_secs=1.5)
    assert dispatch.share == pytest.approx(0.25)
    dispatch.begin_epoch()
    assert dispatch.share is None


def test_compiling_is_left_out():
    clock = Clock()
    dispatch = Dispatch(num_workers=1, now=clock)
    dispatch.begin_compile()
    clock.secs += 100
    dispatch.end_compile(3.0, num_steps=1)
    dispatch.end_closure(0.5, num_steps=1)
    run_closures(dispatch, clock, number=3, secs=1.0, busy_secs=0.5)
    assert dispatch.share == pytest.approx(1 - 2.0 / 3)


@pytest.mark.parametrize(("busy_secs", "wanted"), [(0.1, 1), (0.02, 4), (0.008, 16), (0.0001, 16)])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_closures_grow_until_little_is_lost_between_them(busy_secs, wanted, num_workers):
    """Two milliseconds a closure here: at most 3 % of the time, or closures of 16 steps."""
    clock = Clock()
    dispatch = Dispatch(num_workers=num_workers, now=clock)
    chosen = [1]
    for _ in range(4):
        busy = chosen[-1] * busy_secs
        secs = (busy + 0.002) / num_workers
        number = max(60, math.ceil(1.01 / secs))
        run_closures(dispatch, clock, number=number, secs=secs, busy_secs=busy, num_steps=chosen[-1])
        chosen.append(dispatch.choose_steps())
    assert chosen[-1] == wanted
    assert all(after <= 4 * before for before, after in itertools.pairwise(chosen))
    assert 0.002 / (wanted * busy_secs + 0.002) <= 0.03 or wanted == 16


def run_epochs(dispatch, clock, *, number, step_secs, lost_secs, **left):
    """Epochs of 100 steps, between whose closures as much time is lost; returns the steps of each one's closures."""
    chosen = []
    for _ in range(number):
        size = dispatch.choose_steps(**left)
        chosen.append(size)
        dispatch.begin_epoch()
        run_closures(
            dispatch,
            clock,
            number=100 // size,
            secs=size * step_secs(size) + lost_secs,
            busy_secs=size * step_secs(size),
            num_steps=size,
        )
    return chosen


def compiled(secs):
    clock = Clock()
    dispatch = Dispatch(num_workers=1, now=clock)
    dispatch.begin_compile()
    dispatch.end_compile(secs, num_steps=1)
    return dispatch, clock


def test_closures_grow_only_when_tracing_them_is_worth_it():
    """Four steps take 2.1 s to trace, and 0.8 s an epoch are lost; then 16 take 2.6 s, and 0.2 s."""
    dispatch, clock = compiled(2.0)
    chosen = run_epochs(dispatch, clock, number=16, step_secs=lambda size: 0.008, lost_secs=0.008)
    assert chosen == [1] * 3 + [4] * 13
    assert run_epochs(dispatch, clock, number=1, step_secs=lambda size: 0.008, lost_secs=0.008) == [16]


@pytest.mark.parametrize(("num_left", "wanted"), [(700, 1), (710, 4)])
def test_closures_do_not_grow_when_too_few_steps_are_left_to_win_it_back(num_left, wanted):
    """Six milliseconds a step are won with four of them: twice 2.12 s take 706 steps."""
    dispatch, clock = compiled(2.0)
    chosen = run_epochs(
        dispatch, clock, number=6, step_secs=lambda size: 0.008, lost_secs=0.008, num_left=num_left
    )
    assert chosen[-1] == wanted


def test_larger_closures_that_are_slower_are_given_up_for_good():
    dispatch, clock = compiled(0.1)
    slower = {1: 0.008, 4: 0.016}
    chosen = run_epochs(dispatch, clock, number=20, step_secs=slower.get, lost_secs=0.004)
    assert chosen[:2] == [1, 4] and set(chosen[2:]) == {1}


@pytest.mark.parametrize(("num_in_epoch", "wanted"), [(23, 4), (7, 1), (64, 16), (1000, 16)])
def test_an_epoch_gives_each_worker_several_closures(num_in_epoch, wanted):
    dispatch, clock = compiled(0.1)
    chosen = run_epochs(
        dispatch, clock, number=20, step_secs=lambda size: 0.002, lost_secs=0.02, num_in_epoch=num_in_epoch
    )
    assert chosen[-1] == wanted
