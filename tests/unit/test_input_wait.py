"""Waiting for input is measured, shown where it is felt, and written."""

import io
import json
import re
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_progress import Clock

import tfdist
from tfdist.config.run_dir import RunDir
from tfdist.training.monitoring.callbacks import MetricsFile
from tfdist.training.monitoring.input_wait import InputWait, timed_next
from tfdist.training.monitoring.progress import ProgressBar


class Slow:
    """Examples that take a while each."""

    def __init__(self, secs):
        self.secs = secs

    def __len__(self):
        return 40

    def __getitem__(self, place):
        time.sleep(self.secs)
        return np.float32([place]), np.float32([0])


def test_share_leaves_out_steps_that_compile():
    clock = Clock()
    wait = InputWait(now=clock)
    assert wait.share is None
    clock.secs += 9
    wait.end_step(0.5, counts=False)
    for waited in (0.5, 0.0):
        clock.secs += 1
        wait.end_step(waited, counts=True)
    assert wait.share == 0.25
    wait.begin_epoch()
    assert wait.share is None


def test_timed_next_waits_for_the_element_alone():
    """In a graph too, where nothing but dependencies fixes the order."""

    def pause(i, secs):
        time.sleep(float(secs))
        return i

    dataset = tf.data.Dataset.range(3).map(lambda i: tf.numpy_function(pause, [i, 0.05], tf.int64))

    @tf.function
    def step(iterator):
        element, _, secs = timed_next(iterator)
        late = tf.numpy_function(pause, [element, 0.5], tf.int64)
        return late, secs

    iterator = iter(dataset)
    found = [step(iterator) for _ in range(3)]
    assert [int(late) for late, _ in found] == [0, 1, 2]
    # The pause after an element is not waiting; it may let the next one come in time.
    assert float(found[0][1]) > 0.04 and all(float(secs) < 0.45 for _, secs in found), found


def test_a_graph_may_take_many_elements():
    """As a loop of many steps does; TensorFlow itself ends it at the 33rd."""

    @tf.function(autograph=False)
    def steps(iterator):
        return [timed_next(iterator)[0] for _ in range(40)]

    iterator = iter(tf.data.Dataset.range(80))
    assert [int(element) for element in [*steps(iterator), *steps(iterator)]] == list(range(80))


# Slow enough to be what a step waits for, on a machine that is busy with other tests.
@pytest.mark.parametrize("secs", [0.03, 0.0])
@pytest.mark.parametrize("eagerly", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_fit_tells_of_slow_input(tmp_path, secs, eagerly):
    """In the progress line, and in metrics.jsonl; not in the history, which all workers share."""
    run = tfdist.initialize(strategy="one_device")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=eagerly)
    stream = io.StringIO()
    bar = ProgressBar(stream=stream)
    pause = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: time.sleep(0 if secs else 0.05)
    )
    history = run.fit(
        model,
        Slow(secs),
        batch_size=10,
        epochs=2,
        callbacks=[bar, MetricsFile(run_dir=RunDir(tmp_path)), pause],
    )
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = stream.getvalue().splitlines()[-1]
    assert "input_wait" not in history.history
    share = records[1]["input_wait"]
    assert 0.3 < share <= 1 if secs else 0 <= share < 0.3, share
    told = re.search(r"input-bound (\d+)%", last)
    if share >= 0.06:
        assert abs(int(told[1]) - 100 * share) <= 1, last  # the record's share is rounded once more
    elif share < 0.04:
        assert told is None, last


def test_jit_compiles_the_step_without_the_reading():
    """There is no compiled code for reading."""
    run = tfdist.initialize(strategy="one_device")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=True)
    x = np.ones((25, 1), np.float32)
    keras_model = keras.models.clone_model(model)
    keras_model.set_weights(model.get_weights())
    keras_model.compile("sgd", "mse")
    ours = run.fit(model, (x, x), batch_size=10, shuffle=False, verbose=0)
    plain = keras_model.fit(x, x, batch_size=10, shuffle=False, verbose=0)
    np.testing.assert_allclose(ours.history["loss"], plain.history["loss"], rtol=1e-5)
