"""When a fit gives up on steps that go wrong, what it says, and what it does not take for wrong."""

import logging
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.keras_internals import all_variables, build_model
from tfdist.training.nan_diagnosis import find_place
from tfdist.training.on_nan import OnNan
from tfdist.training.plan import BatchPlan, FinishedStep

rng = np.random.default_rng(0)
X = rng.normal(size=(40, 4)).astype(np.float32)
Y = rng.integers(0, 3, 40)
NAN_X = X.copy()
NAN_X[25] = np.nan


@pytest.fixture(scope="module")
def run():
    return tfdist.initialize(strategy="one_device")


def build(model_class=keras.Model, optimizer="sgd"):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    x = keras.layers.Dropout(0.1, seed=2)(keras.layers.Dense(5, activation="tanh", name="hidden")(inputs))
    model = model_class(inputs, keras.layers.Dense(3, name="out")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def fit(run, model, data, **options):
    options = {"batch_size": 10, "shuffle": False, "verbose": 0, **options}
    return run.fit(model, data, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_nan": "halt"}, "on_nan='halt': choose one of stop, skip, rollback, ignore"),
        ({"on_nan": "rollback"}, "pass checkpoints=tfdist.Checkpoints"),
        ({"on_nan": "stop", "max_loss_spike": 1.0}, "max_loss_spike=1.0: it must be a factor of more than 1"),
        ({"on_nan": "stop", "max_loss_spike": float("nan")}, "max_loss_spike=nan"),
        ({"max_loss_spike": 3.0}, "max_loss_spike=3.0 with on_nan='ignore'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(run, options, words):
    with pytest.raises(tfdist.ConfigError, match=words.replace("(", r"\(")):
        fit(run, build(), (X, Y), **options)


def test_ignore_goes_on_as_keras_does(run):
    history = fit(run, build(), (NAN_X, Y))
    assert np.isnan(history.history["loss"]).all()


def test_skip_warns_with_step_and_count(run, caplog):
    with caplog.at_level(logging.WARNING, "tfdist"):
        fit(run, build(), (NAN_X, Y), on_nan="skip", epochs=2)
    assert [record.getMessage() for record in caplog.records if record.name == "tfdist"] == [
        "the loss is not finite in epoch 1 at step 3: the step is left out (1 so far)",
        "the loss is not finite in epoch 2 at step 3: the step is left out (2 so far)",
    ]


def test_skip_gives_up_where_every_step_is_wrong(run):
    with pytest.raises(tfdist.NonFiniteError, match="in epoch 3 at step 2: first in the inputs"):
        fit(run, build(), (X * np.nan, Y), on_nan="skip", epochs=5)


def test_skips_with_sound_steps_between_them_go_on(run):
    """Only steps that are wrong one after the other are counted against the run."""
    history = fit(run, build(), (NAN_X, Y), on_nan="skip", epochs=12)
    assert len(history.history["loss"]) == 12 and np.isfinite(history.history["loss"]).all()


def test_example_of_a_later_epoch_is_named_by_its_order(run):
    with pytest.raises(tfdist.NonFiniteError, match="in epoch 2 at step .*; example 25 of the training data"):
        fit(run, build(), (NAN_X, Y), on_nan="stop", shuffle=True, initial_epoch=1, epochs=2)


def test_limit_of_a_spike_is_that_of_the_mean_from_the_first_step_it_is_known(run):
    on_nan = OnNan(
        policy="stop",
        max_loss_spike=10.0,
        loop=None,
        model=None,
        source=None,
        saver=types.SimpleNamespace(is_saving=False, kept={}),
        is_chief=True,
    )
    plan = BatchPlan(global_batch_size=1)
    for step in range(20):
        assert on_nan.loss_limit() == np.inf
        on_nan.after_step(FinishedStep(step=step, logs=None, is_boundary=True, loss=2.0), plan)
    assert on_nan.loss_limit() == pytest.approx(20.0)


def test_rollback_gives_up_at_the_fourth_from_one_checkpoint(run, tmp_path, caplog):
    model = build()
    with (
        caplog.at_level(logging.WARNING, "tfdist"),
        pytest.raises(tfdist.NonFiniteError, match="in epoch 1 at step 4"),
    ):
        checkpoints = tfdist.Checkpoints(directory=tmp_path)
        fit(run, model, (X * np.nan, Y), on_nan="rollback", checkpoints=checkpoints)
    assert [record.getMessage() for record in caplog.records if record.name == "tfdist"] == [
        f"the loss is not finite in epoch 1 at step {step}: back to the weights after epoch 0 and 0 steps, and on "
        f"with step {step + 1} ({step} of 3 times)"
        for step in (1, 2, 3)
    ]
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_spike_counts_once_the_mean_is_known(run):
    """Targets 100 times as large in one batch, in the sixth epoch only behind 20 steps that set the mean."""
    spike = np.ones((40, 1), np.float32)
    spike[25] = 1000.0

    def linear():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-6), "mse")
        return model

    ones = np.ones((40, 1), np.float32)
    fit(run, linear(), (X, ones), on_nan="stop", max_loss_spike=10.0, epochs=8)
    data = np.concatenate([X] * 6), np.concatenate([ones] * 5 + [spike])
    with pytest.raises(tfdist.NonFiniteError) as caught:
        fit(run, linear(), data, on_nan="stop", max_loss_spike=10.0)
    assert "more than max_loss_spike=10 times its mean of" in str(caught.value)
    assert "in epoch 1 at step 23" in str(caught.value)
    fit(run, linear(), data, on_nan="stop")


def test_resumed_run_knows_the_mean_of_its_losses(run, tmp_path):
    """The third step after the resume is judged by the twenty before it."""
    spike = np.ones((40, 1), np.float32)
    spike[25] = 1000.0
    options = {
        "on_nan": "stop",
        "max_loss_spike": 10.0,
        "checkpoints": tfdist.Checkpoints(directory=tmp_path),
    }

    def linear():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-6), "mse")
        return model

    fit(run, linear(), (X, np.ones((40, 1), np.float32)), epochs=5, **options)
    with pytest.raises(tfdist.NonFiniteError, match="in epoch 6 at step 3"):
        fit(run, linear(), (X, spike), epochs=6, **options)


