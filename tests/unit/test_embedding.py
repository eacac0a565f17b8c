import itertools

import keras
import numpy as np
import programs
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import ConfigError
from tfdist.layers import Embedding
from tfdist.layers import partition as partition_module
from tfdist.layers.partition import draw_rows, rows_of_shard
from tfdist.optimizers import LazyAdam

NUM_ROWS, WIDTH = 11, 3
TABLE = np.random.default_rng(0).normal(size=(NUM_ROWS, WIDTH)).astype("float32")
IDS = np.array([[1, 7, 7, 0], [10, 0, 3, 1]])
BAGS = [[1, 7, 7], [], [10, 0, 3, 1]]
WEIGHTS = [[0.5, 2.0, 1.0], [], [1.0, 3.0, -2.0, 0.25]]
DIVISIONS = [(1, "mod"), (2, "mod"), (3, "mod"), (11, "mod"), (2, "div"), (3, "div"), (11, "div")]
divided = pytest.mark.parametrize(("num_shards", "partition"), DIVISIONS)
init = keras.initializers


def make(**arguments):
    return Embedding(NUM_ROWS, WIDTH, weights=TABLE, **arguments)


def bag_row(ids, weights, combiner):
    """By the definition."""
    if not ids:
        return np.zeros(WIDTH)
    total = sum(w * TABLE[i] for i, w in zip(ids, weights, strict=True))
    sizes = {"sum": 1, "mean": sum(weights), "sqrtn": np.sqrt(sum(w * w for w in weights))}
    return total / sizes[combiner]


@pytest.mark.parametrize(
    ("num_rows", "num_shards", "partition"),
    [*itertools.product((7, 8, 9), (1, 2, 3, 7), ("mod", "div"))],
)
def test_every_row_is_in_one_shard_where_the_lookup_seeks_it(num_rows, num_shards, partition):
    rows = np.arange(num_rows)
    parts = [
        rows[rows_of_shard(s, num_rows=num_rows, num_shards=num_shards, partition=partition)]
        for s in range(num_shards)
    ]
    assert sorted(np.concatenate(parts)) == list(rows)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    shards = [tf.Variable(part[:, np.newaxis]) for part in parts]
    found = tf.compat.v1.nn.embedding_lookup(shards, rows, partition_strategy=partition)
    np.testing.assert_array_equal(found[:, 0], rows)


@divided
@pytest.mark.parametrize(
    "initializer",
    [
        init.RandomUniform(seed=4),
        init.RandomNormal(0.5, 2.0, seed=4),
        init.TruncatedNormal(seed=4),
        init.GlorotUniform(seed=4),
        init.Zeros(),
        init.Constant(0.5),
        init.Constant(TABLE),
        lambda shape, dtype=None: tf.reshape(tf.range(shape[0] * shape[1], dtype=dtype), shape),
    ],
    ids=["uniform", "normal", "truncated", "glorot", "zeros", "constant", "array", "function"],
)
def test_initial_table_is_keras_whatever_the_shards(num_shards, partition, initializer):
    plain = keras.layers.Embedding(NUM_ROWS, WIDTH, initializer)
    plain.build()
    ours = Embedding(NUM_ROWS, WIDTH, initializer, num_shards=num_shards, partition=partition)
    ours.build()
    assert len(ours.shards) == num_shards
    np.testing.assert_array_equal(ours.get_table(), plain.get_weights()[0])


def test_initial_table_follows_the_global_seed():
    tables = []
    for kind in (keras.layers.Embedding, Embedding):
        keras.utils.set_random_seed(5)
        layer = kind(NUM_ROWS, WIDTH)
        tables.append(layer(IDS).numpy())
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize("num_rows", [19, 20, 21])
def test_long_table_is_drawn_in_blocks_that_differ(monkeypatch, num_rows):
    monkeypatch.setattr(partition_module, "BLOCK_ROWS", 5)
    initializer = init.RandomNormal(seed=1)
    whole = draw_rows(initializer, shape=(num_rows, 2), rows=slice(0, num_rows, 1), dtype="float32").numpy()
    assert len(np.unique(whole)) == whole.size
    np.testing.assert_array_equal(whole[:5], initializer((5, 2)).numpy())
    for num_shards, partition in [(2, "mod"), (7, "mod"), (3, "div"), (17, "div")]:
        for shard in range(num_shards):
            rows = rows_of_shard(shard, num_rows=num_rows, num_shards=num_shards, partition=partition)
            drawn = draw_rows(initializer, shape=(num_rows, 2), rows=rows, dtype="float32")
            np.testing.assert_array_equal(drawn, whole[rows])


