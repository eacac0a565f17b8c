"""Each way of sharing does what its source says: held against a simulation, or against every_step which it equals."""

import numpy as np
import pytest
import sync_ways
from worlds import marked, results_of

from tfdist.training.sync.local_steps import neighbours

pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]
STEPS = sync_ways.EPOCHS * -(-sync_ways.COUNT // sync_ways.BATCH)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


BACKENDS = ["multiworker-2", "multiworker-3"]  # by TensorFlow's collectives, and by MPI
LOCAL_DEFAULT = {
    "multiworker-2": ("local_sgd", "diloco", "gossip_ring", "delayed"),
    "multiworker-3": (
        "post_local",
        "diloco",
        "gossip_ring",
        "gossip_exponential",
        "gossip_complete",
        "delayed",
    ),
}
EXACT_DEFAULT = {
    "multiworker-2": ("every_step", "compiled", "diloco_plain"),
    "multiworker-3": ("every_step", "small_buckets", "compiled_if_faster", "local_sgd_1"),
}
ABOUT = {"bfloat16": 2e-2, "float16": 2e-3, "bfloat16_feedback": 1e-2}
ABOUT_DEFAULT = {"multiworker-2": ("bfloat16", "bfloat16_feedback"), "multiworker-3": ("bfloat16", "float16")}


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """What every way ended with: in real workers, and simulated."""
    return results_of(sync_ways.__file__, tmp_path_factory.mktemp("ways"), request)


def weights(found, way):
    return [found[f"{way}/{i}"] for i in range(4)]


@pytest.mark.parametrize(("case", "world"), marked(sync_ways.LOCAL, BACKENDS, LOCAL_DEFAULT))
def test_way_equals_its_simulation(results, case, world):
    found, simulated = results(world), weights(results("keras"), f"{world[-1]}/{case}")
    for value, wanted in zip(weights(found, case), simulated, strict=True):
        np.testing.assert_allclose(value, wanted, **TOLERANCE)
    assert found[f"{case}/iterations"] == STEPS


@pytest.mark.parametrize(("case", "world"), marked(sync_ways.EXACT, BACKENDS, EXACT_DEFAULT))
def test_way_equals_every_step(results, case, world):
    found = results(world)
    for value, wanted in zip(weights(found, case), weights(found, "every_step"), strict=True):
        np.testing.assert_allclose(value, wanted, **TOLERANCE)
    assert found[f"{case}/iterations"] == STEPS


@pytest.mark.parametrize(("case", "world"), marked(ABOUT, BACKENDS, ABOUT_DEFAULT))
def test_narrow_exchange_is_about_every_step(results, case, world):
    """A number loses half a unit of its last place at each of 8 steps: 2^-9 of itself in bfloat16, 2^-12 in float16."""
    found = results(world)
    gaps = [
        np.abs(value - wanted).max()
        for value, wanted in zip(weights(found, case), weights(found, "every_step"), strict=True)
    ]
    assert 0 < max(gaps) < ABOUT[case]


@pytest.mark.parametrize(("case", "world"), marked(["bfloat16_feedback"], BACKENDS, {"multiworker-3": ()}))
def test_feedback_brings_bfloat16_closer(results, case, world):
    found, norms = results(world), {}
    for way in ("bfloat16", case):
        pairs = zip(weights(found, way), weights(found, "every_step"), strict=True)
        norms[way] = np.sqrt(sum(np.square(a - b).sum() for a, b in pairs))
    assert norms[case] < norms["bfloat16"]


@pytest.mark.parametrize(("case", "world"), marked(["powersgd"], BACKENDS, {"multiworker-2": ()}))
def test_powersgd_learns(results, case, world):
    found = results(world)
    assert found["powersgd/loss"][-1] < found["every_step/loss"][-1] + 0.05
    gaps = [
        np.abs(a - b).max() for a, b in zip(weights(found, case), weights(found, "every_step"), strict=True)
    ]
    assert max(gaps) > 1e-4  # otherwise nothing was left out, and nothing was tested


SAID = {"nan/local_sgd": "in steps 1 to 3", "nan/delayed": "in steps 2 to 3"}


@pytest.mark.parametrize(("case", "world"), marked(SAID, BACKENDS, {"multiworker-3": ()}))
def test_nan_that_one_worker_sees_ends_all_where_they_next_meet(results, case, world):
    assert f"the loss is not finite in epoch 1 {SAID[case]}" in str(results(world)[case])


@pytest.mark.parametrize("num_workers", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("distance", [1, 2])
def test_gossip_weights_are_doubly_stochastic_and_shrink_by_the_spectral_gap(num_workers, distance):
    """‖θ − mean‖ shrinks at every exchange at least by the second largest eigenvalue (Lian et al. 2017)."""
    matrix = np.eye(num_workers)
    for rank in range(num_workers):
        peers = neighbours(rank, num_workers, distance)
        assert all(rank in neighbours(p, num_workers, distance) for p in peers)
        share = 1 / (1 + len(peers))
        matrix[rank, rank] -= share * len(peers)
        matrix[rank, peers] += share
    np.testing.assert_allclose(matrix.sum(0), 1)
    np.testing.assert_allclose(matrix.sum(1), 1)
    second = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[-2]
    weights = np.random.default_rng(0).normal(size=(num_workers, 3))
    spread = np.linalg.norm(weights - weights.mean(0))
    mixed = matrix @ weights
    assert np.linalg.norm(mixed - mixed.mean(0)) <= second * spread + 1e-12
    np.testing.assert_allclose(mixed.mean(0), weights.mean(0))


def test_gossip_order_has_no_circle():
    """Whoever waits for a neighbour waits for one who is busy with an earlier edge."""
    for num_workers in range(2, 9):
        for distance in (1, 2, 3):
            todo = {
                rank: neighbours(rank, num_workers, distance % num_workers) for rank in range(num_workers)
            }
            while any(todo.values()):
                pairs = {(a, peers[0]) for a, peers in todo.items() if peers and todo[peers[0]][:1] == [a]}
                assert pairs, f"{num_workers} workers, distance {distance}: everybody waits"
                for rank, _ in pairs:
                    todo[rank] = todo[rank][1:]


def test_mpi_adds_narrow_numbers_up_in_float32(results):
    """In bfloat16 256 + 1 is 256 again: the sum of 256, 1 and 1 shows in which type it was made."""
    np.testing.assert_array_equal(results("multiworker-3")["narrow_sum"], np.full(7, 258.0))


def test_mpi_adds_megabytes_up_in_memory_that_the_ranks_share(results):
    """1, 2 and 3 shares; the first step's sums are still the caller's when the second's have been made."""
    found = results("multiworker-3")
    for step, factor in enumerate((6.0, 60.0)):
        np.testing.assert_array_equal(found[f"large_sum/{step}/0"], np.full((300, 500), factor))
        np.testing.assert_array_equal(found[f"large_sum/{step}/1"], factor * np.arange(100_001.0))
        assert found[f"large_sum/{step}/2"] == factor
    assert found["scalar_sum"] == 6.0
    assert "memfd:tfdist-exchange" in str(found["memory"])
