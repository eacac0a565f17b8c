"""What every strategy promises beside equal numbers: counts, masks, equal copies, callbacks, forms of data."""

import numpy as np
import promises
import pytest
from worlds import asking, marked, run_world

BACKENDS = ["one_device", "mirrored-2", "multiworker-2", "ps-1", "ps-2"]
SYNC = ["mirrored-2", "multiworker-2"]
# What a world need not show by default: two of a process share their step with two processes, and workers theirs.
LEFT_OUT = {
    "mirrored-2": ("totals", "callbacks", "forms", "bfloat16"),
    "ps-1": ("totals", "callbacks"),
    "ps-2": ("forms", "repeated", "bfloat16"),
}
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


def parted(part, worlds=BACKENDS):
    """Returns `(case, world)` parameters of a part of the program."""
    left_out = [world for world in worlds if part in LEFT_OUT.get(world, ())]
    return pytest.mark.parametrize(("case", "world"), marked([part], worlds, dict.fromkeys(left_out, ())))


@pytest.fixture(scope="module")
def seen(tmp_path_factory, request):
    """What each process of a world saw, the chief first."""
    known = {}

    def get(world):
        if world not in known:
            folder = tmp_path_factory.mktemp(world)
            with asking(request, world):
                run_world(promises.__file__, folder, world)
            found = {}
            for path in sorted(folder.glob("*.npz")):
                with np.load(path) as stored:
                    found[path.stem] = dict(stored)
            known[world] = folder, list(found.values())
        return known[world]

    return get


@parted("counts")
def test_no_step_and_no_example_is_lost(seen, case, world):
    """Each of 81 steps of a constant gradient moves the weight once, and is counted once."""
    for process in seen(world)[1]:
        assert process["iterations"] == 2 * promises.STEPS + 1
        np.testing.assert_allclose(process["moved"], 0.5 * 2 * promises.STEPS, rtol=1e-6)
        np.testing.assert_array_equal(process["counts"], [2 * promises.STEPS] * 2)


@parted("totals")
def test_auc_counts_every_example_once(seen, case, world):
    """An average of the workers' AUCs would be another number."""
    wanted = seen("keras")[1][0]
    for process in seen(world)[1]:
        assert process["auc_count"] == wanted["auc_count"] == promises.cases.COUNT
        np.testing.assert_allclose(process["auc"], wanted["auc"], rtol=1e-6)


@parted("totals")
def test_evaluation_and_prediction_see_each_example_once_and_in_order(seen, case, world):
    """On two ps workers too, whichever of them is faster."""
    wanted = seen("keras")[1][0]
    for process in seen(world)[1]:
        np.testing.assert_allclose(process["predicted"], wanted["predicted"], rtol=1e-5)
        assert process["evaluated_count"] == wanted["evaluated_count"] == promises.cases.COUNT
        for name in ("evaluated_auc", "evaluated_loss"):
            np.testing.assert_allclose(process[name], wanted[name], rtol=1e-5)


@parted("masks")
def test_masks_differ_between_replicas_and_steps(seen, case, world):
    """Half of the mean of two masks is one half where only one of them keeps a feature."""
    for process in seen(world)[1]:
        assert set(np.unique(process["masks"])) == {0.0, 1.0, 2.0}
        assert (process["masks"][0] != process["masks"][1]).any()


@parted("repeated", [w for w in BACKENDS if w != "ps-2"])
def test_a_seed_repeats_a_run(seen, case, world):
    """Bit for bit; several ps workers take turns as it happens."""
    for process in seen(world)[1]:
        np.testing.assert_array_equal(*process["repeated"])


@parted("statistics", SYNC)
def test_copies_stay_equal(seen, case, world):
    """Weights bit for bit, and BatchNormalization's statistics, which are averaged, on every replica."""
    copies = np.concatenate([process["copies"] for process in seen(world)[1]])
    assert len(copies) == 2
    np.testing.assert_array_equal(copies[0], copies[1])


@parted("statistics")
def test_nothing_is_nan(seen, case, world):
    """Statistics that several workers change at once too."""
    assert all(process["finite"] for process in seen(world)[1])


@parted("leaving", ["multiworker-2"])
def test_no_worker_leaves_before_all_have_ended(seen, case, world):
    """Until then another may still need the answer that it holds."""
    chief, other = seen(world)[1]
    assert chief["ended_at"] > other["ended_at"]
    assert min(chief["left_at"], other["left_at"]) > chief["ended_at"]


@parted("callbacks")
def test_callbacks_run_as_in_keras(seen, case, world):
    """EarlyStopping ends all processes after the same epoch; each batch is seen in turn."""
    wanted = seen("keras")[1][0]
    for process in seen(world)[1]:
        assert process["epochs"] == wanted["epochs"] < 6
        np.testing.assert_array_equal(process["batches"], wanted["batches"])


@parted("callbacks")
def test_only_the_chief_writes(seen, case, world):
    """One log and one model, whatever the number of processes."""
    folder, processes = seen(world)
    assert len(processes) == (2 if world == "multiworker-2" else 1)
    assert len(list(folder.glob("*.csv"))) == len(list(folder.glob("*.keras"))) == 1


@pytest.mark.parametrize("form", ["stream", "unknown_length", "indexed", "own"])
@parted("forms", [w for w in BACKENDS if w != "ps-2"])
def test_every_form_of_data_trains_alike(seen, case, world, form):
    """A dataset of examples, one that does not know its length, an indexed object, a pipeline that shards itself."""
    wanted = seen("keras")[1][0]["form_arrays"]
    for process in seen(world)[1]:
        np.testing.assert_allclose(process[f"form_{form}"], wanted, rtol=2e-5, atol=2e-5)


@parted("bfloat16")
def test_bfloat16_computes_in_it_and_keeps_float32(seen, case, world):
    """Losses are Keras's to bfloat16's three digits; two workers that take turns as it happens come near."""
    wanted = seen("keras")[1][0]["bfloat16"]
    for process in seen(world)[1]:
        assert list(process["bfloat16_dtypes"]) == ["bfloat16", "float32"]
        np.testing.assert_allclose(process["bfloat16"], wanted, rtol=0.5 if world == "ps-2" else 0.05)
