"""Each way of sharing does what its source says: held against a simulation, or against every_step which it equals."""

import numpy as np
import pytest
import sync_ways
from worlds import run_world

from tfdist.training.local_steps import neighbours

pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]
STEPS = sync_ways.EPOCHS * -(-sync_ways.COUNT // sync_ways.BATCH)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module", params=["collective-2", "mpi-3"])
def results(request, tmp_path_factory):
    """What every way ended with: in real workers, and simulated."""
    exchange, num_workers = request.param.split("-")
    folder = tmp_path_factory.mktemp("ways")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAYS_WORKERS", num_workers)
        patch.setenv("WAYS_EXCHANGE", exchange)
        for world in ("keras", f"multiworker-{num_workers}"):
            run_world(sync_ways.__file__, folder / f"{world}.npz", world)
            with np.load(folder / f"{world}.npz") as stored:
                found.append(dict(stored))
    return found


def weights(found, way):
    return [found[f"{way}/{i}"] for i in range(4)]


@pytest.mark.parametrize("way", sync_ways.LOCAL)
def test_way_equals_its_simulation(results, way):
    simulated, found = results
    for value, wanted in zip(weights(found, way), weights(simulated, way), strict=True):
        np.testing.assert_allclose(value, wanted, **TOLERANCE)
    assert found[f"{way}/iterations"] == STEPS


@pytest.mark.parametrize("way", sync_ways.EXACT)
def test_way_equals_every_step(results, way):
    _, found = results
    for value, wanted in zip(weights(found, way), weights(found, "every_step"), strict=True):
        np.testing.assert_allclose(value, wanted, **TOLERANCE)
    assert found[f"{way}/iterations"] == STEPS


@pytest.mark.parametrize(
    ("way", "bound"), [("bfloat16", 2e-2), ("float16", 2e-3), ("bfloat16_feedback", 1e-2)]
)
def test_narrow_exchange_is_about_every_step(results, way, bound):
    """A number loses half a unit of its last place at each of 8 steps: 2^-9 of itself in bfloat16, 2^-12 in float16."""
    _, found = results
    gaps = [
        np.abs(value - wanted).max()
        for value, wanted in zip(weights(found, way), weights(found, "every_step"), strict=True)
    ]
    assert 0 < max(gaps) < bound


def test_feedback_brings_bfloat16_closer(results):
    _, found = results
    norms = {}
    for way in ("bfloat16", "bfloat16_feedback"):
        pairs = zip(weights(found, way), weights(found, "every_step"), strict=True)
        norms[way] = np.sqrt(sum(np.square(a - b).sum() for a, b in pairs))
    assert norms["bfloat16_feedback"] < norms["bfloat16"]


def test_powersgd_learns(results):
    _, found = results
    assert found["powersgd/loss"][-1] < found["every_step/loss"][-1] + 0.05
    gaps = [
        np.abs(a - b).max()
        for a, b in zip(weights(found, "powersgd"), weights(found, "every_step"), strict=True)
    ]
    assert max(gaps) > 1e-4  # otherwise nothing was left out, and nothing was tested


@pytest.mark.parametrize(("way", "steps"), [("local_sgd", "in steps 1 to 3"), ("delayed", "in steps 2 to 3")])
def test_nan_that_one_worker_sees_ends_all_where_they_next_meet(results, way, steps):
    _, found = results
    assert f"the loss is not finite in epoch 1 {steps}" in str(found[f"nan/{way}"])


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
    _, found = results
    if "narrow_sum" not in found:
        pytest.skip("TensorFlow's ring adds in the narrow type, as SyncOptions says")
    np.testing.assert_array_equal(found["narrow_sum"], np.full(7, 258.0))
