"""What recommenders train on: rare clicks balanced, events divided, columns scaled, MovieLens as TFDS prepares it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_criteo import line

from tfdist.data import build_source
from tfdist.errors import ConfigError
from tfdist.recipe import load_recipe

DLRM, TWO_TOWER, WIDE_DEEP = (load_recipe(name) for name in ("dlrm", "two_tower", "wide_deep"))
SMALL = {"num_rows": 50, "num_examples": 5_000}


@pytest.fixture
def criteo(tmp_path):
    """700 lines, every tenth a click."""
    numbers = [[n] * 13 for n in range(700)]
    (tmp_path / "train.txt").write_text("".join(line(int(n[0] % 10 == 0), n) for n in numbers))
    return {"data_dir": str(tmp_path), "num_rows": 50}


def train_columns(**kwargs):
    """Labels, and weights if there are any."""
    source = build_source(DLRM.build_data("train", **kwargs))
    batch = source.sample_batch(10_000)
    return [part.numpy().ravel() for part in batch[1:]], batch[0]


def test_clicks_are_rare_and_the_splits_apart():
    (labels,), inputs = train_columns(**SMALL)
    assert len(labels) == 4_000
    assert 0.02 < labels.mean() < 0.15
    test_inputs, test_labels = DLRM.build_data("test", **SMALL)
    assert len(test_labels) == 1_000
    ids = inputs["ids"].numpy()
    assert ids.min() >= 0 and (ids // 50 == np.arange(26)).all()
    counts = np.sort(np.bincount(ids[:, 2]))[::-1]
    assert counts[0] > 4 * counts[9] > 0, "few ids are frequent"
    assert (test_inputs["numbers"] == np.floor(test_inputs["numbers"])).all()


@pytest.mark.parametrize("real", [False, True])
def test_class_weight_lets_both_classes_count_alike(real, criteo):
    (labels, weights), _ = train_columns(imbalance="class_weight", **(criteo if real else SMALL))
    clicks, others = weights[labels == 1], weights[labels == 0]
    assert clicks.sum() == pytest.approx(others.sum(), rel=1e-3)
    assert weights.mean() == pytest.approx(1, rel=1e-3)
    assert len(set(clicks)) == len(set(others)) == 1


@pytest.mark.parametrize("real", [False, True])
def test_resample_keeps_every_click_and_as_many_others(real, criteo):
    kwargs = criteo if real else SMALL
    (before,), _ = train_columns(**kwargs)
    (after,), inputs = train_columns(imbalance="resample", **kwargs)
    num_clicks = int(before.sum())
    assert after.sum() == num_clicks
    assert abs((after == 0).sum() - num_clicks) < 4 * num_clicks**0.5
    (again,), same = train_columns(imbalance="resample", **kwargs)
    np.testing.assert_array_equal(again, after)
    np.testing.assert_array_equal(same["numbers"], inputs["numbers"])


@pytest.mark.parametrize("imbalance", ["class_weight", "resample"])
def test_the_test_split_stays_as_it_is(imbalance, criteo):
    for kwargs in (criteo, SMALL):
        plain, balanced = (build_source(DLRM.build_data("test", **kwargs, **more)).sample_batch(10_000)
                           for more in ({}, {"imbalance": imbalance}))  # fmt: skip
        tf.nest.map_structure(np.testing.assert_array_equal, plain, balanced)


def test_a_single_class_cannot_be_balanced(tmp_path):
    (tmp_path / "train.txt").write_text(line() * 20)
    with pytest.raises(ConfigError, match="a share of 0% of clicks cannot be balanced"):
        DLRM.build_data("train", data_dir=str(tmp_path), imbalance="resample")


def test_recall_is_that_of_a_search_by_hand():
    """Whatever the batches, and however the model came about."""
    model = TWO_TOWER.build_model(num_users=20, num_items=50, k=5)
    users, y = TWO_TOWER.build_data("test", num_users=20, num_items=50, num_events=500)
    scores = keras.ops.convert_to_numpy(model(users))
    best = np.argsort(-scores, axis=1)[:, :5]
    recall = np.mean((best == y["item"][:, np.newaxis]).any(axis=1))
    for batch_size in (100, 32):
        data = tf.data.Dataset.from_tensor_slices((users, y)).batch(batch_size)
        assert model.evaluate(data, verbose=0) == pytest.approx(recall)
    np.testing.assert_array_equal(model.predict(users, verbose=0), best)


def test_in_batch_loss_is_that_by_hand():
    """Other examples' items are negatives, corrected by their share; the same item again is none."""
    model = TWO_TOWER.build_model(num_users=20, num_items=50, dropout=0.0)
    users = np.array([3, 4, 5])
    y = {"item": np.array([7, 8, 7]), "log_q": np.array([-1.0, -3.0, -1.0], np.float32)}
    user_vectors = model(users, training=True).numpy()
    logits = user_vectors @ model.items(y["item"]).numpy().T - y["log_q"]
    logits[0, 2] = logits[2, 0] = -np.inf
    wanted = np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))
    assert float(model.compute_loss(None, y, user_vectors)) == pytest.approx(wanted, rel=1e-5)


