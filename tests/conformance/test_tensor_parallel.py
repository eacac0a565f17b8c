"""A model whose layers lie in blocks in several processes is the whole model."""

import block_cases
import numpy as np
import pytest
from worlds import marked, results_of

# Stages, micro-batches, copies of the model, and blocks of a layer.
BACKENDS = ["pipeline-1-1-1-2", "pipeline-1-2-2-2", "pipeline-2-4-1-2"]
# Micro-batches draw their own masks by design.
NEVER = {("dropout", world) for world in BACKENDS[1:]}
DEFAULT = {"pipeline-1-2-2-2": ("language", "averaged"), "pipeline-2-4-1-2": ("ignored", "stock")}
CI = ("pipeline-1-2-2-2", "pipeline-2-4-1-2")
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(block_cases.__file__, tmp_path_factory.mktemp("worlds"), request)


@pytest.mark.parametrize(("case", "world"), marked(block_cases.CASES, BACKENDS, DEFAULT, NEVER, CI))
def test_case_equals_keras(results, world, case):
    """Weights, history, evaluation, predictions and iterations agree to float32 rounding."""
    wanted = {k: v for k, v in results("keras").items() if k.startswith(case + "/")}
    found = {k: v for k, v in results(world).items() if k.startswith(case + "/")}
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)
