"""A step whose numbers are not finite changes nothing, under every strategy; what follows is what was asked for."""

import nan_steps
import numpy as np
import pytest
from worlds import marked, results_of

BACKENDS = ["one_device", "mirrored-2", "multiworker-2", "ps-1"]
# What undoes a step is one thing for all replicas: the cases differ in what it has to undo.
SKIP = [f"skip/{case}" for case in nan_steps.PLANTED]
SKIP_DEFAULT = {
    "mirrored-2": [f"skip/{c}" for c in ("sgd", "batch_norm", "accumulate_ema", "loss_scale", "two_players")],
    "multiworker-2": [],
    "ps-1": [f"skip/{c}" for c in ("sgd", "batch_norm", "adamw_ema", "accumulate", "own_step", "embedding")],
}
# Loss scaling is refused under ps, as test_refusals.py holds; replicas draw their own masks, and under ps the step's
# number says which.
SKIP_NEVER = {("skip/loss_scale", "ps-1"), *(("skip/dropout", world) for world in BACKENDS[1:])}
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(nan_steps.__file__, tmp_path_factory.mktemp("worlds"), request)


def part(found, name):
    return {key.removeprefix(f"{name}/"): v for key, v in found.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize(("case", "world"), marked(SKIP, BACKENDS, SKIP_DEFAULT, SKIP_NEVER))
def test_skipped_batch_leaves_what_keras_makes_of_data_without_it(results, world, case):
    """Weights, history and iterations; statistics, averages, slots and random streams by their effect on them."""
    wanted, found = part(results("keras"), case), part(results(world), case)
    assert sorted(found) == sorted(wanted)
    assert all(np.isfinite(value).all() for value in found.values())
    if case.startswith("skip/accumulate") and world == "ps-1":
        return  # There the batch counts as zeros in the mean.
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


SAID = {
    "stop/sgd": "the loss is not finite in epoch 1 at step 2: first in the inputs; example 13 of the training data.",
    "stop/gradients_only": "the gradients are not finite in epoch 1 at step 2: in the gradients of "
    "'before_root/kernel'; the forward pass is finite; example 13 of the training data.",
    "stop/loss_only": "the loss is not finite in epoch 1 at step 2: first in the loss; the model's outputs are finite; "
    "example 13 of the training data.",
    "stop/own_step": "the loss is not finite in epoch 1 at step 2: first in the inputs; "
    "example 13 of the training data.",
}


@pytest.mark.parametrize(
    ("case", "world"),
    marked(
        SAID,
        BACKENDS,
        {
            "mirrored-2": ["stop/sgd", "stop/gradients_only"],
            "multiworker-2": [],
            "ps-1": ["stop/sgd", "stop/loss_only"],
        },
    ),
)
def test_stop_names_step_place_and_example(results, world, case):
    found = part(results(world), case)
    assert str(found["error"]).startswith(SAID[case] + " Its update was not applied. Lower")
    assert all(np.isfinite(v).all() for name, v in found.items() if name.startswith("weight"))
    # Under ps the third step was on its way already.
    assert int(found["iterations"]) == 1 or (world == "ps-1" and int(found["iterations"]) <= 4)


@pytest.mark.parametrize(("case", "world"), marked(["rollback"], BACKENDS, {"multiworker-2": []}))
def test_rollback_goes_on_behind_the_batch_with_the_weights_of_the_checkpoint(results, case, world):
    wanted, found = part(results("keras"), case), part(results(world), case)
    for name in [name for name in wanted if name.startswith(("weight", "iterations"))]:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)
    assert found["checkpoints"].size == 3 and found["checkpoints"].all()
    # The first batch was measured, though its step was taken back.
    assert np.isfinite(found["history_loss"]).all() and found["history_loss"][0] > 0
