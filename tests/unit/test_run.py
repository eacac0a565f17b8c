"""`fit`, `evaluate` and `predict` take Keras's arguments with Keras's meaning: each is held against Keras itself."""

import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist import train
from tfdist.cluster.spec import Cluster, Task
from tfdist.commands import recipe_run
from tfdist.training.checkpoint.store import CheckpointWriter

rng = np.random.default_rng(0)
X, W = rng.normal(size=(22, 3)).astype("float32"), rng.uniform(size=22).astype("float32")
Y = X.sum(axis=1, keepdims=True)


def build():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"], weighted_metrics=["mse"])
    return model


@pytest.fixture
def run():
    return tfdist.initialize(strategy="one_device", seed=1)


@pytest.mark.parametrize(
    "options",
    [
        {"validation_data": (X[:7], Y[:7]), "validation_freq": 2},
        {"validation_data": (X[:7], Y[:7]), "validation_freq": [1, 4]},
        {"validation_data": (X[:7], Y[:7]), "validation_batch_size": 3, "validation_steps": 2},
        {"validation_split": 0.25},
        {"initial_epoch": 2},
        {"sample_weight": W},
        {"class_weight": {0: 1.0}},
    ],
    ids=lambda options: "-".join(options),
)
def test_fit_is_kerass(run, options):
    y = np.zeros((22, 1), "int64") if "class_weight" in options else Y
    wanted_model, model = build(), build()
    wanted = wanted_model.fit(X, y, batch_size=5, epochs=4, shuffle=False, verbose=0, **options)
    found = run.fit(model, X, y, batch_size=5, epochs=4, shuffle=False, verbose=0, **options)
    assert found.epoch == wanted.epoch
    assert sorted(found.history) == sorted(wanted.history)
    for name, values in wanted.history.items():
        np.testing.assert_allclose(found.history[name], values, rtol=1e-5, err_msg=name)
    for weight, right in zip(model.get_weights(), wanted_model.get_weights(), strict=True):
        np.testing.assert_allclose(weight, right, rtol=1e-5)


@pytest.mark.parametrize("name", ["fit", "evaluate", "predict"])
def test_arguments_are_kerass(name):
    """Their names, order and defaults; ours come behind, and are few."""
    wanted = list(inspect.signature(getattr(keras.Model, name)).parameters.values())
    found = list(inspect.signature(getattr(tfdist.Run, name)).parameters.values())
    assert found[1].name == "model"
    keras_own = [p for p in wanted[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in found[2:]][: len(keras_own)] == [
        (p.name, p.default) for p in keras_own
    ]
    ours = found[2 + len(keras_own) :]
    assert len(ours) <= 12 and all(p.kind is p.KEYWORD_ONLY for p in ours)


def test_former_names_mean_what_they_meant(run):
    """In programs written before they were Keras's."""
    model, former = build(), build()
    run.fit(model, X, Y, batch_size=5, shuffle=False, verbose=0)
    run.fit(former, (X, Y), global_batch_size=5, shuffle=False, verbose=0, ps_mode="async")
    for weight, right in zip(former.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, right)
    found = run.evaluate(former, (X, Y), global_batch_size=5)
    assert found == run.evaluate(model, X, Y, batch_size=5, verbose=0, return_dict=True)
    np.testing.assert_array_equal(
        run.predict(former, X, global_batch_size=5), run.predict(model, X, batch_size=5)
    )
    with pytest.raises(tfdist.ConfigError, match="max_staleness=2 with strategy='one_device'"):
        run.fit(former, (X, Y), global_batch_size=5, max_staleness=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        run.fit(former, X, Y, batchsize=5)


class Told(keras.callbacks.Callback):
    """Keeps what it hears."""

    def __init__(self):
        super().__init__()
        self.words = []

    def on_test_begin(self, logs=None):
        self.words.append("test begins")

    def on_test_end(self, logs=None):
        self.words.append(("test ends", sorted(logs)))

    def on_predict_begin(self, logs=None):
        self.words.append("prediction begins")

    def on_predict_end(self, logs=None):
        self.words.append("prediction ends")


def test_evaluate_and_predict_tell_callbacks_as_keras_does(run, capsys):
    model, alone, ours = build(), Told(), Told()
    model.evaluate(X, Y, verbose=0, callbacks=[alone])
    model.predict(X, verbose=0, callbacks=[alone])
    run.evaluate(model, X, Y, callbacks=[ours])
    run.predict(model, X, callbacks=[ours])
    assert ours.words == alone.words
    assert capsys.readouterr().out.startswith("evaluation: ")


def test_model_with_a_loss_alone_evaluates_to_a_number(run):
    model = build()
    model.compile("sgd", "mse")
    assert run.evaluate(model, X, Y, verbose=0) == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)


def test_steps_per_execution_of_compile_is_honoured(run):
    """Callbacks hear of the steps of one call together."""
    model, now = build(), []
    model.compile(keras.optimizers.SGD(0.05), "mse", steps_per_execution=2)
    counter = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: now.append(int(model.optimizer.iterations))
    )
    counter.writes = True  # looks at no logs
    run.fit(model, X, Y, batch_size=5, verbose=0, callbacks=[counter])
    assert now[:4] == [2, 2, 4, 4]


