"""XLA changes no more than rounding, whatever else is asked for: on the CPU, by the same rules as for a GPU."""

import jit
import numpy as np
import pytest
from worlds import marked, results_of

BACKENDS = ["one_device", "mirrored-2", "multiworker-2"]
# Where replicas meet, test_sync_ways.py and test_loops.py compile by default.
DEFAULT = {"mirrored-2": (), "multiworker-2": ()}
CI = ("spike_stream", "remainder_loops", "profile", "bfloat16")
# Half precision rounds at other places where operations are fused.
TOLERANCE = {"bfloat16": 3e-2, "float16": 1e-2}
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(jit.__file__, tmp_path_factory.mktemp("worlds"), request)


@pytest.mark.parametrize(("case", "world"), marked(jit.CASES, BACKENDS, DEFAULT, ci=CI))
def test_option_means_the_same_under_xla(results, case, world):
    found = results(world)
    limit = TOLERANCE.get(case, 1e-4)
    for name in ("weights", "logs", "predicted"):
        np.testing.assert_allclose(
            found[f"{case}/on/{name}"], found[f"{case}/off/{name}"], rtol=limit, atol=limit, err_msg=name
        )
    assert found[f"{case}/on/iterations"] == found[f"{case}/off/iterations"] > 0
