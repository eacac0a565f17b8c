import dataclasses
import json
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.commands.keep_best import KeepBest
from tfdist.config.run_config import RunConfig
from tfdist.config.run_dir import RunDir, read_object, read_records
from tfdist.training.loop import _log_every
from tfdist.training.monitoring.callbacks import ConfigFile, MetricsFile, TensorBoardScalars, split_callbacks
from tfdist.training.monitoring.progress import ProgressBar


class Clock:
    """A clock that tests set."""

    secs = 0.0

    def __call__(self):
        return self.secs


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


def build_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
    return model


def fit(model, callbacks, **kwargs):
    x = np.linspace(0, 1, 48, dtype="float32").reshape(16, 3)
    return model.fit(
        x,
        x[:, :1],
        batch_size=4,
        shuffle=False,
        verbose=0,
        validation_data=(x, x[:, :1]),
        callbacks=callbacks,
        **kwargs,
    )


def names(callbacks):
    return [type(callback).__name__ for callback in callbacks]


class Own(keras.callbacks.Callback):
    pass


class OwnWriter(keras.callbacks.Callback):
    writes = True


class ReadingCheckpoint(keras.callbacks.ModelCheckpoint):
    writes = False


def test_split_leaves_the_writers_to_the_chief(tmp_path, run_dir):
    reading = [
        keras.callbacks.EarlyStopping(),
        keras.callbacks.ReduceLROnPlateau(),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
        keras.callbacks.LambdaCallback(),
        keras.callbacks.TerminateOnNaN(),
        Own(),
        ReadingCheckpoint(str(tmp_path / "m.keras")),
    ]
    writing = [
        keras.callbacks.ModelCheckpoint(str(tmp_path / "m.keras")),
        keras.callbacks.TensorBoard(str(tmp_path)),
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        keras.callbacks.BackupAndRestore(str(tmp_path)),
        keras.callbacks.RemoteMonitor(),
        keras.callbacks.ProgbarLogger(),
        MetricsFile(run_dir=run_dir),
        TensorBoardScalars(run_dir=run_dir),
        ProgressBar(),
        OwnWriter(),
    ]
    mixed = [callback for pair in zip(writing, reading, strict=False) for callback in pair] + writing[
        len(reading) :
    ]
    run_here, left_out = split_callbacks(mixed, is_chief=False)
    assert names(run_here) == names(reading)
    assert names(left_out) == names(writing)
    assert split_callbacks(mixed, is_chief=True) == (mixed, [])


@pytest.mark.parametrize("given", [Own(), [Own()], (Own(),), keras.callbacks.CallbackList([Own()])])
def test_split_takes_what_fit_takes(given):
    assert names(split_callbacks(given, is_chief=False)[0]) == ["Own"]


def test_split_takes_none():
    assert split_callbacks(None, is_chief=False) == ([], [])


class BatchLines(keras.callbacks.CSVLogger):
    """Looks at batches, on the chief alone."""

    def on_train_batch_end(self, batch, logs=None):
        self.seen = [*getattr(self, "seen", []), logs]


def test_logs_of_batches_are_computed_for_a_writer_where_the_chief_is_alone(tmp_path):
    """They are a collective: among other workers, who have no such callback, it would wait for ever."""
    run = tfdist.initialize(strategy="one_device")
    callback = BatchLines(str(tmp_path / "log.csv"))
    x = np.zeros((16, 3), np.float32)
    run.fit(build_model(), x, x[:, :1], batch_size=4, epochs=1, verbose=0, callbacks=[callback])
    assert [sorted(logs) for logs in callback.seen] == 4 * [["loss", "mae"]]
    shown = {"shown": False, "step_secs": None}
    callbacks = keras.callbacks.CallbackList([callback])
    assert _log_every(callbacks, 4, is_alone=True, **shown) == 1
    assert _log_every(callbacks, 4, is_alone=False, **shown) == 0


def test_metrics_file_holds_every_epoch(run_dir):
    history = fit(build_model(), [MetricsFile(run_dir=run_dir)], epochs=3).history
    lines = read_records(run_dir.metrics_file)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 4), (1, 8), (2, 12)]
    for key, values in history.items():
        assert [line[key] for line in lines] == values
    assert list(lines[0]) == ["epoch", "step", "wall_secs", "memory_mb", "loss", "mae", "val_loss", "val_mae"]
    assert 100 < lines[0]["memory_mb"] <= lines[2]["memory_mb"]  # what Python and TensorFlow take at least