@divided
def test_dense_ids_give_their_rows(num_shards, partition):
    layer = make(num_shards=num_shards, partition=partition)
    for ids in (IDS, IDS[0], IDS[:, :0], IDS.astype("int32"), IDS.astype("float32"), IDS.reshape(2, 2, 2)):
        np.testing.assert_array_equal(layer(ids), TABLE[ids.astype(int)])


@divided
def test_ragged_ids_give_ragged_rows(num_shards, partition):
    layer = make(num_shards=num_shards, partition=partition)
    found = layer(tf.ragged.constant(BAGS))
    assert found.shape.as_list() == [3, None, WIDTH]
    for row, ids in zip(found, BAGS, strict=True):
        np.testing.assert_array_equal(row, TABLE[ids].reshape(-1, WIDTH))
    deep = layer(tf.ragged.constant([BAGS, BAGS[:1]]))
    np.testing.assert_array_equal(deep[1][0], TABLE[BAGS[0]])


@divided
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_bags_combine_rows(num_shards, partition, weighted, combiner):
    layer = make(num_shards=num_shards, partition=partition, combiner=combiner)
    weights = WEIGHTS if weighted else [[1.0] * len(bag) for bag in BAGS]
    wanted = [bag_row(bag, own, combiner) for bag, own in zip(BAGS, weights, strict=True)]
    ids, counts = tf.ragged.constant(BAGS, tf.int64), tf.ragged.constant(weights)
    given = {"weights": counts} if weighted else {}
    np.testing.assert_allclose(layer(ids, **given), wanted, rtol=1e-5, atol=1e-6)

    sparse = layer(ids.to_sparse(), **({"weights": counts.to_sparse()} if weighted else {}))
    np.testing.assert_allclose(sparse, wanted, rtol=1e-5, atol=1e-6)

    deep = layer(tf.stack([ids, ids]), **({"weights": tf.stack([counts, counts])} if weighted else {}))
    np.testing.assert_allclose(deep.to_tensor(), [wanted, wanted], rtol=1e-5, atol=1e-6)

    own = np.linspace(0.5, 2, IDS.size).reshape(IDS.shape) if weighted else np.ones(IDS.shape)
    dense = layer(IDS, **({"weights": own} if weighted else {}))
    wanted = [bag_row(list(bag), list(w), combiner) for bag, w in zip(IDS, own, strict=True)]
    np.testing.assert_allclose(dense, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_padding_counts_for_nothing_in_a_bag(combiner):
    layer = make(num_shards=2, combiner=combiner, mask_zero=True)
    wanted = [bag_row([i for i in bag if i], [1.0] * sum(map(bool, bag)), combiner) for bag in BAGS]
    ids = tf.ragged.constant(BAGS, tf.int64)
    np.testing.assert_allclose(layer(ids), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(ids.to_sparse()), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(ids.to_tensor()), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layer(np.zeros((1, 4), int)), np.zeros((1, WIDTH)))


def test_mask_is_keras():
    plain = keras.layers.Embedding(NUM_ROWS, WIDTH, mask_zero=True)
    np.testing.assert_array_equal(make(mask_zero=True).compute_mask(IDS), plain.compute_mask(IDS))
    assert make().compute_mask(IDS) is None
    assert make(mask_zero=True, combiner="sum").compute_mask(IDS) is None
    for layer in (make(mask_zero=True), make(mask_zero=True, combiner="sum")):
        mask = getattr(layer(IDS), "_keras_mask", None)
        assert (mask is None) == (layer.combiner is not None)


@divided
def test_gradient_has_the_distinct_rows_alone(num_shards, partition):
    layer = make(num_shards=num_shards, partition=partition)
    upstream = np.random.default_rng(1).normal(size=(*IDS.shape, WIDTH)).astype("float32")

    @tf.function(autograph=False)
    def gradients(ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(ids) * upstream)
        return tape.gradient(loss, [v.value for v in layer.shards])

    found = gradients(tf.constant(IDS))
    wanted = np.zeros_like(TABLE)
    np.add.at(wanted, IDS, upstream)
    assert sum(len(g.indices) for g in found) == len(np.unique(IDS))
    for shard, grad in enumerate(found):
        rows = np.arange(NUM_ROWS)[
            rows_of_shard(shard, num_rows=NUM_ROWS, num_shards=num_shards, partition=partition)
        ]
        ids = rows[grad.indices.numpy()]
        assert len(set(ids)) == len(ids)
        np.testing.assert_allclose(grad.values, wanted[ids], rtol=1e-5)


def test_lookup_gathers_unique_rows_on_the_devices_of_the_shards():
    """In the graph: each shard is read by one gather, beside it; ids are made unique first; nothing is as large."""
    num_rows = 1_000_003
    layer = Embedding(num_rows, WIDTH, "zeros", num_shards=2)
    layer.build()

    @tf.function(autograph=False)
    def step(ids):
        with tf.device("/job:worker/task:1/device:CPU:0"):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(ids))
            return [g.values for g in tape.gradient(loss, [v.value for v in layer.shards])]

    graph = step.get_concrete_function(tf.TensorSpec([None, 5], tf.int32)).graph
    operations = graph.get_operations()
    handles = {id(inside) for _, inside in graph.captures if inside.dtype == tf.resource}
    readers = [op for op in operations if any(id(t) in handles for t in op.inputs)]
    assert sorted({op.type for op in readers} - {"VariableShape"}) == ["ResourceGather"]
    gathers = [op for op in readers if op.type == "ResourceGather"]
    assert len(gathers) == 2
    for op, handle in ((op, op.inputs[0]) for op in gathers):
        assert f"loc:@{handle.op.name}".encode() in op.get_attr("_class")
    assert "Unique" in {op.type for op in operations}
    shard_sizes = {(num_rows + 1) // 2, num_rows // 2, num_rows}
    assert not [op.name for op in operations for t in op.outputs if shard_sizes & set(t.shape or [])]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("bad", [-1, NUM_ROWS, NUM_ROWS + 1, 2**40])
@pytest.mark.parametrize("compiled", [False, True])
def test_id_beyond_the_table_is_named(num_shards, bad, compiled):
    layer = make(num_shards=num_shards, name="clicks")
    call = tf.function(layer) if compiled else layer
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="'clicks.* must be 0 to 10, but there is"
    ) as error:
        call(tf.constant([[1, bad]], tf.int64))
    assert str(bad) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_shards": 12}, "num_shards=12 for a table of input_dim=11 rows.* at most 11"),
        ({"num_shards": 0}, "num_shards=0: it must be a positive integer"),
        ({"input_dim": 0}, "input_dim=0"),
        ({"output_dim": 2.0}, "output_dim=2.0"),
        ({"combiner": "max"}, "combiner='max': choose one of None, 'sum', 'mean', 'sqrtn'"),
        ({"partition": "hash"}, "partition='hash': choose 'mod' or 'div'"),
        ({"weights": TABLE[:-1]}, r"shape \(10, 3\) .* must be \(11, 3\)"),
        ({"num_shards": 2, "weights": TABLE, "embeddings_constraint": "unit_norm"}, "2 shards.* NonNeg"),
        ({"num_shards": 2, "weights": TABLE, "embeddings_regularizer": "orthogonal_regularizer"}, "L1, L2"),
    ],
)
def test_argument_that_does_not_fit(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Embedding(**({"input_dim": NUM_ROWS, "output_dim": WIDTH} | arguments))


@pytest.mark.parametrize(
    ("arguments", "call", "words"),
    [
        ({}, lambda layer: layer(IDS, weights=np.ones(IDS.shape)), "without a combiner"),
        ({}, lambda layer: layer(tf.sparse.from_dense(IDS)), "rank 2 with combiner=None"),
        (
            {"combiner": "sum"},
            lambda layer: layer(tf.ragged.constant(BAGS), weights=np.ones(IDS.shape)),
            "ragged ids with dense weights",
        ),
    ],
)
def test_form_that_does_not_fit(arguments, call, words):
    with pytest.raises(ConfigError, match=words):
        call(make(**arguments))


def test_weights_must_be_one_for_each_id():
    with pytest.raises(tf.errors.InvalidArgumentError, match="one number for each id"):
        make(combiner="sum")(IDS, weights=np.ones(IDS.shape[:1] + (1,)))


@pytest.mark.parametrize(("num_shards", "partition"), [(1, "mod"), (3, "mod"), (3, "div")])
def test_regularizer_and_constraint_are_the_tables(num_shards, partition):
    layer = make(
        num_shards=num_shards,
        partition=partition,
        embeddings_regularizer=keras.regularizers.L2(0.1),
        embeddings_constraint=keras.constraints.NonNeg(),
    )
    layer(IDS)
    np.testing.assert_allclose(sum(layer.losses), 0.1 * (TABLE**2).sum(), rtol=1e-5)
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.apply([tf.zeros(v.shape) for v in layer.shards], layer.trainable_variables)
    np.testing.assert_array_equal(layer.get_table(), np.maximum(TABLE, 0))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_gives_halves_of_a_float32_table(policy):
    layer = make(dtype=policy, num_shards=2)
    plain = keras.layers.Embedding(NUM_ROWS, WIDTH, weights=TABLE, dtype=policy)
    assert layer.shards[0].dtype == "float32"
    np.testing.assert_array_equal(layer(IDS), plain(IDS))


@pytest.mark.parametrize("form", [{}, {"ragged": True}, {"sparse": True}])
@pytest.mark.parametrize("combiner", [None, "mean"])
def test_symbolic_form_is_that_of_the_result(form, combiner):
    if form.get("sparse") and combiner is None:
        return
    layer = make(combiner=combiner)
    symbolic = keras.Input((4,), dtype="int64", **form)
    model = keras.Model(symbolic, layer(symbolic))
    ids = tf.constant(IDS)
    if form:
        ids = tf.RaggedTensor.from_tensor(ids) if form.get("ragged") else tf.sparse.from_dense(ids)
    result = model(ids)
    assert isinstance(result, tf.RaggedTensor) == model.output.ragged
    assert len(model.output.shape) == len(result.shape)
    assert model.output.shape[-1] == result.shape[-1] == WIDTH
    assert layer.compute_output_shape((None, 4)) == ((None, 4, WIDTH) if combiner is None else (None, WIDTH))


def build_model(num_shards):
    ids, weights = keras.Input((4,), dtype="int32"), keras.Input((4,))
    rows = Embedding(NUM_ROWS, WIDTH, name="bags", combiner="sum", num_shards=num_shards)(
        ids, weights=weights
    )
    model = keras.Model([ids, weights], keras.layers.Dense(1)(rows))
    model.compile(LazyAdam(0.1), "mse")
    return model


@pytest.mark.ci
def test_model_loads_in_a_plain_process(tmp_path):
    """With slots: training goes on there as here."""
    model = build_model(3)
    data = ([IDS, np.ones(IDS.shape, "float32")], np.ones((2, 1), "float32"))
    model.fit(*data, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", ids=IDS)
    code = (
        "import warnings; warnings.simplefilter('error', UserWarning)\n"
        "import keras, numpy as np, tfdist.layers\n"
        "model = keras.saving.load_model('model.keras')\n"
        "ids = np.load('data.npz')['ids']\n"
        "data = ([ids, np.ones(ids.shape, 'float32')], np.ones((2, 1), 'float32'))\n"
        "model.fit(*data, verbose=0)\n"
        "layer = model.get_layer('bags')\n"
        "np.savez('out.npz', table=layer.get_table(), num_shards=len(layer.shards))\n"
    )
    (tmp_path / "plain.py").write_text(code)
    done = programs.run(["plain.py"], cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    model.fit(*data, verbose=0)
    with np.load(tmp_path / "out.npz") as found:
        assert found["num_shards"] == 3
        np.testing.assert_allclose(found["table"], model.get_layer("bags").get_table(), rtol=1e-6)


def test_config_keeps_the_arguments():
    layer = Embedding(
        NUM_ROWS,
        WIDTH,
        "he_normal",
        embeddings_regularizer="l2",
        embeddings_constraint="non_neg",
        mask_zero=True,
        combiner="sqrtn",
        num_shards=2,
        partition="div",
        name="bags",
    )
    again = Embedding.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert Embedding(3, 2).get_config()["num_shards"] is None


def test_public_name_is_there():
    assert tfdist.layers.Embedding is Embedding
    assert "layers" in dir(tfdist)


@pytest.mark.parametrize("partition", ["mod", "div"])
@pytest.mark.parametrize(("saved", "loaded"), [(3, 1), (1, 3), (3, 2), (2, 2)])
def test_saved_weights_fit_another_number_of_shards(tmp_path, saved, loaded, partition):
    def build(num_shards):
        layers = [
            keras.Input((2,), dtype="int32"),
            Embedding(7, 3, num_shards=num_shards, partition=partition),
        ]
        return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(1)])

    model, other = build(saved), build(loaded)
    model.save(tmp_path / "model.keras")
    other.load_weights(tmp_path / "model.keras")
    np.testing.assert_array_equal(other.layers[0].get_table(), model.layers[0].get_table())
    np.testing.assert_array_equal(other.layers[-1].get_weights()[0], model.layers[-1].get_weights()[0])
