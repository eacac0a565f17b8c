"""A model in stages: where it is cut, in which order its parts are computed, and what carries tensors between them."""

import json
import secrets
import socket
import threading
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist import keras_internals
from tfdist.api.checks import check_stages
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.data import build_source
from tfdist.data.sources.source import SelfShardedSource
from tfdist.errors import ClusterError, ConfigError
from tfdist.training.pipeline import links
from tfdist.training.pipeline.build import build_stage, divide
from tfdist.training.pipeline.cut import Cutter
from tfdist.training.pipeline.layer_graph import LayerGraph
from tfdist.training.pipeline.links import Link, open_links
from tfdist.training.pipeline.passes import Passes
from tfdist.training.pipeline.schedule import SCHEDULES, foretell_step_secs, idle_share
from tfdist.training.pipeline.stage import MicroBatch

layers = keras.layers
LAYOUT = PipelineOptions().layout(2)
SIZES = [(1, 1), (2, 1), (2, 8), (3, 2), (4, 8), (4, 3)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_each_micro_batch_goes_through_each_stage_once_each_way(name, num_stages, num_micro_batches):
    held = []
    for stage in range(num_stages):
        passes = SCHEDULES[name](stage, num_stages, num_micro_batches)
        live, most = set(), 0
        for is_forward, number in passes:
            live.add(number) if is_forward else live.remove(number)
            most = max(most, len(live))
        assert not live and len(passes) == 2 * num_micro_batches
        assert [number for is_forward, number in passes if is_forward] == list(range(num_micro_batches))
        held.append(most)
    wanted = [min(num_stages - stage, num_micro_batches) for stage in range(num_stages)]
    assert held == (wanted if name == "1f1b" else num_stages * [num_micro_batches])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_stages_are_idle_as_long_as_the_formula_says(name, num_stages, num_micro_batches):
    """Played through with passes of 1 and 2: nobody waits in a circle, and the bubble is the known one."""
    secs = foretell_step_secs(
        name,
        num_micro_batches,
        forward=num_stages * [1.0],
        backward=num_stages * [2.0],
        crossing=num_stages * [0.0],
    )
    assert 1 - 3 * num_micro_batches / secs == pytest.approx(idle_share(num_stages, num_micro_batches))


def test_slow_link_is_what_a_step_takes():
    passes = {"forward": [1.0, 1.0], "backward": [2.0, 2.0]}
    # Each crosses for 10 s while others are computed: eight on the way there, and eight on the way back.
    assert foretell_step_secs("gpipe", 8, **passes, crossing=[10.0]) == 1 + 80 + 1 + 2 + 80 + 2
    alone = foretell_step_secs("1f1b", 8, forward=[1.0], backward=[2.0], crossing=[])
    assert alone == 8 * 3
    # 1F1B lets two micro-batches be on their way: each of them waits for the one before to come back.
    assert 8 * 10 < foretell_step_secs("1f1b", 8, **passes, crossing=[10.0]) < 8 * 26


def perceptron(num_layers=6, width=16, **options):
    inputs = x = keras.Input((12,))
    for _ in range(num_layers):
        x = layers.Dense(width, activation="relu", **options)(x)
    return compiled(keras.Model(inputs, layers.Dense(3)(x)))


def compiled(model, optimizer=None):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


def cutter(model, x, **options):
    settings = {"slots_per_weight": 2, "micro_batch_size": 4, "num_micro_batches": 8} | options
    return Cutter(LayerGraph(model, x), **settings)


def test_work_is_counted_as_the_textbook_does():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(5, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.Reshape((16, 5))(x)
    x = layers.MultiHeadAttention(2, 4, use_bias=False)(x, x)
    x = layers.LSTM(6, use_bias=False)(x)
    model = keras.Model(inputs, layers.Dense(7, use_bias=False)(x))
    graph = LayerGraph(model, np.zeros((2, 8, 8, 3), np.float32))
    flops = {
        call.operation.name.rstrip("_0123456789"): count
        for call, count in zip(graph.calls, graph.flops, strict=True)
    }
    assert flops["dense"] == pytest.approx(2 * 6 * 7, rel=0.05)
    assert flops["conv2d"] == pytest.approx(2 * 16 * 5 * 27, rel=0.05)
    assert flops["depthwise_conv2d"] == pytest.approx(2 * 16 * 5 * 9, rel=0.1)
    # Three projections in and one out, and the products of 16 rows with 16.
    assert flops["multi_head_attention"] == pytest.approx(4 * 2 * 16 * 5 * 8 + 2 * 2 * 16 * 16 * 8, rel=0.3)
    assert flops["lstm"] == pytest.approx(16 * 2 * (5 + 6) * 24, rel=0.3)
    assert flops["reshape"] == 0


def test_stages_are_about_equally_much_work():
    plans = cutter(perceptron(num_layers=8, width=64), np.zeros((2, 12), np.float32)).cut(3)
    assert [plan.start for plan in plans] == [0, *(plan.stop for plan in plans[:-1])]
    work = [plan.flops for plan in plans]
    assert max(work) < 1.35 * sum(work) / 3


def test_residual_block_is_left_in_one_piece():
    inputs = x = layers.Input((64,))
    for _ in range(6):
        x = x + layers.Dense(64)(layers.Dense(64, activation="relu")(x))
    graph = LayerGraph(keras.Model(inputs, layers.Dense(3)(x)), np.zeros((2, 64), np.float32))
    plans = Cutter(graph, slots_per_weight=0, micro_batch_size=4, num_micro_batches=8).cut(3)
    assert [len(graph.crossing(plan.start)) for plan in plans] == [0, 1, 1]


def test_where_equally_much_crosses_everywhere_the_cut_is_even():
    inputs = x = layers.Input((64,))
    for _ in range(16):
        x = x + layers.Dense(64)(layers.Dense(64, activation="relu")(x))
    graph = LayerGraph(keras.Model(inputs, x), np.zeros((2, 64), np.float32))
    plans = Cutter(graph, slots_per_weight=0, micro_batch_size=4, num_micro_batches=8).cut(2)
    work = [plan.flops for plan in plans]
    assert max(work) < 0.51 * sum(work)


def test_cut_by_hand():
    model = perceptron()
    names = [layer.name for layer in model.layers]
    plans = cutter(model, np.zeros((2, 12), np.float32)).cut_before([names[3], names[5]])
    assert [plan.start for plan in plans] == [0, 2, 4]
    for wrong, words in (
        (["dense_x"], "no such layer"),
        ([names[5], names[3]], "in the model's order"),
        ([names[1]], "nothing before"),
    ):
        with pytest.raises(ConfigError, match=words):
            cutter(model, np.zeros((2, 12), np.float32)).cut_before(wrong)


def test_what_cannot_be_cut_is_said():
    x = np.zeros((2, 12), np.float32)
    with pytest.raises(ConfigError, match="num_stages=9, and the model can be cut into 7 at most"):
        cutter(perceptron(), x).cut(9)
    with pytest.raises(ConfigError, match="take more stages, or more micro-batches"):
        cutter(perceptron(), x).cut(2, most_bytes=100)
    masked = keras.Sequential([keras.Input((5,)), layers.Embedding(9, 4, mask_zero=True), layers.Dense(2)])
    with pytest.raises(ConfigError, match="the model's output carries a mask"):
        divide(compiled(masked), (np.ones((2, 5)), np.ones((2, 5))), options=PipelineOptions(), layout=LAYOUT)
    with pytest.raises(ConfigError, match="axis of unknown length"):
        cutter(
            compiled(keras.Sequential([keras.Input((None,)), layers.Embedding(9, 4), layers.Dense(2)])),
            np.ones((2, 5), np.int32),
        ).cut(2)

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ConfigError, match="make it a functional"):
        LayerGraph(Own(), x)


def test_memory_is_a_hard_limit():
    """The most even cut would need more."""
    inputs = x = keras.Input((512,))
    for _ in range(8):
        x = layers.Dense(512)(x)
    cut = cutter(compiled(keras.Model(inputs, x)), np.zeros((2, 512), np.float32))
    even = cut.cut(2)
    limit = max(plan.state_bytes for plan in even) - 1
    assert all(plan.state_bytes <= limit for plan in cut.cut(3, most_bytes=limit))
    with pytest.raises(ConfigError, match="no cut into 2 stages"):
        cut.cut(2, most_bytes=limit / 4)


def test_variables_wait_for_their_memory_and_get_what_they_would_have_had():
    keras.utils.set_random_seed(3)
    whole = perceptron(kernel_initializer="he_normal")
    whole.optimizer.build(whole.trainable_variables)
    keras.utils.set_random_seed(3)
    with keras_internals.deferring_variables() as slots:
        model = compiled(perceptron(kernel_initializer="he_normal"), keras.optimizers.Adam())
        model.optimizer.build(model.trainable_variables)
    assert not any(keras_internals.has_memory(v) for v in model.weights)
    assert len(slots) == 2 * len(model.weights)
    assert model.count_params() == whole.count_params()
    for variable in reversed(model.weights):
        keras_internals.materialize(variable)
    for own, other in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(own, other)


def connect():
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far = listener.accept()[0]
    listener.close()
    return Link(near, "worker:1"), Link(far, "worker:0")


def test_both_ends_send_more_than_the_wire_holds_at_once():
    near, far = connect()
    large = tf.random.normal((1500, 1500), seed=1)
    mixed = [large, tf.cast(large[:2], tf.bfloat16), tf.range(3), tf.constant(2.0)]
    specs = [tf.TensorSpec(t.shape, t.dtype) for t in mixed]
    for link in (near, far):
        for _ in range(4):
            link.send(mixed)
    for link in (near, far):
        for _ in range(4):
            for found, sent in zip(link.receive(specs), mixed, strict=True):
                assert found.dtype == sent.dtype
                np.testing.assert_array_equal(found.numpy(), sent.numpy())
    near.close()
    with pytest.raises(tf.errors.UnavailableError, match="worker:0, the neighbouring stage, is gone"):
        far.receive(specs)
    far.close()


class Ring:
    """What crosses inside a cluster, among threads."""

    def __init__(self, size):
        self._barrier = threading.Barrier(size)
        self._content = b""

    def broadcast(self, rank, content, source):
        if rank == source:
            self._content = content
        self._barrier.wait(20)
        found = self._content
        self._barrier.wait(20)
        return found


def in_threads(size, run):
    """Returns what each of some threads returns; raises what one has raised."""
    found, errors = {}, []

    def attempt(rank):
        try:
            found[rank] = run(rank)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    return [found[rank] for rank in range(size)]


def open_all(size, num_stages):
    ring = Ring(size)
    return in_threads(
        size,
        lambda rank: open_links(
            types.SimpleNamespace(
                rank=rank,
                neighbours=(
                    rank - 1 if rank % num_stages else None,
                    rank + 1 if (rank + 1) % num_stages else None,
                ),
                tasks=[f"worker:{i}" for i in range(size)],
                hosts=size * ["127.0.0.1"],
                broadcast=lambda content, source: ring.broadcast(rank, content, source),
            )
        ),
    )


def test_stages_find_their_neighbours():
    opened = open_all(6, 3)
    assert [(before is None, after is None) for before, after in opened] == 2 * [
        (True, False),
        (False, False),
        (False, True),
    ]
    for rank in (0, 1, 3, 4):
        opened[rank][1].send([tf.constant(rank)])
        assert opened[rank + 1][0].receive([tf.TensorSpec([], tf.int32)])[0].numpy() == rank
    for link in (link for pair in opened for link in pair if link is not None):
        link.close()


def test_who_does_not_know_the_secret_is_sent_away(monkeypatch):
    monkeypatch.setattr(links, "_GREETING_SECS", 0.2)
    listener = links._listen("127.0.0.1")
    assert listener.getsockname()[0] == "127.0.0.1"
    key = secrets.token_bytes(32)
    place = [*listener.getsockname()]
    strangers = [socket.create_connection(place) for _ in range(2)]
    strangers[0].sendall(bytes(32))
    visitor = links._visit(json.dumps([*place, key.hex()]).encode(), "worker:0")
    accepted = links._accept(listener, key, "worker:1", deadline=1e9)
    assert accepted.getpeername() == visitor.getsockname()
    with pytest.raises(ClusterError, match="worker:1, the next stage, has not come"):
        links._accept(listener, key, "worker:1", deadline=0)
    for one in (listener, visitor, accepted, *strangers):
        one.close()


def test_stages_that_would_see_other_batches_are_refused():
    """Else each would train on its own, and nobody would say a word."""
    arrays = build_source((np.zeros((4, 2)), np.zeros(4)))
    check_stages((arrays, None), is_served=False, is_elastic=False)
    for words, sources, served, elastic in (
        ("data_service", (arrays, None), True, False),
        ("a function of the input context", (arrays, SelfShardedSource(local_dataset=None)), False, False),
        ("elastic='in_process'", (arrays, None), False, True),
    ):
        with pytest.raises(ConfigError, match=words):
            check_stages(sources, is_served=served, is_elastic=elastic)


def tied():
    """Returns a model whose first and last layers have a weight in common, and whose layers add losses."""
    ids = keras.Input((4,), dtype="int32")
    table = layers.ReversibleEmbedding(11, 8)
    x = table(ids)
    for _ in range(3):
        hidden = layers.Dense(8, activation="tanh", activity_regularizer="l2", kernel_regularizer="l2")(x)
        x = layers.LayerNormalization()(x + hidden)
    return keras.Model(ids, table(x, reverse=True))


def add_up(sums):
    """Gives each stage that has a weight the sum of all."""
    present = [one for one in sums if one is not None]
    total = sum(one.numpy() for one in present)
    for one in present:
        one.assign(total)


@pytest.mark.parametrize(
    ("num_stages", "num_micro_batches", "recompute"),
    [
        pytest.param(2, 1, False, marks=pytest.mark.ci),
        (3, 4, False),
        pytest.param(1, 2, False, marks=pytest.mark.everything),
        pytest.param(3, 4, True, marks=pytest.mark.everything),
    ],
)
def test_stages_give_what_the_whole_model_gives(num_stages, num_micro_batches, recompute):
    def make():
        keras.utils.set_random_seed(5)
        return compiled(tied(), keras.optimizers.Adam(0.01, global_clipnorm=0.2, epsilon=1e-3))

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 11, (3, 10, 4)), rng.integers(0, 11, (3, 10, 4))
    batch = (tf.constant(x[0, :2]), tf.constant(y[0, :2]))
    whole = make()
    stages = []
    for index in range(num_stages):
        with keras_internals.deferring_variables():
            model = make()
        layout = PipelineOptions().layout(num_stages)
        division = divide(model, batch, options=PipelineOptions(), layout=layout)
        stages.append((model, build_stage(model, batch, division, index, recompute=recompute)[0]))
    shared = division.shared_weights(model)
    assert [v.path.partition("/")[2] for v in shared] == (["embeddings"] if num_stages > 1 else [])
    opened = open_all(num_stages, num_stages)
    passes = [Passes(stage, (i, num_stages), opened[i], "1f1b") for i, (_, stage) in enumerate(stages)]
    for step in range(3):
        whole.reset_metrics()
        wanted, _ = whole.train_on_batch(x[step], y[step])
        cuts = [k * 10 // num_micro_batches for k in range(num_micro_batches + 1)]
        micros = [
            MicroBatch(
                k,
                high - low,
                (high - low) / 10,
                (tf.constant(x[step, low:high]), tf.constant(y[step, low:high])),
            )
            for k, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False))
        ]
        losses = in_threads(num_stages, lambda rank, micros=micros: passes[rank].train(micros))[-1]
        add_up([stage.gradients.of(model.trainable_variables[0]) for model, stage in stages])
        norm = float(np.sqrt(sum(stage.gradients.sum_up()[1] for _, stage in stages)))
        for _, stage in stages:
            stage.update(norm=norm)
        mean = sum(share * float(loss) for share, loss in losses)
        assert mean == pytest.approx(float(wanted), rel=1e-5)
    for model, stage in stages:
        assert (len(stage.layers.weights) < len(model.weights)) == (num_stages > 1)
        for own, other in zip(model.trainable_variables, whole.trainable_variables, strict=True):
            if keras_internals.has_memory(own):
                np.testing.assert_allclose(own.numpy(), other.numpy(), rtol=1e-5, atol=2e-6)
            else:
                with pytest.raises(RuntimeError, match="is another stage's"):
                    own.numpy()
    for link in (link for pair in opened for link in pair if link is not None):
        link.close()
