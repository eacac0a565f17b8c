"""Programs made by chance give under a strategy what they give in plain Keras, or are refused in one line."""

import generated
import numpy as np
import pytest
from worlds import results_of

# One device is the cheapest, and what it finds all worlds have; two processes share the step of two replicas. With one
# micro-batch stages see the statistics of a whole batch.
BACKENDS = ["one_device", "mirrored-2", "one_device", "ps-1", "one_device", "mirrored-2"]
BACKENDS += ["one_device", "ps-1", "pipeline-2-1", "multiworker-2"]
NUM_DEFAULT, NUM_CI, NUM_ALL = 50, 200, 2000
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(1500)]
# What a strategy cannot do, and a part that a program must have to be refused for it.
REFUSED = {
    "ps-1": {"is no sum over examples": "largest"},
    "pipeline-2-1": {
        "has a train_step or compute_loss of its own": "own_step",
        "which has a train_step or compute_loss of its own": "x_alone",
    },
}


def part_of(case):
    """A process for so many programs: TensorFlow keeps something of each."""
    return int(case) // 100


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("worlds")
    return results_of(generated.__file__, folder, request, part_of)


@pytest.mark.parametrize(
    ("case", "world"),
    [
        pytest.param(
            str(seed),
            BACKENDS[seed % len(BACKENDS)],
            marks=() if seed < NUM_DEFAULT else pytest.mark.ci if seed < NUM_CI else pytest.mark.everything,
        )
        for seed in range(NUM_ALL)
    ],
)
def test_program_gives_what_keras_gives(results, case, world):
    parts = generated.draw(int(case)).parts
    wanted = {
        k.partition("/")[2]: v for k, v in results("keras", part_of(case)).items() if k.startswith(f"{case}/")
    }
    found = {
        k.partition("/")[2]: v for k, v in results(world, part_of(case)).items() if k.startswith(f"{case}/")
    }
    assert "failed" not in wanted, f"Keras itself: {wanted}"
    assert "failed" not in found, f"{found['failed']}\n{' '.join(parts)}"
    if "refused" in found:
        said = str(found["refused"])
        assert any(why in said and part in parts for why, part in REFUSED.get(world, {}).items()), said
        return
    assert sorted(found) == sorted(wanted), parts
    if world == "ps-1" and "callback=stop" in parts:
        # Obeyed once the steps on their way have been made.
        assert found["iterations"] >= wanted["iterations"]
        return
    # Over replicas a variance is the difference of two sums, whose rounding small batches enlarge.
    rtol = 2e-3 if "norm=batch" in parts else 2e-4
    for name, value in wanted.items():
        np.testing.assert_allclose(
            found[name], value, rtol=rtol, atol=5e-5, err_msg=f"{name} of: {' '.join(parts)}"
        )
