import io
import os
from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiers import rarely

import tfdist.layers
import tfdist.optimizers
from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.training.checkpoint import snapshot
from tfdist.training.checkpoint import state as state_module
from tfdist.training.checkpoint.snapshot import (
    apply_snapshot,
    parse_checkpoint,
    read_checkpoint,
    take_snapshot,
    write_checkpoint,
)

X = np.linspace(-1, 1, 96, dtype="float32").reshape(32, 3)
Y = np.sin(3 * X[:, :1])


class Noisy(keras.layers.Layer):
    """Draws from a seed generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(11)

    def call(self, x, training=False):
        if not training:
            return x
        return x + keras.random.normal(keras.ops.shape(x), stddev=0.1, seed=self.generator)


class RandomParts(keras.Model):
    """Holds its dropouts as attribute, in a list, in a dict, in a nested model and shared."""

    def __init__(self):
        super().__init__()
        self.drop = keras.layers.Dropout(0.5)
        self.parts = [keras.layers.Dense(1), {"shared": self.drop, "own": keras.layers.GaussianNoise(0.1)}]
        self.nested = random_layers()

    def call(self, x, training=False):
        x = self.drop(self.nested(x, training=training), training=training)
        return self.parts[0](self.parts[1]["own"](x, training=training))


class TwoOptimizers(keras.Model):
    """Trains its last layer with an optimizer that `compile` never sees."""

    def __init__(self, units=4):
        super().__init__()
        self.hidden = keras.layers.Dense(units, activation="tanh")
        self.head = keras.layers.Dense(1)
        self.own = [keras.optimizers.Adam(0.02)]

    def call(self, x):
        return self.head(self.hidden(x))

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        first, last = self.hidden.trainable_variables, self.head.trainable_variables
        grads = tape.gradient(loss, [v.value for v in first + last])
        self.optimizer.apply(grads[: len(first)], first)
        self.own[0].apply(grads[len(first) :], last)
        return {"loss": loss}


def random_layers(units=4):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(units, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            keras.Sequential([Noisy(), layers.Dropout(0.25)]),
            layers.Dense(1),
        ]
    )


def adam():
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.05, 20))


def loss_scaled():
    return keras.mixed_precision.LossScaleOptimizer(
        keras.optimizers.Adam(0.05), initial_scale=8.0, dynamic_growth_steps=2
    )


def accumulating_with_average():
    return keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2, use_ema=True)


# Five steps stop in the middle of an accumulation.
KINDS = {
    "adam": (random_layers, adam),
    "loss-scale": (random_layers, loss_scaled),
    "accumulation-ema": (random_layers, accumulating_with_average),
    "two-optimizers": (TwoOptimizers, lambda: keras.optimizers.SGD(0.05, momentum=0.9)),
}


def make_model(kind="adam", *, seed=0, units=4, optimizer=None):
    keras.utils.set_random_seed(seed)
    build, make_optimizer = KINDS[kind]
    model = build(units)
    model.compile(optimizer or make_optimizer(), "mse", metrics=["mae"], run_eagerly=True)
    keras_internals.build_model(model, (tf.constant(X), tf.constant(Y)))
    return model


def save_checkpoint(path, *, model, epoch):
    write_checkpoint(path, take_snapshot(model, epoch=epoch, step=0, metrics=[], extra={}))


def load_checkpoint(path, *, model):
    snapshot = parse_checkpoint(path.read_bytes(), name=str(path))
    apply_snapshot(snapshot, model)
    return snapshot.epoch


def train(model, steps):
    for step in steps:
        rows = slice(4 * step % 32, 4 * step % 32 + 4)
        model.train_on_batch(X[rows], Y[rows])


def state(model):
    """Everything that training goes on from; metrics start anew with each epoch."""
    optimizers = keras_internals.find_optimizers(model)
    metrics = {id(v) for v in model.metrics_variables}
    variables = [v for v in keras_internals.all_variables(model, optimizers) if id(v) not in metrics]
    return [v.numpy() for v in [*variables, *keras_internals.seed_states(model)]]


def assert_equal(one, other):
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def differ(one, other):
    return any(not np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def truncated(whole):
    return whole[: len(whole) // 2]


def foreign(whole):
    file = io.BytesIO()
    np.savez(file, x=np.zeros(3))
    return file.getvalue()


def damaged(whole):
    middle = len(whole) // 2
    return whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 8]) + whole[middle + 8 :]


@pytest.mark.parametrize("kind", KINDS)
def test_load_into_a_fresh_model_gives_weights_slots_iterations_and_seeds(kind, tmp_path):
    model = make_model(kind)
    train(model, range(5))
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=3)

    fresh = make_model(kind, seed=77)
    assert differ(state(fresh), state(model))
    assert load_checkpoint(tmp_path / "c.npz", model=fresh) == 3
    assert_equal(fresh.get_weights(), model.get_weights())
    for mine, theirs in zip(
        keras_internals.find_optimizers(fresh), keras_internals.find_optimizers(model), strict=True
    ):
        assert int(mine.iterations) == int(theirs.iterations) > 0
        assert_equal([v.numpy() for v in mine.variables], [v.numpy() for v in theirs.variables])
    seeds, expected = ([v.numpy() for v in keras_internals.seed_states(m)] for m in (fresh, model))
    assert len(seeds) == (0 if kind == "two-optimizers" else 3)
    assert_equal(seeds, expected)


def test_a_checkpoint_is_bound_to_no_strategy(tmp_path):
    scopes = [tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0"])]
    models = []
    for seed, strategy in enumerate([*scopes, scopes[0]]):
        with strategy.scope():
            models.append(make_model(seed=seed))
    for wrote, reads in pairwise(models):
        save_checkpoint(tmp_path / "c.npz", model=wrote, epoch=1)
        load_checkpoint(tmp_path / "c.npz", model=reads)
        assert_equal(state(reads), state(models[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_if_it_had_never_stopped(kind, tmp_path):
    model = make_model(kind)
    train(model, range(5))
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    stopped = state(model)
    train(model, range(5, 9))

    fresh = make_model(kind, seed=77)
    load_checkpoint(tmp_path / "c.npz", model=fresh)
    train(fresh, range(5, 9))
    assert_equal(state(fresh), state(model))
    assert differ(state(fresh), stopped)


def test_load_into_a_model_that_has_trained_on_replaces_all_of_it(tmp_path):
    model = make_model()
    train(model, range(3))
    expected = state(model)
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    train(model, range(3, 6))
    load_checkpoint(tmp_path / "c.npz", model=model)
    assert_equal(state(model), expected)


def test_saving_changes_nothing(tmp_path):
    model = make_model()
    train(model, range(3))
    before = state(model)
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    assert_equal(state(model), before)


@pytest.mark.parametrize("build", rarely([*KINDS, "table", "sharded-table", "mirrored"], ci=["loss-scale"]))
def test_snapshot_stays_what_it_was_while_training_goes_on(build):
    """It shares the variables' memory: TensorFlow copies what it is about to write to, by whatever operation."""
    if build == "mirrored":
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            model = make_model()
    else:
        model = make_model(build) if build in KINDS else make_table_model(1 if build == "table" else 3)
    x = IDS if "table" in build else X
    model.fit(x, Y, batch_size=8, verbose=0)
    taken = take_snapshot(model, epoch=0, step=0, metrics=[], extra={})
    copies = {name: np.array(array) for name, array in taken.variables.items()}
    model.fit(x, Y, batch_size=8, verbose=0)
    for variable in model.trainable_variables:
        variable.assign(variable + 1.0)
    for name, array in taken.variables.items():
        np.testing.assert_array_equal(array, copies[name], err_msg=name)
    moved = take_snapshot(model, epoch=0, step=0, metrics=[], extra={}).variables
    assert all(not np.array_equal(moved[name], copies[name]) for name in copies if name.endswith("/kernel"))


