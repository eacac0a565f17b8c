import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import ConfigError
from tfdist.layers import Embedding
from tfdist.optimizers import (
    LazyAdam,
    LazyFtrl,
    LazyRMSprop,
    LazySGD,
    SparseAdagrad,
    SparseSGD,
    describe_dense_rows,
    with_sparse_rows,
)
from tfdist.optimizers.rows import Rows

plain = keras.optimizers
NUM_ROWS, WIDTH, STEPS = 9, 3, 6
OFTEN = [1, 4]  # rows that have a gradient at every step
NEVER = [0, 8]
TABLE = np.random.default_rng(0).normal(size=(NUM_ROWS, WIDTH)).astype("float32")
# Ours, Keras's, settings.
CLASSES = [
    (SparseSGD, plain.SGD, {}),
    (SparseAdagrad, plain.Adagrad, {}),
    (SparseAdagrad, plain.Adagrad, {"initial_accumulator_value": 0.0, "epsilon": 0.01}),
    (LazySGD, plain.SGD, {"momentum": 0.9}),
    (LazySGD, plain.SGD, {"momentum": 0.9, "nesterov": True}),
    (LazyRMSprop, plain.RMSprop, {}),
    (LazyRMSprop, plain.RMSprop, {"momentum": 0.9, "centered": True}),
    (LazyAdam, plain.Adam, {}),
    (LazyAdam, plain.Adam, {"amsgrad": True}),
    (LazyFtrl, plain.Ftrl, {"l1_regularization_strength": 0.01}),
]
EXACT = [c for c in CLASSES if c[0] in (SparseSGD, SparseAdagrad)]
LAZY = [c for c in CLASSES if c not in EXACT]
NAMES = [f"{ours.__name__}-{'-'.join(settings)}" for ours, _, settings in CLASSES]


def gradient(step, *, num_rows=NUM_ROWS):
    """Slices with repeated rows, those of OFTEN among them."""
    rng = np.random.default_rng(step + 1)
    ids = np.concatenate([OFTEN, rng.integers(1, 8, 6), OFTEN])
    values = rng.normal(size=(len(ids), WIDTH)).astype("float32")
    return tf.IndexedSlices(tf.constant(values), tf.constant(ids), tf.constant([num_rows, WIDTH], tf.int64))


def densify(slices):
    dense = np.zeros((NUM_ROWS, WIDTH), "float32")
    np.add.at(dense, slices.indices.numpy(), slices.values.numpy())
    return tf.constant(dense)


def train(optimizer, *, dense, start=TABLE, steps=STEPS):
    """The table and the slots after some steps, beside a small dense weight."""
    table, bias = keras.Variable(start, name="embeddings"), keras.Variable(np.ones(2, "float32"))
    for step in range(steps):
        slices = gradient(step)
        grads = [densify(slices) if dense else slices, tf.constant([0.5, -0.5]) * (step + 1)]
        optimizer.apply(grads, [table, bias])
    slots = [v.numpy() for v in optimizer.variables if tuple(v.shape) == (NUM_ROWS, WIDTH)]
    return table.numpy(), slots, bias.numpy()


@pytest.mark.parametrize(("ours", "keras_class", "settings"), CLASSES, ids=NAMES)
def test_dense_gradients_give_keras_bits(ours, keras_class, settings):
    found, wanted = (train(c(0.1, **settings), dense=True) for c in (ours, keras_class))
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.parametrize("ours", EXACT)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.5},
        {"clipvalue": 0.2},
        {"weight_decay": 0.1},
        {"use_ema": True, "ema_overwrite_frequency": 2},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 4.0},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
def test_sparse_gives_the_dense_result(ours, settings):
    ours, keras_class, own = ours
    found = train(ours(0.1, **own, **settings), dense=False)
    wanted = train(keras_class(0.1, **own, **settings), dense=True)
    for got, want in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[2], wanted[2], rtol=1e-6)


def test_sparse_sgd_with_momentum_is_still_exact():
    found = train(SparseSGD(0.1, momentum=0.9), dense=False)
    np.testing.assert_allclose(found[0], train(plain.SGD(0.1, momentum=0.9), dense=True)[0], rtol=1e-6)


def test_adagrad_counts_a_repeated_row_once():
    """Where Keras's own class, given slices, adds up the squares of the parts."""
    found = train(SparseAdagrad(0.1), dense=False)[0]
    assert abs(found - train(plain.Adagrad(0.1), dense=False)[0]).max() > 1e-2


