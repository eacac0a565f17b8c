"""With a slow worker: parts that are late are dropped and counted, and a step is that of the parts that came."""

import backups
import numpy as np
import pytest
from worlds import results_of

pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]
NUM_STEPS = backups.EPOCHS * backups.STEPS
OPTIMIZERS = ["sgd", "lazy_adam"]


@pytest.fixture(scope="module")
def found(tmp_path_factory, request):
    return results_of(backups.__file__, tmp_path_factory.mktemp("worlds"), request)("ps-3")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_example_counts_or_is_counted_as_dropped(found, name):
    counted = found[f"{name}/count"] + found[f"{name}/num_dropped"]
    np.testing.assert_array_equal(counted, [backups.COUNT] * backups.EPOCHS)
    assert found[f"{name}/iterations"] == NUM_STEPS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_late_parts_are_dropped(found, name):
    """In most steps one of three parts, never more."""
    assert (found[f"{name}/num_dropped"] > backups.STEPS / 2).all()
    assert (found[f"{name}/num_dropped"] <= 3 * backups.STEPS).all()


def test_a_step_is_the_mean_of_the_parts_that_came(found):
    """Were late parts zeros in the mean, or counted twice, weights and statistics would have moved by another step."""
    moved = -backups.RATE * NUM_STEPS
    np.testing.assert_allclose(found["sgd/dense"], [[moved]], rtol=1e-5)
    np.testing.assert_allclose(found["sgd/beta"], [moved], rtol=1e-5)
    np.testing.assert_allclose(found["sgd/table"], [[0], [0], [moved], [0]], rtol=1e-5)
    np.testing.assert_allclose(found["sgd/moving_mean"], [1 - 0.9**NUM_STEPS], rtol=1e-4)


def test_rows_of_late_parts_alone_do_not_move(found):
    """Adam moves by its rate at each step where the gradient never changes."""
    np.testing.assert_allclose(
        found["lazy_adam/table"], [[0], [0], [-backups.RATE * NUM_STEPS], [0]], rtol=1e-3
    )


def test_somebody_must_count(found):
    assert "num_backup_workers=3 with num_workers=3" in str(found["refused"])


def test_fit_that_failed_leaves_nothing_that_holds_up_the_next(found):
    """The workers had parts in flight, which nobody asks for any more."""
    assert "a target below zero" in str(found["failed"])
    assert 0 < found["count_after_a_failure"] <= backups.COUNT