def test_metrics_file_goes_on_after_an_aborted_run(run_dir):
    model = build_model()

    def abort_in_epoch_3(epoch, logs):
        if epoch == 3:
            raise KeyboardInterrupt

    aborting = keras.callbacks.LambdaCallback(on_epoch_end=abort_in_epoch_3)
    with pytest.raises(KeyboardInterrupt):
        fit(model, [MetricsFile(run_dir=run_dir), aborting], epochs=6)
    before = run_dir.metrics_file.read_text().splitlines()
    assert len(before) == 4
    # The last checkpoint is older than the last line.
    fit(model, [MetricsFile(run_dir=run_dir)], epochs=6, initial_epoch=2)
    after = run_dir.metrics_file.read_text().splitlines()
    assert after[:2] == before[:2]
    assert [json.loads(line)["epoch"] for line in after] == [0, 1, 2, 3, 4, 5]
    wall_secs = [json.loads(line)["wall_secs"] for line in after]
    assert wall_secs == sorted(wall_secs)


def test_metrics_file_measures_training_alone(run_dir):
    clock = Clock()
    callback = MetricsFile(run_dir=run_dir, get_step=lambda: 17, now=clock)
    callback.set_params({"epochs": 1, "steps": 3, "global_batch_size": 100})
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    for batch, secs in enumerate([50.0, 2.0, 2.0]):
        callback.on_train_batch_begin(batch)
        clock.secs += secs
        callback.on_train_batch_end(batch, None)
    callback.on_test_begin()
    clock.secs += 6
    callback.on_test_end()
    callback.on_epoch_end(0, {"loss": float("nan")})
    records = read_records(run_dir.metrics_file)
    assert [{name: value for name, value in record.items() if name != "memory_mb"} for record in records] == [
        {"epoch": 0, "step": 17, "wall_secs": 60.0, "examples_per_sec": 50.0, "loss": "NaN"}
    ]


