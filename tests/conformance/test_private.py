"""Private training is plain training where nothing is cut or added, and what is cut or added is what it says."""

import keras
import numpy as np
import private
import pytest
import tensorflow as tf
from worlds import marked, results_of

WORLDS = ["one_device", "mirrored-2", "mirrored-4", "multiworker-2"]
DEFAULT = {
    "mirrored-4": ("noise",),
    "mirrored-2": ("images", "clip", "noise"),
    "multiworker-2": ("table", "poisson", "noise"),
}
CI = ("multiworker-2",)
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(private.__file__, tmp_path_factory.mktemp("worlds"), request)


@pytest.mark.parametrize(("case", "world"), marked(private.EXACT, WORLDS, DEFAULT, ci=CI))
def test_without_noise_and_cuts_it_is_plain_training(results, case, world):
    found = results(world)
    for name in ("weights", "logs"):
        np.testing.assert_allclose(
            found[f"{case}/private/{name}"], found[f"{case}/plain/{name}"], rtol=1e-5, atol=1e-5, err_msg=name
        )
    assert found[f"{case}/private/iterations"] == found[f"{case}/plain/iterations"] == 12


@pytest.mark.parametrize(("case", "world"), marked(private.SAME_SEED, WORLDS, DEFAULT, ci=CI))
def test_the_same_seed_trains_the_same_under_each_strategy(results, case, world):
    found, alone = results(world), results("one_device")
    for name in ("weights", "logs"):
        np.testing.assert_allclose(
            found[f"{case}/{name}"], alone[f"{case}/{name}"], rtol=1e-4, atol=1e-5, err_msg=name
        )
    assert "epsilon" in found[f"{case}/names"]


@pytest.mark.parametrize(("case", "world"), marked(["clip"], WORLDS, DEFAULT, ci=CI))
def test_each_examples_gradient_is_cut_by_itself(results, case, world):
    keras.utils.set_random_seed(3)
    model = private.build_model(private.images(), keras.optimizers.SGD(1.0))
    expected = [np.zeros(w.shape) for w in model.get_weights()]
    for x, y in zip(private.X[:13], private.Y[:13], strict=True):
        with tf.GradientTape() as tape:
            outputs = model(x[None], training=True)
            loss = model.compute_loss(x[None], y[None], outputs)
        grads = [g.numpy() for g in tape.gradient(loss, [w.value for w in model.trainable_weights])]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        assert norm > 0.2  # or nothing would be cut
        expected = [e + g * 0.2 / norm / 13 for e, g in zip(expected, grads, strict=True)]
    for i, e in enumerate(expected):
        np.testing.assert_allclose(results(world)[f"clip/{i}"], e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("case", "world"), marked(["noise", "secure_noise"], WORLDS, DEFAULT, ci=CI))
def test_the_noise_in_the_sum_is_one_whatever_the_replicas(results, case, world):
    """20,000 numbers: their standard deviation is off by 0.5%; two replicas' noises would make it 1.41."""
    added = results(world)[f"{case}/added"]
    assert added.std() == pytest.approx(1, abs=0.03)
    assert added.mean() == pytest.approx(0, abs=0.03)
    # A normal law: within one and two deviations.
    assert (abs(added) < 1).mean() == pytest.approx(0.6827, abs=0.015)
    assert (abs(added) < 2).mean() == pytest.approx(0.9545, abs=0.008)
    assert len(np.unique(added)) > 19_900