class Sums(keras.Model):
    """Logs the sum of all that it has seen."""

    def __init__(self):
        super().__init__()
        self.total = self.add_weight(name="total", initializer="zeros", trainable=False)
        self.build((None, 1))

    def call(self, x):
        return x

    def train_step(self, data):
        self.total.assign_add(keras.ops.sum(data))
        return {"seen": self.total + 0.0}


@pytest.mark.parametrize(
    ("kind", "steps"), [("arrays", 2), ("arrays", 7), ("finite", 3), ("repeated", 3), ("open", 3)]
)
def test_epochs_of_few_steps_go_on_as_kerass(run, kind, steps):
    """Where the one before has ended, with a warning where the data end."""
    x = np.arange(22, dtype="float32")[:, None]
    stream = tf.data.Dataset.from_tensor_slices(x)
    data = {
        "arrays": x,
        "finite": stream,
        "repeated": stream.repeat(),
        "open": stream.filter(lambda x: True),
    }[kind]
    batches = data if kind == "arrays" else data.batch(5)
    options = {"steps_per_epoch": steps, "epochs": 4, "shuffle": False, "verbose": 0}
    results = []
    for fit in (
        lambda model: model.fit(batches, batch_size=5 if kind == "arrays" else None, **options),
        lambda model: run.fit(model, data, batch_size=5, **options),
    ):
        model = Sums()
        model.compile("sgd")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen = fit(model).history["seen"]
        results.append((list(map(float, seen)), sum("ran out of data" in str(w.message) for w in caught)))
    assert results[0] == results[1]


def test_fit_that_stopped_early_does_not_stop_the_next_one(run):
    lengths = []
    for fit in (
        lambda model, **more: model.fit(X, Y, batch_size=5, verbose=0, **more),
        lambda model, **more: run.fit(model, (X, Y), batch_size=5, verbose=0, **more),
    ):
        model = build()
        stop = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, m=model: setattr(m, "stop_training", True)
        )
        lengths.append([len(fit(model, epochs=3, callbacks=[stop]).epoch), len(fit(model, epochs=3).epoch)])
    assert lengths == [[1, 3], [1, 3]]


@pytest.mark.parametrize(
    "options", [{}, {"sample_weight": W}, {"steps": 2}], ids=lambda o: "-".join(o) or "plain"
)
def test_evaluate_is_kerass(run, options):
    model = build()
    wanted = model.evaluate(X, Y, batch_size=5, verbose=0, return_dict=True, **options)
    found = run.evaluate(build(), X, Y, batch_size=5, return_dict=True, **options)
    assert found == pytest.approx(wanted, rel=1e-5)
    wanted = model.evaluate(X, Y, batch_size=5, verbose=0, **options)
    assert run.evaluate(build(), X, Y, batch_size=5, **options) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("steps", [None, 2])
def test_predict_is_kerass(run, steps):
    model = build()
    wanted = model.predict(X, batch_size=5, steps=steps, verbose=0)
    run.evaluate(model, (X, Y))
    np.testing.assert_allclose(run.predict(model, X, batch_size=5, steps=steps), wanted, rtol=1e-5)


def test_schedule_of_the_command_ends_with_its_last_step(tmp_path, monkeypatch):
    """And not with its first epoch's."""
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    monkeypatch.setattr(recipe_run, "ProgressBar", Rates)
    monkeypatch.chdir(tmp_path)
    flags = ["--strategy=one_device", "--run_dir=run", "--epochs=2", "--steps_per_epoch=4", "--set=filters=2"]
    optimizer = ["--optimizer=sgd", "--learning_rate=1.0", "--schedule=cosine", "--warmup_steps=2"]
    assert train.main([*flags, *optimizer]) == 0
    assert len(rates) == 8
    # Of eight steps the rate is at its highest after the warm-up, in the middle halfway on, and nearly zero at the end.
    assert rates[2] > rates[4] > rates[6] > 0.05 > rates[7] > -1e-6, rates


def test_deterministic_is_refused_where_workers_step_in_any_order():
    addresses = {"chief": ("127.0.0.1:1",), "worker": ("127.0.0.1:2",), "ps": ("127.0.0.1:3",)}
    cluster = Cluster(addresses=addresses, task=Task("chief", 0))
    with pytest.raises(tfdist.ConfigError, match="in whatever order they are ready; choose another strategy"):
        tfdist.initialize(strategy="ps", cluster=cluster, deterministic=True)


def test_a_checkpoint_that_is_left_out_is_told_of_once(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(CheckpointWriter, "is_busy", True)
    options = {"batch_size": 5, "epochs": 2, "shuffle": False}
    run.fit(build(), (X, Y), checkpoints=tfdist.Checkpoints(directory=tmp_path, every_steps=2), **options)
    said = capsys.readouterr().out
    assert said.count("no checkpoint after epoch 0 and 2 steps") == said.count("no checkpoint") == 1
    assert len(list(tmp_path.glob("epoch-*.npz"))) == 2  # those of the epochs' ends all the same
