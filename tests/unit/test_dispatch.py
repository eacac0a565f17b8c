import itertools

import pytest

from tfdist.training.dispatch import Dispatch


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
        run_closures(dispatch, clock, number=60, secs=secs, busy_secs=busy, num_steps=chosen[-1])
        chosen.append(dispatch.choose_steps())
    assert chosen[-1] == wanted
    assert all(after <= 4 * before for before, after in itertools.pairwise(chosen))
    assert 0.002 / (wanted * busy_secs + 0.002) <= 0.03 or wanted == 16


def test_closures_grow_only_when_tracing_them_is_worth_it():
    clock = Clock()
    dispatch = Dispatch(num_workers=1, now=clock)
    dispatch.begin_compile()
    dispatch.end_compile(0.5, num_steps=1)
    chosen = []
    for _ in range(14):  # 4 steps take 2 s to trace, 16 take 8 s; 0.8 s an epoch are lost
        chosen.append(dispatch.choose_steps())
        dispatch.begin_epoch()
        run_closures(dispatch, clock, number=100, secs=0.016, busy_secs=0.008, num_steps=chosen[-1])
    assert chosen == [1] * 3 + [4] * 11
    dispatch.begin_epoch()
    assert dispatch.choose_steps() == 16