def test_overflow_of_a_scaled_loss_is_not_a_fault(run, caplog):
    """The first steps overflow until the scale fits, as they are meant to."""
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-6), initial_scale=2.0**127)
    model = build(optimizer=optimizer)
    model.compile(optimizer, "mse")
    with caplog.at_level(logging.WARNING, "tfdist"):
        fit(run, model, (X, X[:, :3] * 1000), on_nan="stop", epochs=3)
    assert not [record for record in caplog.records if record.name == "tfdist"]
    assert float(optimizer.dynamic_scale.numpy()) < 2.0**127
    assert optimizer.iterations.numpy() < 12


class InBranch(keras.Model):
    """Updates its weights in a branch of its own."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        grads = tape.gradient(loss, self.trainable_variables)

        def apply():
            self.optimizer.apply(grads, self.trainable_variables)

        tf.cond(tf.shape(x)[0] > 0, apply, lambda: None)
        return {}


class Compiled(keras.Model):
    """Has compiled its step itself."""

    @tf.function
    def train_step(self, data):
        return super().train_step(data)


def test_update_in_a_branch_of_the_step_is_left_out_as_well(run):
    model = build(InBranch)
    fit(run, model, (NAN_X, Y), on_nan="skip")
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert model.optimizer.iterations.numpy() == 3


def test_step_that_is_a_function_of_its_own_is_seen_in_the_logs(run):
    model, plain = build(Compiled), build()
    fit(run, model, (X, Y), on_nan="skip")
    plain.fit(X, Y, batch_size=10, shuffle=False, verbose=0)
    for got, wanted in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(tfdist.NonFiniteError, match="the loss became nan in epoch 1, at step 4 or before"):
        fit(run, build(Compiled), (NAN_X, Y), on_nan="stop")


def test_stream_names_the_place_in_the_batch(run):
    stream = tf.data.Dataset.from_tensor_slices((NAN_X, Y))
    with pytest.raises(tfdist.NonFiniteError, match="example 5 of the batch, counted from 0"):
        fit(run, build(), stream, on_nan="stop")


def test_own_pipeline_names_the_step(run):
    def pipeline(context):
        del context
        return tf.data.Dataset.from_tensor_slices((NAN_X, Y)).batch(10).repeat()

    with pytest.raises(tfdist.NonFiniteError, match="in epoch 1 at step 3. Its update was not applied"):
        fit(run, build(), pipeline, on_nan="stop", steps_per_epoch=4)


def test_shuffled_examples_are_named_as_they_lie_in_the_data(run):
    bad = X.copy()
    bad[[7, 25]] = np.inf
    with pytest.raises(tfdist.NonFiniteError) as caught:
        fit(run, build(), (bad, Y), on_nan="stop", shuffle=True, batch_size=40)
    assert "examples 7, 25 of" in str(caught.value) or "examples 25, 7 of" in str(caught.value)


def place_of(model, x=X, y=Y, weight=None):
    batch = tuple(tf.constant(part) for part in (x, y, weight) if part is not None)
    build_model(model, batch)
    before = [v.numpy() for v in all_variables(model, [model.optimizer])]
    place = find_place(model, batch)
    for variable, value in zip(all_variables(model, [model.optimizer]), before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    return place


def test_place_is_the_first_that_is_not_finite():
    assert place_of(build()) is None
    assert place_of(build(), x=NAN_X) == "first in the inputs"
    assert place_of(build(), weight=NAN_X[:, 0]) == "first in the sample weights"
    model = build()
    model.get_layer("hidden").kernel.assign(np.full((4, 5), np.nan))
    assert place_of(model) == "first in the weights of layer 'hidden'"
    inputs = keras.Input((4,))
    logs = keras.ops.log(keras.layers.Dense(3, name="before")(inputs))
    nested = keras.Model(inputs, logs, name="inner")
    model = keras.Sequential([keras.Input((4,)), nested, keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert place_of(model).startswith("first in the output of layer 'log")  # Keras may add a number.
    model = build()
    model.compile("sgd", lambda y_true, y_pred: tf.math.log(-tf.abs(y_pred) - 1.0))
    assert place_of(model) == "first in the loss; the model's outputs are finite"
    model = build()
    model.compile("sgd", lambda y_true, y_pred: tf.sqrt(tf.nn.relu(y_pred) * 0.0))
    assert place_of(model) == "in the gradients of 'hidden/kernel' and 3 more; the forward pass is finite"
