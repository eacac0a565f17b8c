"""A model whose layers lie in several processes is the whole model, whatever the stages and the micro-batches."""

import cases
import numpy as np
import pytest
from worlds import marked, results_of, run_world

# Stages, micro-batches, and copies of the model.
BACKENDS = ["pipeline-2-1", "pipeline-2-8", "pipeline-3-2", "pipeline-2-2-2"]
# Refused: steps of their own, a loss scale.
NEVER = {(case, world) for case in ("own_step", "two_players", "loss_scale") for world in BACKENDS}
# Micro-batches draw their own masks and see their own statistics by design.
NEVER |= {(case, world) for case in ("dropout", "batch_norm") for world in BACKENDS[1:]}
# With fewer layers than stages.
CUT_THRICE = ("embedding", "two_outputs", "wide", "tied")
NEVER |= {(case, BACKENDS[2]) for case in cases.CASES if case not in CUT_THRICE}
DEFAULT = {
    "pipeline-2-1": ("dropout", "batch_norm"),
    "pipeline-2-8": [case for case in cases.CASES if case not in ("accumulate", "validation_split")],
    "pipeline-3-2": CUT_THRICE,
    "pipeline-2-2-2": ("weights", "embedding", "two_outputs", "tied"),
}
CI = ("pipeline-2-1", "pipeline-3-2", "sgd", "adamw_ema", "schedule", "class_weight")
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(cases.__file__, tmp_path_factory.mktemp("worlds"), request)


@pytest.mark.parametrize(
    ("case", "world"), [p for p in marked(cases.CASES, BACKENDS, DEFAULT, NEVER, CI) if p.values not in NEVER]
)
def test_case_equals_keras(results, world, case):
    """Weights, history, evaluation, predictions and iterations agree to float32 rounding."""
    wanted = {k: v for k, v in results("keras").items() if k.startswith(case + "/")}
    found = {k: v for k, v in results(world).items() if k.startswith(case + "/")}
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        if name.endswith(("kind_loss", "size_loss")):
            continue  # Keras averages these over batches; here they are averaged over examples
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_micro_batches_and_copies_draw_what_replicas_draw(tmp_path, monkeypatch):
    worlds = ("pipeline-2-2", "pipeline-2-1-2")
    monkeypatch.setenv("TFDIST_TEST_CASES", "dropout")
    found = {}
    for world in ("mirrored-2", *worlds):
        run_world(cases.__file__, tmp_path / f"{world}.npz", world)
        with np.load(tmp_path / f"{world}.npz") as stored:
            found[world] = dict(stored)
    for world in worlds:
        for name, value in found["mirrored-2"].items():
            np.testing.assert_allclose(
                found[world][name], value, rtol=2e-5, atol=2e-5, err_msg=f"{world} {name}"
            )
