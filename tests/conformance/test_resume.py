"""Killed after any step and started again, a run ends as if nothing had happened."""

import json
import os
import re

import numpy as np
import pytest
import resumed
from tiers import rarely
from worlds import run_world

BACKENDS = rarely(["one_device", "mirrored-2", "multiworker-2", "ps-1"], "mirrored-2")
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the program in a world; returns what it left, and says whether it died."""

    def run(world, *, name="run", die_at=0, every_secs=None, stream="", sync=None):
        monkeypatch.setenv("RESUMED_SYNC", json.dumps(sync or {}))
        monkeypatch.setenv("RESUMED_STREAM", stream)
        monkeypatch.setenv("RESUMED_CHECKPOINTS", str(tmp_path / name / "checkpoints"))
        monkeypatch.setenv("RESUMED_DIE_AT", str(die_at))
        if every_secs is not None:
            monkeypatch.setenv("RESUMED_EVERY_SECS", str(every_secs))
        (tmp_path / name).mkdir(exist_ok=True)
        out = tmp_path / name / "out.npz"
        if die_at:
            with pytest.raises(AssertionError, match="SIGKILL|exit code -9"):
                run_world(resumed.__file__, out, world)
            return None
        run_world(resumed.__file__, out, world)
        with np.load(out) as stored:
            return dict(stored)

    return run


def assert_same(found, wanted, *, rtol=0.0):
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        # The metrics' sums are brought together at a checkpoint: another order of adding up.
        exact = rtol == 0.0 and not name.startswith(("history", "best"))
        np.testing.assert_allclose(
            found[name], value, rtol=0.0 if exact else max(rtol, 1e-6), atol=rtol, err_msg=name
        )


@pytest.mark.parametrize("world", BACKENDS)
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted(start, world):
    """Inside the third epoch, for one device inside the first too; dropout, slots, history and callbacks included."""
    wanted = start(world, name="whole")
    if world == "one_device":
        start(world, die_at=11)
    start(world, die_at=45)
    assert_same(start(world), wanted)


@pytest.mark.parametrize(
    "sync",
    [
        {"sync": "diloco", "sync_period": 3, "sync_warmup_steps": 30},
        pytest.param({"sync": "delayed"}, marks=pytest.mark.everything),
        pytest.param({"exchange_dtype": "bfloat16", "error_feedback": True}, marks=pytest.mark.everything),
    ],
    ids=lambda sync: "-".join(str(value) for value in sync.values()),
)
def test_what_workers_keep_for_themselves_is_not_missed(start, sync):
    """They agree at every checkpoint, and drop what only one of them knows, in a run that is not stopped too."""
    wanted = start("multiworker-2", name="whole", sync=sync)
    start("multiworker-2", die_at=45, sync=sync)
    assert_same(start("multiworker-2", sync=sync), wanted)


@pytest.mark.parametrize("world", BACKENDS)
def test_stream_goes_on_without_reading_again(start, world):
    """What comes of a stream whose examples were spoiled meanwhile is what came before: none is read a second time."""
    wanted = start(world, name="whole", stream="good")
    start(world, die_at=13, stream="good")
    assert_same(start(world, stream="spoiled"), wanted)


@pytest.mark.parametrize("world", rarely(["one_device", "multiworker-2", "ps-2"], ci=("one_device", "ps")))
def test_clock_says_when_too(start, tmp_path, world):
    """The chief's clock, on which all workers act; far more often than an epoch's end."""
    start(world, die_at=18, every_secs=0.001)
    # Without what was half-written when it died.
    names = [name for name in os.listdir(tmp_path / "run/checkpoints") if not name.startswith(".")]
    assert all(re.fullmatch(r"epoch-00000-step-000000(0[1-9]|1\d).npz", name) for name in names), names
    assert names
    assert list(start(world, every_secs=60)["epochs"]) == [0, 1, 2, 3]


def test_run_moves_to_another_strategy(start):
    """One replica's dropout is not two replicas': only what must agree is compared, the steps and the epochs."""
    start("multiworker-2", die_at=30)
    found = start("ps-1")
    assert list(found["epochs"]) == [0, 1, 2, 3]
    steps = resumed.EPOCHS * -(-resumed.EXAMPLES // resumed.BATCH)
    assert steps in [int(value) for name, value in found.items() if np.ndim(value) == 0]