@pytest.mark.parametrize(("ours", "keras_class", "settings"), LAZY)
def test_lazy_equals_keras_on_rows_that_never_rest(ours, keras_class, settings):
    found = train(ours(0.1, **settings), dense=False)
    wanted = train(keras_class(0.1, **settings), dense=True)
    np.testing.assert_allclose(found[0][OFTEN], wanted[0][OFTEN], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ours", "keras_class", "settings"), CLASSES, ids=NAMES)
def test_other_rows_and_their_slots_stay_as_they_are(ours, keras_class, settings):
    found = train(ours(0.1, **settings), dense=False)
    fresh = ours(0.1, **settings)
    variables = [keras.Variable(TABLE, name="embeddings"), keras.Variable(np.ones(2, "float32"))]
    fresh.build(variables)
    slots = [v.numpy() for v in fresh.variables if tuple(v.shape) == (NUM_ROWS, WIDTH)]
    for got, start in zip([found[0], *found[1]], [TABLE, *slots], strict=True):
        np.testing.assert_array_equal(got[NEVER], start[NEVER])
        assert (got[OFTEN] != start[OFTEN]).all()


def test_lazy_adam_follows_its_formula():
    """A row's moments move at its own steps; the bias correction counts all steps."""
    table = TABLE.astype("float64")
    m, v = np.zeros_like(table), np.zeros_like(table)
    for step in range(STEPS):
        grad = densify(gradient(step)).numpy().astype("float64")
        seen = np.unique(gradient(step).indices.numpy())
        m[seen] = 0.9 * m[seen] + 0.1 * grad[seen]
        v[seen] = 0.999 * v[seen] + 0.001 * grad[seen] ** 2
        rate = 0.1 * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        table[seen] -= rate * m[seen] / (np.sqrt(v[seen]) + 1e-7)
    np.testing.assert_allclose(train(LazyAdam(0.1), dense=False)[0], table, rtol=1e-4, atol=1e-5)


def test_lazy_ftrl_equals_keras_from_zeros():
    zeros = np.zeros_like(TABLE)
    found = train(LazyFtrl(0.1), dense=False, start=zeros)[0]
    np.testing.assert_allclose(
        found, train(plain.Ftrl(0.1), dense=True, start=zeros)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("ours", "keras_class", "settings"), CLASSES, ids=NAMES)
def test_step_reads_and_writes_rows_alone(ours, keras_class, settings):
    """In the graph no operation on the table or a slot is other than by rows, and no tensor is as large."""
    num_rows = 1_234_567
    table = keras.Variable(np.zeros((num_rows, WIDTH), "float32"))
    optimizer = ours(0.1, clipnorm=1.0, **settings)
    optimizer.build([table])
    step = tf.function(lambda: optimizer.apply([gradient(0, num_rows=num_rows)], [table]), autograph=False)
    graph = step.get_concrete_function().graph
    handles = {
        id(inside)
        for outside, inside in graph.captures
        if any(outside is v.value.handle for v in [table, *optimizer.variables] if v.shape == table.shape)
    }
    assert len(handles) == 1 + sum(v.shape == table.shape for v in optimizer.variables)
    used = {op.type for op in graph.get_operations() if any(id(tensor) in handles for tensor in op.inputs)}
    assert used <= {"ResourceGather", "ResourceScatterAdd", "ResourceScatterSub", "ResourceScatterUpdate"}
    large = [op.name for op in graph.get_operations() for t in op.outputs if num_rows in (t.shape or [])]
    assert not large


@pytest.mark.parametrize(
    ("device", "writes"), [("/job:ps/task:1", "ResourceScatterAdd"), ("", "ResourceScatterUpdate")]
)
@pytest.mark.parametrize("change", ["assign_add", "assign_sub"])
def test_rows_that_others_write_too_are_added_to(device, writes, change):
    """On a ps: replacing a row would lose what another worker has added since it was read."""
    with tf.Graph().as_default() as graph, tf.device(device):
        table = tf.Variable(TABLE)
        start = len(graph.get_operations())
        rows = Rows(table, tf.constant([1, 4]))
        for _ in range(2):
            tf.convert_to_tensor(rows)
            getattr(rows, change)(tf.ones([2, WIDTH]))
        types = [op.type for op in graph.get_operations()[start:]]
        assert [t for t in types if "Scatter" in t] == [writes] * 2
        assert types.count("ResourceGather") == 1


def test_rows_are_computed_where_the_table_is():
    optimizer = LazyAdam(0.1)
    table = keras.Variable(TABLE)
    optimizer.build([table])

    @tf.function(autograph=False)
    def step():
        with tf.device("/job:worker/task:1/device:CPU:0"):
            optimizer.apply([gradient(0)], [table])

    operations = step.get_concrete_function().graph.get_operations()
    devices = {
        op.device for op in operations if op.type.startswith(("ResourceGather", "ResourceScatter", "Sqrt"))
    }
    assert devices == {table.value.device}
    # The sum over repeated rows is the worker's: it sends each row once.
    assert all("worker" in op.device for op in operations if op.type in ("Unique", "UnsortedSegmentSum"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_decay": 0.1}, "weight_decay=0.1 .*'embeddings.*exclude_from_weight_decay"),
        ({"use_ema": True}, "use_ema=True .*leave it out"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 .*batch larger"),
        ({"loss_scale_factor": 8.0}, "loss_scale_factor=8.0 .*LossScaleOptimizer"),
    ],
)
@pytest.mark.parametrize("ours", [LazySGD, LazyRMSprop, LazyAdam, LazyFtrl])
def test_lazy_refuses_what_would_touch_other_rows(ours, settings, words):
    with pytest.raises(ConfigError, match=words):
        train(ours(0.1, **settings), dense=False)
    train(ours(0.1, **settings), dense=True)


def test_lazy_takes_a_decay_that_leaves_the_table_out():
    optimizer = LazyAdam(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["embeddings"])
    found = train(optimizer, dense=False)
    np.testing.assert_array_equal(found[0], train(LazyAdam(0.1), dense=False)[0])
    assert (found[2] < train(LazyAdam(0.1), dense=False)[2]).all()


def test_loss_scale_optimizer_scales_slices_too():
    table = keras.Variable(TABLE)
    outer = plain.LossScaleOptimizer(LazyAdam(0.1), initial_scale=8.0)
    slices = gradient(0)
    outer.apply([tf.IndexedSlices(slices.values * 8, slices.indices, slices.dense_shape)], [table])
    wanted = train(LazyAdam(0.1), dense=False, steps=1)[0]
    np.testing.assert_allclose(table.numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize(("ours", "keras_class", "settings"), CLASSES, ids=NAMES)
def test_optimizer_loads_from_its_config(ours, keras_class, settings):
    optimizer = ours(0.1, **settings)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is ours
    assert again.get_config() == optimizer.get_config()
    assert {k: v for k, v in again.get_config().items() if k != "name"} == {
        k: v for k, v in keras_class(0.1, **settings).get_config().items() if k != "name"
    }


def test_with_sparse_rows_keeps_settings_and_state():
    optimizer = plain.Adagrad(0.1, epsilon=1e-3, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["embeddings"])
    found = train(optimizer, dense=True)
    before = [v.numpy() for v in optimizer.variables]
    assert with_sparse_rows(optimizer) is optimizer
    assert type(optimizer) is SparseAdagrad
    assert optimizer.epsilon == 1e-3
    for variable, value in zip(optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    fresh = with_sparse_rows(plain.Adagrad(0.1, epsilon=1e-3, weight_decay=0.1))
    fresh.exclude_from_weight_decay(var_names=["embeddings"])
    np.testing.assert_allclose(train(fresh, dense=False)[0], found[0], rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [lambda: plain.SGD(0.1, momentum=0.9), plain.Adam, plain.Ftrl, plain.RMSprop, lambda: LazyAdam(0.1)],
)
def test_with_sparse_rows_leaves_what_would_change(optimizer):
    built = optimizer()
    kind = type(built)
    assert type(with_sparse_rows(built)) is kind
    assert type(with_sparse_rows(plain.SGD(0.1))) is SparseSGD


@pytest.mark.parametrize(
    ("optimizer", "instead"),
    [
        (lambda: plain.Adam(), "Adam reads and writes every row .*LazyAdam touches"),
        (lambda: plain.AdamW(), "AdamW .*LazyAdam touches"),
        (lambda: plain.SGD(0.1, momentum=0.9), "SGD .*LazySGD touches"),
        (lambda: plain.Ftrl(), "Ftrl .*LazyFtrl touches"),
        (lambda: plain.LossScaleOptimizer(plain.RMSprop()), "RMSprop .*LazyRMSprop touches"),
        (lambda: plain.Adagrad(gradient_accumulation_steps=2), "SparseAdagrad .*LazyAdam touches"),
        (lambda: plain.Adagrad(), None),
        (lambda: plain.SGD(0.1), None),
        (lambda: LazyAdam(), None),
        (lambda: plain.LossScaleOptimizer(LazyAdam()), None),
    ],
)
def test_what_touches_every_row_is_said_with_what_does_not(optimizer, instead):
    said = describe_dense_rows(with_sparse_rows(optimizer()))
    assert (said is None) == (instead is None)
    assert said is None or re.search(instead, said)


@pytest.mark.parametrize(
    ("num_rows", "optimizer", "said"),
    [(100_000, "adam", True), (100_000, "sgd", False), (1_000, "adam", False)],
)
def test_fit_says_that_an_optimizer_touches_a_large_table(num_rows, optimizer, said, caplog):
    run = tfdist.initialize(strategy="one_device")
    ids = np.array([[1], [2]])
    model = keras.Sequential(
        [keras.Input((1,), dtype="int32"), Embedding(num_rows, 1, name="clicks"), keras.layers.Flatten()]
    )
    model.compile(optimizer, "mse")
    for _ in range(2):
        run.fit(model, (ids, np.ones((2, 1), "float32")), batch_size=2, verbose=0)
    lines = [r.getMessage() for r in caplog.records if "every row" in r.getMessage()]
    assert len(lines) == said
    assert not said or lines[0].startswith("'clicks' has 100000 rows, and Adam reads and writes every row")