def test_snapshot_for_another_cluster_shares_no_memory():
    taken = take_snapshot(make_model(), epoch=0, step=0, metrics=[], extra={}, outlives_variables=True)
    assert all(array.flags.owndata for array in taken.variables.values())


def test_metrics_are_left_out(tmp_path):
    model, fresh = make_model(), make_model(seed=77)
    train(model, range(3))
    train(fresh, range(1))
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    before = [v.numpy() for v in fresh.metrics_variables]
    load_checkpoint(tmp_path / "c.npz", model=fresh)
    assert_equal([v.numpy() for v in fresh.metrics_variables], before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": 5}, r"'00000 sequential/dense/kernel' has shape \(3, 4\) there, \(3, 5\) here"),
        ({"momentum": 0.0}, "is only in the checkpoint"),
        ({"use_ema": True}, "is only in the model"),
        ({"kind": "two-optimizers"}, "'00000 sequential/dense/kernel' is only in the checkpoint"),
    ],
    ids=["layer", "fewer-slots", "more-slots", "other-layers"],
)
def test_another_model_is_refused_and_nothing_assigned(changes, message, tmp_path):
    def make(*, seed, kind="adam", units=4, momentum=0.9, **kwargs):
        optimizer = keras.optimizers.SGD(momentum=momentum, **kwargs)
        return make_model(kind, seed=seed, units=units, optimizer=optimizer)

    model, other = make(seed=0), make(seed=77, **changes)
    train(model, range(3))
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    before = state(other)
    with pytest.raises(ConfigError, match=f"is of another model: .*{message}"):
        load_checkpoint(tmp_path / "c.npz", model=other)
    assert_equal(state(other), before)


