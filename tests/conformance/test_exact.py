"""The distributed answer equals the single-device answer: every case under every strategy, in real processes."""

import cases
import numpy as np
import pytest
from worlds import marked, results_of

BACKENDS = ["one_device", "mirrored-2", "mirrored-4", "multiworker-2", "ps-1"]
# What test_generated.py does not draw, and four replicas, of which some have no example; the rest with --everything.
OWN = ("loss_scale", "embedding", "two_outputs", "two_players", "wide", "lars", "dice", "dropout")
DEFAULT = {
    "one_device": OWN,
    "mirrored-2": ("loss_scale", "embedding", "two_players"),
    "mirrored-4": ("sgd", "mask", "two_outputs"),
    "multiworker-2": ("loss_scale", "embedding", "two_outputs", "two_players", "wide", "lars"),
    "ps-1": OWN,
}
# Replicas draw their own masks by design, as test_promises.py holds; loss scaling is refused, as test_refusals.py does.
NEVER = {("loss_scale", "ps-1"), *(("dropout", world) for world in BACKENDS[1:-1])}
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(cases.__file__, tmp_path_factory.mktemp("worlds"), request)


@pytest.mark.parametrize(("case", "world"), marked(cases.CASES, BACKENDS, DEFAULT, NEVER))
def test_case_equals_keras(results, world, case):
    """Weights, history, evaluation, predictions and iterations agree to float32 rounding."""
    wanted = {k: v for k, v in results("keras").items() if k.startswith(case + "/")}
    found = {k: v for k, v in results(world).items() if k.startswith(case + "/")}
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        if name.endswith(("kind_loss", "size_loss")) and world != "one_device":
            # Keras averages these over batches, whatever their size; tfdist over examples, so that the parts add up.
            whole = f"{case}/{name.partition('/')[2].partition('_')[0]}_"
            parts = found[f"{whole}kind_loss"] + 0.3 * found[f"{whole}size_loss"]
            np.testing.assert_allclose(parts, found[f"{whole}loss"], rtol=2e-5)
            continue
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)
