"""Several steps in one closure are the same steps; staleness is what it is said to be, in real processes."""

import numpy as np
import ps_steps
import pytest
from worlds import marked, results_of

pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]
NUM_STEPS = 2 * ps_steps.NUM_STEPS


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(ps_steps.__file__, tmp_path_factory.mktemp("worlds"), request)


def part(found, name):
    return {key.removeprefix(f"{name}/"): v for key, v in found.items() if key.startswith(f"{name}/")}


def check_equal(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


LOOP_CASES = [f"{loop}/{case}" for loop in ps_steps.LOOPS for case in ps_steps.CASES]
# What differs between steps of a closure: statistics, slots, random streams, sums that are carried on.
LOOP_DEFAULT = ("pairs/sgd", "pairs/batch_norm", "pairs/embedding", "fours/accumulate", "fours/dropout")


@pytest.mark.parametrize(("case", "world"), marked(LOOP_CASES, ["ps-1"], {"ps-1": LOOP_DEFAULT}))
def test_steps_in_one_closure_equal_keras(results, case, world):
    """Weights, history, evaluation, predictions, iterations; random streams and accumulation by their effect."""
    check_equal(part(results(world), case), part(results("keras"), f"plain/{case.partition('/')[2]}"))


def test_steps_in_one_closure_have_each_their_logs(results):
    found = results("ps-1")
    check_equal(part(found, "watched/sgd"), part(results("keras"), "plain/sgd"))
    losses = found["watched/losses"]
    assert len(losses) == 10
    assert len(set(losses)) == 10
    np.testing.assert_allclose(losses[[4, 9]], part(found, "watched/sgd")["history_loss"], rtol=1e-6)


@pytest.mark.parametrize("case", ps_steps.SKIPPING)
def test_bad_step_of_a_closure_is_left_out_alone(results, case):
    check_equal(part(results("ps-1"), f"skip/{case}"), part(results("keras"), f"skip/{case}"))


def test_bad_step_of_a_closure_is_named(results):
    assert "in epoch 1 at step 3: first in the inputs; example 13" in str(results("ps-1")["said/error"])


def test_checkpoints_come_at_their_steps(results):
    """Every three steps of five, though a closure holds two."""
    found = [
        name.removeprefix("epoch-0000").removesuffix(".npz") for name in results("ps-1")["said/checkpoints"]
    ]
    steps = [(0, 3), (1, 0), (1, 3), (2, 0)]
    assert found == [f"{epoch}-step-{step:08}" for epoch, step in steps]


TOGETHER = [f"sync/{case}" for case in (*ps_steps.TOGETHER, "stream")]
TOGETHER_DEFAULT = [f"sync/{c}" for c in ("adam", "accumulate_ema", "schedule", "own_step", "embedding")]
TOGETHER_DEFAULT += ["sync/sgd", "sync/two_outputs", "sync/stream"]


@pytest.mark.parametrize(("case", "world"), marked(TOGETHER, ["ps-2"], {"ps-2": TOGETHER_DEFAULT}))
def test_workers_that_step_together_equal_keras(results, case, world):
    """Two workers, each with a part of every batch: weights, history, evaluation, predictions and iterations."""
    found = part(results(world), case)
    name = case.partition("/")[2]
    wanted = part(results("keras"), f"plain/{'sgd' if name == 'stream' else name}")
    wanted = {k: v for k, v in wanted.items() if not k.endswith(("kind_loss", "size_loss"))}
    if name == "stream":
        wanted = {k: v for k, v in wanted.items() if not k.startswith(("evaluate", "predict"))}
    check_equal({k: v for k, v in found.items() if not k.endswith(("kind_loss", "size_loss"))}, wanted)


def test_workers_that_step_together_miss_nothing(results):
    found = part(results("ps-2"), "sync_measures")
    assert found["staleness_mean"] == found["staleness_p95"] == 0


@pytest.mark.parametrize("case", ps_steps.SKIPPING_TOGETHER)
def test_bad_batch_is_left_out_by_all(results, case):
    check_equal(part(results("ps-2"), f"sync_skip/{case}"), part(results("keras"), f"skip/{case}"))


@pytest.mark.parametrize(
    ("case", "word"),
    [("two_players", "2 optimizers"), ("mask", "a mask"), ("weights", "mean_with_sample_weight")],
)
def test_what_cannot_be_divided_is_refused(results, case, word):
    said = str(results("ps-2")[f"refused/{case}/error"])
    assert word in said and "ps_mode='sync'" in said and "strategy='multiworker'" in said


@pytest.mark.parametrize("name", ["free", "own_choice", "bound_0", "bound_2"])
def test_two_workers_lose_no_step(results, name):
    found = part(results("ps-2"), name)
    np.testing.assert_allclose(found["moved"], 0.5 * NUM_STEPS, rtol=1e-6)
    assert found["iterations"] == NUM_STEPS
    np.testing.assert_array_equal(found["count"], [NUM_STEPS] * 2)  # two examples a step


def test_staleness_is_measured_and_bounded(results):
    found = results("ps-2")
    assert found["bound_0/staleness_mean"] == found["bound_0/staleness_p95"] == 0
    assert 0 <= found["bound_2/staleness_p95"] <= 2
    # Two workers that step all the time miss about one step of each other.
    assert 0.2 < found["free/staleness_mean"] < 5
    assert found["free/staleness_mean"] <= found["free/staleness_p95"]
    assert 0 < found["free/dispatch_share"] < 1


def test_inverse_scales_the_rate_by_staleness(results):
    """A constant gradient moves the weight by less where steps were stale."""
    found = part(results("ps-2"), "inverse")
    assert found["staleness_mean"] > 0.2
    assert 0.1 * NUM_STEPS < found["moved"] < 0.48 * NUM_STEPS