def test_a_late_difference_is_found_before_anything_is_assigned(tmp_path):
    def make(outputs, seed):
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(outputs)])
        model.compile("sgd", "mse")
        keras_internals.build_model(model, (tf.constant(X), tf.constant(Y)))
        return model

    save_checkpoint(tmp_path / "c.npz", model=make(1, seed=0), epoch=1)
    other = make(2, seed=77)
    before = state(other)
    with pytest.raises(ConfigError, match="another model"):
        load_checkpoint(tmp_path / "c.npz", model=other)
    assert_equal(state(other), before)


def test_another_optimizer_with_equal_shapes_is_refused_by_name(tmp_path):
    model = make_model(optimizer=keras.optimizers.SGD(momentum=0.9))
    other = make_model(seed=77, optimizer=keras.optimizers.RMSprop())
    assert [v.shape for v in model.optimizer.variables] == [v.shape for v in other.optimizer.variables]
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    before = state(other)
    with pytest.raises(ConfigError, match="'00011 rm_sprop/iteration' is only in the model; take the recipe"):
        load_checkpoint(tmp_path / "c.npz", model=other)
    assert_equal(state(other), before)


@pytest.mark.parametrize("kind", rarely(KINDS, ci=["loss-scale"]))
def test_names_hold_the_path_without_the_numbers_of_the_process(kind, tmp_path):
    names = []
    for _ in range(2):
        save_checkpoint(tmp_path / "c.npz", model=make_model(kind), epoch=1)
        with np.load(tmp_path / "c.npz") as stored:
            names.append(sorted(stored.files))
    assert names[0] == names[1]
    if kind == "adam":
        assert names[0][:2] == ["00000 sequential/dense/kernel", "00001 sequential/dense/bias"]
        assert "00022 adam/sequential_dense_bias_momentum" in names[0]


def test_a_model_of_random_parts_goes_on_with_all_its_seeds(tmp_path):
    models = []
    for seed in (0, 77):
        keras.utils.set_random_seed(seed)
        models.append(RandomParts())
        models[-1].compile("rmsprop", "mse")
        keras_internals.build_model(models[-1], (tf.constant(X), tf.constant(Y)))
    model, fresh = models
    train(model, range(3))
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    load_checkpoint(tmp_path / "c.npz", model=fresh)
    seeds, expected = ([v.numpy() for v in keras_internals.seed_states(m)] for m in (fresh, model))
    assert len(seeds) == 5
    assert_equal(seeds, expected)
    train(model, range(3, 5))
    train(fresh, range(3, 5))
    assert_equal(state(fresh), state(model))