def read_steps(folder):
    """Where `epoch_loss` has points, each as often as it is there."""
    found = []
    for path in sorted(folder.glob("events*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            found += [event.step for value in event.summary.value if value.tag == "epoch_loss"]
    return found


def read_scalars(folder):
    found = {}
    for path in folder.glob("events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    return found


def test_tensorboard_scalars_are_what_keras_writes(run_dir, tmp_path):
    ours, keras_own = run_dir.tensorboard_dir, tmp_path / "keras"
    fit(
        build_model(),
        [TensorBoardScalars(run_dir=run_dir), keras.callbacks.TensorBoard(str(keras_own), write_graph=False)],
        epochs=2,
    )
    assert {("epoch_loss", 0), ("epoch_mae", 1)} <= read_scalars(ours / "train").keys()
    assert read_scalars(ours / "validation").keys() == {
        ("epoch_loss", 0),
        ("epoch_loss", 1),
        ("epoch_mae", 0),
        ("epoch_mae", 1),
    }
    for split in ("train", "validation"):
        theirs = read_scalars(keras_own / split)
        for key, value in read_scalars(ours / split).items():
            assert theirs[key] == pytest.approx(value, rel=1e-6)


def test_tensorboard_scalars_go_on_after_an_aborted_run(run_dir):
    """Without a double point, though the checkpoint is older than the last, and one was cut short."""

    def abort_in_epoch_3(epoch, logs):
        if epoch == 3:
            raise KeyboardInterrupt

    model = build_model()
    aborting = keras.callbacks.LambdaCallback(on_epoch_end=abort_in_epoch_3)
    with pytest.raises(KeyboardInterrupt):
        fit(model, [TensorBoardScalars(run_dir=run_dir), aborting], epochs=6)
    assert read_steps(run_dir.tensorboard_dir / "train") == [0, 1, 2, 3]
    (path,) = (run_dir.tensorboard_dir / "train").glob("events*")
    path.write_bytes(path.read_bytes()[:-5])
    fit(model, [TensorBoardScalars(run_dir=run_dir)], epochs=6, initial_epoch=2)
    for split in ("train", "validation"):
        assert read_steps(run_dir.tensorboard_dir / split) == [0, 1, 2, 3, 4, 5]


def test_line_that_cannot_be_written_comes_with_the_next_one(run_dir, caplog):
    path, away = run_dir.metrics_file, run_dir.path / "away"

    def block(epoch, logs):
        if epoch == 1:
            path.rename(away)
            path.mkdir()
        if epoch == 3:
            path.rmdir()
            away.rename(path)

    blocking = keras.callbacks.LambdaCallback(on_epoch_end=block)
    with caplog.at_level(logging.WARNING):
        fit(build_model(), [blocking, MetricsFile(run_dir=run_dir)], epochs=5)
    assert caplog.text.count(f"{path} could not be written (Is a directory); training goes on") == 2
    assert [line["epoch"] for line in read_records(run_dir.metrics_file)] == [0, 1, 2, 3, 4]


def test_config_is_the_folders_once_training_goes_on(run_dir):
    first = RunConfig(recipe="r", global_batch_size=4, epochs=2, run_dir=str(run_dir.path))
    run_dir.write_config(first)
    longer = dataclasses.replace(first, epochs=3, resume=True)
    callback = ConfigFile(run_dir=run_dir, config=longer)
    fit(build_model(), [callback], epochs=3, initial_epoch=3)
    assert run_dir.read_config() == first
    fit(build_model(), [callback], epochs=3, initial_epoch=2)
    assert run_dir.read_config() == longer
    run_dir.config_file.unlink()
    fit(build_model(), [callback], epochs=4, initial_epoch=3)
    assert run_dir.read_config() == longer


def test_tensorboard_scalars_work_inside_a_strategy_scope(run_dir):
    callback = TensorBoardScalars(run_dir=run_dir)
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        callback.on_epoch_end(0, {"loss": tf.constant(0.5), "val_loss": float("nan")})
        callback.on_train_end()
    assert read_scalars(run_dir.tensorboard_dir / "train") == {("epoch_loss", 0): 0.5}


class Scores(keras.callbacks.Callback):
    """Says how good each epoch was, the second best; or ends the run at one's end."""

    def __init__(self, die_in):
        super().__init__()
        self.die_in = die_in

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.die_in:
            raise KeyboardInterrupt
        logs["score"] = {0: 3.0, 1: 1.0}.get(epoch, 2.0)


def fit_with_patience(folder, *, die_in=None):
    run = tfdist.initialize(strategy="one_device", seed=0)
    model = build_model()
    stopping = keras.callbacks.EarlyStopping("score", mode="min", patience=3, restore_best_weights=True)
    x = np.linspace(0, 1, 48, dtype="float32").reshape(16, 3)
    history = run.fit(
        model,
        (x, x[:, :1]),
        batch_size=8,
        epochs=8,
        verbose=0,
        callbacks=[Scores(die_in), stopping],
        checkpoints=tfdist.Checkpoints(directory=folder),
    )
    weights = [weight.tolist() for weight in model.get_weights()]
    return history.epoch, stopping.best, stopping.best_epoch, stopping.wait, weights


def test_early_stopping_of_a_resumed_run_is_that_of_the_uninterrupted(tmp_path):
    """It knows the best epoch, its weights, and how long that is ago."""
    wanted = fit_with_patience(tmp_path / "whole")
    assert wanted[:4] == ([0, 1, 2, 3, 4], 1.0, 1, 3)
    with pytest.raises(KeyboardInterrupt):
        fit_with_patience(tmp_path / "run", die_in=3)
    assert fit_with_patience(tmp_path / "run") == wanted


def test_keep_best_keeps_what_keras_calls_better(run_dir):
    model = build_model()
    fit(model, [])  # or it has no metrics yet
    keep = KeepBest(run_dir=run_dir, metric="val_mae")
    keep.set_model(model)
    for epoch, value in enumerate((0.5, 0.7, 0.2, 0.3)):
        model.set_weights([np.full((3, 1), value), np.zeros(1)])
        keep.on_epoch_end(epoch, {"loss": 1.0, "val_mae": value})
    assert read_object(run_dir.best_file) == {"metric": "val_mae", "value": 0.2, "epoch": 2}
    np.testing.assert_allclose(keras.models.load_model(run_dir.best_model_file).get_weights()[0], 0.2)
    # Another process goes on: what was better than now stays.
    again = KeepBest(run_dir=run_dir, metric="val_mae")
    again.set_model(model)
    again.on_epoch_end(4, {"val_mae": 0.25})
    assert read_object(run_dir.best_file)["epoch"] == 2
    again.on_epoch_end(5, {"val_mae": 0.1})
    assert read_object(run_dir.best_file)["epoch"] == 5
    assert sorted(path.name for path in run_dir.path.iterdir()) == ["best.json", "best.keras"]


def test_keep_best_of_a_number_that_is_not_there_names_those_that_are(run_dir):
    keep = KeepBest(run_dir=run_dir, metric="val_acuracy")
    keep.set_model(build_model())
    keep.on_epoch_end(0, {"loss": 1.0})  # not validated
    with pytest.raises(tfdist.ConfigError, match="choose one of loss, val_accuracy"):
        keep.on_epoch_end(1, {"loss": 1.0, "val_accuracy": 0.5})


def test_keep_best_is_told_what_is_better_of_a_metric_of_ones_own(run_dir):
    with pytest.raises(tfdist.ConfigError, match="max:NAME or min:NAME"):
        KeepBest(run_dir=run_dir, metric="most:val_f1")
    model = build_model()
    unknown, told = (KeepBest(run_dir=run_dir, metric=metric) for metric in ("val_f1", "max:val_f1"))
    unknown.set_model(model)
    with pytest.raises(tfdist.ConfigError, match="say max:val_f1 or min:val_f1"):
        unknown.on_epoch_end(0, {"val_f1": 0.5})
    told.set_model(model)
    for epoch, value in enumerate((0.5, 0.7, 0.6)):
        told.on_epoch_end(epoch, {"val_f1": value})
    assert read_object(run_dir.best_file) == {"metric": "val_f1", "value": 0.7, "epoch": 1}
