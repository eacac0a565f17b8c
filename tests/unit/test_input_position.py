"""A stream goes on where it stood, or, where TensorFlow cannot say, is read again up to there."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.data import build_source
from tfdist.data.batches import local_batches
from tfdist.data.segment import Segment
from tfdist.errors import ConfigError
from tfdist.training.input_position import InputPosition, KeptIterators, check_order
from tfdist.training.plan import BatchPlan, Place

COUNT, BATCH = 103, 10
X = np.arange(COUNT, dtype=np.float32)


class Died(Exception):
    """Stands for the end of a process."""


class DieAfter(keras.callbacks.Callback):
    def __init__(self, num_steps):
        super().__init__()
        self.num_left = num_steps

    def on_train_batch_end(self, batch, logs=None):
        if self.num_left == 0:
            raise Died
        self.num_left -= 1


def slices(spoiled):
    return tf.data.Dataset.from_tensor_slices((X[:, None] * (not spoiled), X[:, None] / COUNT))


def generator(spoiled):
    del spoiled
    spec = tf.TensorSpec([1], tf.float32)
    return tf.data.Dataset.from_generator(
        lambda: (([x], [x / COUNT]) for x in X), output_signature=(spec, spec)
    )


def fit(folder, data, *, steps=None, shuffle=True, die_after=-1, seed=3, **changes):
    run = tfdist.initialize(strategy="one_device", seed=seed)
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    checkpoints = tfdist.Checkpoints(directory=folder, every_steps=1)
    options = {
        "batch_size": BATCH,
        "epochs": 1,
        "steps_per_epoch": steps,
        "verbose": 0,
        "shuffle": shuffle,
        **changes,
    }
    run.fit(model, data, callbacks=[DieAfter(die_after)], checkpoints=checkpoints, **options)
    return [w for v in model.get_weights() for w in v.ravel()]


@pytest.mark.parametrize(("build", "is_saved"), [(slices, True), (generator, False)])
@pytest.mark.parametrize("shuffle", [True, pytest.param(False, marks=pytest.mark.ci)])
@pytest.mark.parametrize(("steps", "deaths"), [(None, [6]), (5, [5, 2])])
def test_resumed_run_ends_as_the_uninterrupted(tmp_path, build, is_saved, steps, deaths, shuffle):
    """Inside an epoch, and where one has left the rest of the data to the next; the state is there if it can be."""
    options = {"steps": steps, "shuffle": shuffle, "epochs": 1 if steps is None else 2}
    wanted = fit(tmp_path / "whole", build(False), **options)
    for death in deaths:
        with pytest.raises(Died):
            fit(tmp_path / "run", build(False), die_after=death, **options)
        newest = max((tmp_path / "run").glob("*.npz"))
        with np.load(newest) as stored:
            # A generator can be where the shuffle buffer holds all that it had to give.
            assert ("__input__" in stored.files) == is_saved or shuffle
    # What was not read yet must be good: all was, if the pass is shuffled.
    assert fit(tmp_path / "run", build(spoiled=shuffle), **options) == wanted


@pytest.mark.parametrize(
    ("die_after", "num_examples", "changes", "words"),
    [
        (
            3,
            COUNT,
            {"batch_size": 20},
            r"\d steps inside a pass over the data with global_batch_size=10, and .*=20: ",
        ),
        (3, COUNT, {"seed": 4}, "resume with seed=3, or start anew"),
        (3, COUNT, {"shuffle": False}, "resume with shuffle=True"),
        (3, COUNT, {"drop_remainder": True}, "resume with drop_remainder=False"),
        (
            3,
            COUNT + 1,
            {},
            "num_examples=103, and this run has num_examples=104: .* with the data it began with",
        ),
        (
            None,
            COUNT - 1,
            {"epochs": 2},
            "after a pass over the data with num_examples=103, and this run has num_examples=102",
        ),
    ],
)
def test_place_in_other_data_is_refused_and_nothing_overwritten(
    tmp_path, die_after, num_examples, changes, words
):
    if die_after is None:
        fit(tmp_path, (X[:, None], X[:, None] / COUNT))
    else:
        with pytest.raises(Died):
            fit(tmp_path, (X[:, None], X[:, None] / COUNT), die_after=die_after)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    x = np.arange(num_examples, dtype=np.float32)[:, None]
    with pytest.raises(ConfigError, match=words):
        fit(tmp_path, (x, x / COUNT), **changes)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_epoch_may_have_another_order(tmp_path):
    """Larger batches, and examples that have come in since."""
    fit(tmp_path, (X[:, None], X[:, None] / COUNT))
    x = np.arange(2 * COUNT, dtype=np.float32)[:, None]
    fit(tmp_path, (x, x / COUNT), epochs=2, batch_size=20, seed=4)
    assert max(path.name for path in tmp_path.iterdir()) == "epoch-00002-step-00000000.npz"


def test_elastic_run_goes_on_inside_an_epoch_that_workers_share(caplog):
    with caplog.at_level(logging.WARNING):
        check_order({"num_parts": 3}, {"num_parts": 2}, step=1)
    assert "in 3 parts, and now in 2" in caplog.text
    check_order({}, {"seed": 1}, step=1)


def test_end_of_a_stream_is_no_step():
    """Of unknown length, it ends inside a step: the optimizer's counter must not move then."""
    run = tfdist.initialize(strategy="one_device")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    data = slices(False).filter(lambda x, y: True)
    run.fit(model, data, batch_size=BATCH, epochs=2, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 2 * -(-COUNT // BATCH)


def test_other_pipelines_state_is_not_used(tmp_path):
    """Another batch, order or epoch, and bytes that are none: read again from the start."""

    def open_at(step, state=b"", **changes):
        plan = BatchPlan(
            **{"global_batch_size": 5, "seed": 1, "shuffle": True} | changes,
            first_step=step,
            input_state=state,
        )
        (segment,) = local_batches(source, plan.share(1, [0]))
        return position.open(segment, source, plan)

    source = build_source(tf.data.Dataset.range(60))
    position = InputPosition()
    iterator = open_at(0)
    for _ in range(3):
        next(iterator)
    state = position.save()
    assert state
    wanted = next(iterator).numpy().tolist()
    assert next(open_at(3, state)).numpy().tolist() == wanted
    assert position.save()
    label = state[:32]
    for other in (state[32:], label, label + b"x" * 99, b"x" * 99):
        assert next(open_at(3, other)).numpy().tolist() == wanted
        assert position.save() == b""
    for changes in ({"place": Place(1)}, {"seed": 2}, {"shuffle": False}, {"global_batch_size": 4}):
        wanted = next(open_at(3, **changes)).numpy().tolist()
        assert next(open_at(3, state, **changes)).numpy().tolist() == wanted


def test_large_state_is_not_kept(monkeypatch):
    """Known beforehand from the examples' size, or when it is there."""
    big = build_source(tf.data.Dataset.from_tensors(tf.zeros([30, 1000, 1000])).repeat(9))
    small = build_source(tf.data.Dataset.range(60))
    for source, limit, is_kept in ((big, None, False), (small, None, True), (small, 1000, False)):
        if limit:
            monkeypatch.setattr("tfdist.training.input_position._MAX_BYTES", limit)
        plan = BatchPlan(global_batch_size=1, shuffle=True)
        (segment,) = local_batches(source, plan.share(1, [0]))
        position = InputPosition()
        next(position.open(segment, source, plan)) if source is small else position.open(
            segment, source, plan
        )
        assert bool(position.save()) == is_kept


def test_iterator_is_read_on_only_from_where_it_stands():
    """As when an epoch is given up, and its start comes again."""

    def segment(start, num_steps):
        return Segment(build=lambda: None, num_steps=num_steps, run="a run", start=start, stop=10)

    kept, iterator = KeptIterators(), iter([1])
    kept.keep(segment(0, 4), iterator)
    assert kept.take(segment(3, 4)) is None
    kept.keep(segment(0, 4), iterator)
    assert kept.take(segment(4, 4)) is iterator
    assert kept.take(segment(4, 4)) is None
    kept.keep(segment(8, 2), iterator)  # nothing follows
    assert kept.take(segment(10, 1)) is None


def test_of_a_stream_only_the_last_pass_is_kept():
    """Each has its own order; evaluations would heap up what they have read to the end."""
    ended = []

    class Iterator:
        def __del__(self):
            ended.append(self)

    kept = KeptIterators()
    for lap in range(3):
        segment = Segment(build=lambda: None, num_steps=4, run=("a stream", lap))
        assert kept.take(segment) is None
        kept.keep(segment, Iterator())
    assert len(ended) == 2