def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    models = []
    for seed in (0, 77):
        keras.utils.set_random_seed(seed)
        layers = [keras.Input((3,)), keras.layers.Dense(4, dtype="bfloat16"), keras.layers.Dense(1)]
        models.append(keras.Sequential(layers))
        models[-1].compile(keras.optimizers.Adam(0.05), "mse")
        keras_internals.build_model(models[-1], (tf.constant(X), tf.constant(Y)))
    model, fresh = models
    train(model, range(3))
    model.layers[0].bias.assign([np.nan, -np.inf, 1e-40, 3e38])
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    load_checkpoint(tmp_path / "c.npz", model=fresh)
    assert {v.dtype.name for v in state(fresh)} >= {"bfloat16", "float32"}
    assert [v.tobytes() for v in state(fresh)] == [v.tobytes() for v in state(model)]


@pytest.mark.parametrize("spoil", [truncated, foreign, damaged, lambda whole: b"", lambda whole: b"text"])
def test_a_file_that_cannot_be_read_is_refused_by_its_name(spoil, tmp_path):
    model = make_model()
    save_checkpoint(tmp_path / "c.npz", model=model, epoch=1)
    (tmp_path / "c.npz").write_bytes(spoil((tmp_path / "c.npz").read_bytes()))
    before = state(model)
    with pytest.raises(
        ConfigError, match=r"checkpoint '/.*/c\.npz' cannot be read \(.*put back a copy of it"
    ) as error:
        load_checkpoint(tmp_path / "c.npz", model=model)
    assert "\n" not in str(error.value)
    assert_equal(state(model), before)


def test_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "checkpoints" / "latest.npz"
    model = make_model()
    save_checkpoint(path, model=model, epoch=1)
    first = path.read_bytes()
    os.link(path, tmp_path / "first")
    train(model, range(1))
    save_checkpoint(path, model=model, epoch=2)
    # Written over in place, the file would change under its other name too.
    assert (tmp_path / "first").read_bytes() == first != path.read_bytes()
    assert load_checkpoint(path, model=model) == 2
    assert os.listdir(path.parent) == ["latest.npz"]


def test_a_write_that_fails_leaves_no_temporary(tmp_path):
    in_the_way = tmp_path / "latest.npz"
    in_the_way.mkdir()
    with pytest.raises(OSError):
        save_checkpoint(in_the_way, model=make_model(), epoch=1)
    assert os.listdir(tmp_path) == ["latest.npz"]


def make_table_model(num_shards, partition="mod", *, seed=0):
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((3,), dtype="int32"),
        tfdist.layers.Embedding(11, 2, combiner="mean", num_shards=num_shards, partition=partition),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential(layers)
    # Eagerly: to trace a step takes as long as a hundred of them.
    model.compile(tfdist.optimizers.LazyAdam(0.05), "mse", run_eagerly=True)
    keras_internals.build_model(model, (tf.constant(IDS), tf.constant(Y)))
    return model


IDS = np.random.default_rng(0).integers(0, 11, (32, 3)).astype("int32")