def test_two_tower_is_saved_and_loaded(tmp_path):
    model = TWO_TOWER.build_model(num_users=20, num_items=50)
    model.fit(*TWO_TOWER.build_data("test", num_users=20, num_items=50, num_events=500), verbose=0)
    scores = model(np.arange(20)).numpy()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(np.arange(20)).numpy(), scores)


def test_log_q_is_the_share_of_training_events():
    sizes = {"num_users": 20, "num_items": 50, "num_events": 1_000}
    (users, train), (_, test) = (TWO_TOWER.build_data(split, **sizes) for split in ("train", "test"))
    assert (len(users), len(test["item"])) == (800, 200)
    counts = np.bincount(train["item"], minlength=50) + 1
    np.testing.assert_allclose(np.exp(test["log_q"]), (counts / counts.sum())[test["item"]], rtol=1e-5)


@pytest.fixture(scope="module")
def movielens(tmp_path_factory):
    """Ten ratings in MovieLens 100k's own files, as TFDS parses and stores them; only the download is left out."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("download") / "ml-100k"
    folder.mkdir()
    genres = "|".join("0" * 18 + "1")
    (folder / "u.item").write_text(
        "".join(
            f"{n}|Movie {n} (1995)|01-Jan-1995||http://us.imdb.com/M?{n}|{genres}\n" for n in (1, 50, 1682)
        )
    )
    (folder / "u.user").write_text("1|24|M|technician|85711\n943|53|F|other|94043\n")
    events = [(user, movie) for user in (1, 943) for movie in (1, 50, 1682)]
    (folder / "u.data").write_text(
        "".join(f"{user}\t{movie}\t{user % 5 + 1}\t88125094{n}\n" for n, (user, movie) in enumerate(events))
    )
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(folder.parent)
        )
        tfds.builder("movielens/100k-ratings", data_dir=data_dir).download_and_prepare()
    return data_dir, events


def test_movielens_is_read_as_tfds_prepares_it(movielens):
    data_dir, events = movielens
    parts = [TWO_TOWER.build_data(split, data_dir=data_dir) for split in ("train", "test")]
    assert [len(users) for users, _ in parts] == [4, 2]
    found = [
        (u + 1, i + 1) for users, y in parts for u, i in zip(users.tolist(), y["item"].tolist(), strict=True)
    ]
    assert sorted(found) == events


def test_ids_beyond_the_table_are_refused(movielens):
    with pytest.raises(ConfigError, match="num_items=1000: .* ids up to 1681; add --set num_items=1682"):
        TWO_TOWER.build_data("train", data_dir=movielens[0], num_items=1000)


def test_breast_cancer_is_scaled_by_its_training_rows_alone():
    inputs, labels = WIDE_DEEP.build_data("train", data="breast_cancer")
    assert len(labels) == 569 * 4 // 5
    np.testing.assert_allclose(inputs["numbers"].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(inputs["numbers"].std(axis=0), 1, atol=1e-4)


def test_split_is_checked(tmp_path):
    for recipe in (DLRM, TWO_TOWER):
        with pytest.raises(ConfigError, match="no split 'validation'; choose train or test"):
            recipe.build_data("validation")
