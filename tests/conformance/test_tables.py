"""A sharded table trains as a dense layer on one-hot ids does in plain Keras, wherever its shards are."""

from pathlib import Path

import cases
import numpy as np
import pytest
import tables
from tiers import rarely
from worlds import marked, results_of

from tfdist.training.checkpoint import snapshot
from tfdist.training.checkpoint.snapshot import apply_snapshot, read_checkpoint

ALL_WORLDS = ["one_device", "mirrored-2", "multiworker-2", "ps-1-2"]
BACKENDS = rarely(ALL_WORLDS, "multiworker-2")
DEFAULT = {
    "mirrored-2": ("sgd", "adagrad", "bags", "accumulate", "adam", "rmsprop_clip", "lazy_adam"),
    "multiworker-2": (),
    "ps-2-2": tables.ALWAYS,
}
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(tables.__file__, tmp_path_factory.mktemp("worlds"), request)


@pytest.mark.parametrize(
    ("case", "world"),
    marked([c for c in tables.CASES if not c.endswith("_together")], ALL_WORLDS, DEFAULT, ci=["ps-1-2"]),
)
def test_table_equals_dense_keras(results, world, case):
    """Losses, predictions, the logical table and the rest of the model."""
    wanted = {k: v for k, v in results("keras").items() if k.startswith(f"{case}/")}
    found = {k: v for k, v in results(world).items() if k.startswith(f"{case}/")}
    assert sorted(found) == sorted(wanted)
    tolerance = 2e-2 if case == "bfloat16" else 2e-5
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    assert abs(found[f"{case}/table"] - tables.TABLE).max() > 1e-3


@pytest.mark.parametrize(("case", "world"), [("adam_together", "ps-2-2")])
def test_table_of_workers_that_step_together_equals_dense_keras(results, case, world):
    """Of a row that both have met each has a part."""
    test_table_equals_dense_keras(results, world, case)


@pytest.mark.parametrize("world", ["ps-1-2", "ps-2-2"])
def test_shards_and_slots_lie_on_every_ps(results, world):
    """By default one shard for each ps; a slot with its shard."""
    found = results(world)
    assert sorted(found["adagrad:tasks"]) == [0, 1]
    assert list(found["adagrad:slot_tasks"]) == list(found["adagrad:tasks"])
    assert set(found["adagrad_3_shards:tasks"]) == {0, 1}
    assert sorted(found["lazy_adam:slot_tasks"]) == [0, 0, 1, 1]


@pytest.mark.parametrize("world", BACKENDS)
def test_fit_makes_keras_classes_row_sparse(results, world):
    """Where the result is the same, and where asked for."""
    found = results(world)
    kinds = {case: str(found[f"{case}:optimizer"]) for case in ("sgd", "adagrad", "lazy_adam")}
    assert kinds == {"sgd": "SparseSGD", "adagrad": "SparseAdagrad", "lazy_adam": "LazyAdam"}


@pytest.mark.parametrize(("case", "world"), marked(tables.CASES, ["ps-2-2"], DEFAULT))
def test_two_workers_on_two_ps_learn(results, case, world):
    """In whatever order they come."""
    found = results(world)
    losses = found[f"{case}/loss"]
    assert np.isfinite(found[f"{case}/table"]).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("world", BACKENDS)
def test_id_beyond_the_table_is_named(results, world):
    """In graphs, on workers, and across processes."""
    said = str(results(world)["refused"])
    assert "ids of the embedding" in said
    assert f"must be 0 to {tables.NUM_ROWS - 1}" in said
    assert f"there is] [{tables.NUM_ROWS}" in said.replace("'", "").replace('"', "")


@pytest.mark.parametrize("world", [*BACKENDS, "ps-2-2"])
def test_state_that_is_never_copied_is_whole_and_fits_one_process(results, world, monkeypatch):
    """Written in blocks from the shards, by the logical rows; read in blocks here."""
    file = str(results(world)["written"])
    monkeypatch.setattr(snapshot, "COPY_BYTES", 0)
    model = tables.build("lazy_adam", one_hot=False)
    run_one(model)
    table = np.load(f"{file}.table.npy")
    assert np.any(model.get_layer("table").get_table() != table)
    apply_snapshot(read_checkpoint(Path(f"{file}.state.npz")), model)
    np.testing.assert_array_equal(model.get_layer("table").get_table(), table)
    momentum = next(v for v in model.optimizer.variables if v.path.endswith("embeddings_momentum"))
    assert momentum.shape == table.shape and np.any(momentum.numpy() != 0)


def run_one(model):
    model.fit(cases.IDS[:8], cases.BINARY[:8], verbose=0)


@pytest.mark.parametrize("world", ["ps-1-2", "ps-2-2"])
def test_weights_are_spread_by_bytes(results, world):
    """In turn all the large ones would lie on one ps."""
    least, most = sorted(results(world)["bytes"])
    assert most < 2 * least