@pytest.mark.parametrize("is_large", [False, True], ids=["copied", "in-blocks"])
@pytest.mark.parametrize(
    ("wrote", "reads"),
    [
        ((3, "mod"), (2, "div")),
        ((1, "mod"), (4, "mod")),
        pytest.param((4, "div"), (1, "mod"), marks=pytest.mark.ci),
    ],
)
def test_tables_are_kept_by_their_rows_whatever_the_shards(wrote, reads, is_large, tmp_path, monkeypatch):
    """Slots too: what trained goes on alike."""
    if is_large:
        monkeypatch.setattr(snapshot, "COPY_BYTES", 0)
        monkeypatch.setattr(state_module, "BLOCK_BYTES", 24)  # three rows
    model, fresh = make_table_model(*wrote), make_table_model(*reads, seed=7)
    model.fit(IDS, Y, batch_size=8, shuffle=False, verbose=0)
    taken = take_snapshot(model, epoch=1, step=0, metrics=[], extra={}, copy_bytes=0 if is_large else 1e9)
    assert taken.is_copy == (not is_large) and taken.is_finite
    write_checkpoint(tmp_path / "c.npz", taken)
    apply_snapshot(read_checkpoint(tmp_path / "c.npz"), fresh)
    np.testing.assert_array_equal(fresh.layers[0].get_table(), model.layers[0].get_table())
    for one in (model, fresh):
        one.fit(IDS, Y, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_array_equal(fresh.layers[0].get_table(), model.layers[0].get_table())
    with np.load(tmp_path / "c.npz") as stored:
        assert sorted(stored.files)[0] == "00000 sequential/embedding/embeddings"
        assert stored["00000 sequential/embedding/embeddings"].shape == (11, 2)


def test_numbers_in_shards_that_are_not_finite_are_seen():
    model = make_table_model(3)
    model.layers[0].shards[2].assign(np.full((3, 2), np.nan))
    assert not take_snapshot(model, epoch=0, step=0, metrics=[], extra={}, copy_bytes=0).is_finite


@pytest.mark.parametrize("spoil", [truncated, damaged])
def test_large_file_that_is_not_whole_is_refused(spoil, tmp_path, monkeypatch):
    """Its checksums are compared before any of it is assigned."""
    path = tmp_path / "c.npz"
    save_checkpoint(path, model=make_table_model(2), epoch=1)
    path.write_bytes(spoil(path.read_bytes()))
    monkeypatch.setattr(snapshot, "COPY_BYTES", 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_checkpoint(path)


def test_large_file_with_a_flipped_bit_in_an_array_is_refused(tmp_path, monkeypatch):
    """Nothing but the checksum tells, and of more than `zipfile` reads at once it would come after the array."""
    path, model = tmp_path / "c.npz", make_model(units=2000)
    save_checkpoint(path, model=model, epoch=1)
    content = bytearray(path.read_bytes())
    content[content.index(model.layers[0].kernel.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(snapshot, "COPY_BYTES", 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_checkpoint(path)


def test_table_of_another_size_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c.npz", model=make_table_model(2), epoch=1)
    layers = [keras.Input((3,), dtype="int32"), tfdist.layers.Embedding(12, 2, combiner="mean", num_shards=2)]
    other = keras.Sequential([*layers, keras.layers.Dense(1)])
    other.compile(tfdist.optimizers.LazyAdam(0.05), "mse")
    keras_internals.build_model(other, (tf.constant(IDS), tf.constant(Y)))
    with pytest.raises(ConfigError, match=r"embeddings' has shape \(11, 2\) there, \(12, 2\) here"):
        load_checkpoint(tmp_path / "c.npz", model=other)


def test_position_metrics_and_extra_come_back(tmp_path):
    metrics = [np.float32(3.5), np.arange(4)]
    extra = {"callbacks": {"EarlyStopping 0": {"best": 0.5, "wait": 1}}}
    wrote = take_snapshot(make_model(), epoch=2, step=7, metrics=metrics, extra=extra)
    write_checkpoint(tmp_path / wrote.file_name, wrote)
    read = parse_checkpoint((tmp_path / "epoch-00002-step-00000007.npz").read_bytes(), name="c")
    assert (read.epoch, read.step, read.extra) == (2, 7, extra)
    assert_equal(read.metrics, metrics)


def test_file_holds_plain_arrays(tmp_path):
    save_checkpoint(tmp_path / "c.npz", model=make_model(), epoch=1)
    with np.load(tmp_path / "c.npz", allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)
