"""Several steps in one call of a graph are the same steps, bit for bit, and nothing that is due is missed."""

import json

import loops
import numpy as np
import pytest
from worlds import marked, results_of

BACKENDS = ["one_device", "mirrored-2", "multiworker-2"]
DEFAULT = {"mirrored-2": ("plain", "ahead"), "multiworker-2": ()}
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(loops.__file__, tmp_path_factory.mktemp("worlds"), request)


def for_case(case):
    return pytest.mark.parametrize(("case", "world"), marked([case], BACKENDS, DEFAULT))


@for_case("plain")
def test_weights_and_logs_are_those_of_single_steps(results, case, world):
    found = results(world)
    for name in ("weights", "logs", "iterations"):
        np.testing.assert_array_equal(found[f"plain/4/{name}"], found[f"plain/1/{name}"])
    assert found["plain/4/iterations"] == 2 * 12
    # Eleven whole batches: two loops of four, and the rest one by one; the short batch is another segment.
    assert found["plain/4/sizes"].tolist() == 2 * [4, 4, 1, 1, 1, 1]
    assert set(found["plain/1/sizes"].tolist()) == {1}


@for_case("auto")
def test_loops_that_pay_begin_with_the_second_epoch(results, case, world):
    found = results(world)
    assert found["auto/4/sizes"].tolist() == 12 * [1] + [4, 4, 1, 1, 1, 1]
    for name in ("weights", "logs", "iterations"):
        np.testing.assert_array_equal(found[f"auto/4/{name}"], found[f"plain/1/{name}"])


@for_case("stop")
def test_step_that_is_wrong_inside_a_loop_is_named_and_the_last(results, case, world):
    found = results(world)
    step = loops.POISONED // loops.BATCH
    for size in (1, 4):
        assert f"at step {step + 1}" in str(found[f"stop/{size}/error"])
        assert found[f"stop/{size}/iterations"] == step
    np.testing.assert_array_equal(found["stop/4/weights"], found["stop/1/weights"])


@for_case("rollback")
def test_rollback_and_checkpoints_are_those_of_single_steps(results, case, world):
    found = results(world)
    for name in ("weights", "logs", "iterations", "error", "kept"):
        np.testing.assert_array_equal(found[f"rollback/4/{name}"], found[f"rollback/1/{name}"])
    assert len(json.loads(str(found["rollback/4/kept"]))) == 3
    assert 4 in found["rollback/4/sizes"]


@for_case("ahead")
def test_host_that_runs_ahead_of_a_gpu_makes_the_same_steps(results, case, world):
    found = results(world)
    for name in ("weights", "logs", "iterations", "error"):
        for way in ("plain", "stop", "rollback"):
            np.testing.assert_array_equal(found[f"{way}/ahead/{name}"], found[f"{way}/1/{name}"], err_msg=way)
    assert str(found["rollback/ahead/kept"]) == str(found["rollback/1/kept"])


@for_case("words")
def test_model_that_xla_has_no_code_for_trains_without_it(results, case, world):
    found = results(world)
    for name in ("weights", "logs", "iterations"):
        np.testing.assert_array_equal(found[f"words/ahead/{name}"], found[f"words/1/{name}"])


@for_case("stream")
def test_data_of_unknown_length_are_trained_on_step_by_step(results, case, world):
    found = results(world)
    assert set(found["stream/4/sizes"].tolist()) == {1}
    assert found["stream/4/iterations"] == 2 * 12


@for_case("deterministic")
def test_steps_without_a_clock_are_the_same(results, case, world):
    """TensorFlow has no clock in its graphs where it must be deterministic."""
    found = results(world)
    for name in ("weights", "logs", "iterations"):
        again = found[f"deterministic/1/{name}"]
        np.testing.assert_array_equal(again, found[f"deterministic/2/{name}"])
        np.testing.assert_allclose(again, found[f"plain/1/{name}"], rtol=1e-4, atol=1e-4)
