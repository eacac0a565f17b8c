"""The model that a run leaves is whole, whoever reads it meanwhile and whatever stops its writing."""

import os

import keras
import numpy as np
import pytest

import tfdist


def make_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def test_who_reads_the_model_while_it_is_replaced_reads_the_old_one(tmp_path):
    run = tfdist.initialize(strategy="one_device")
    model, path = make_model(), tmp_path / "model.keras"
    run.save(model, path)
    content = path.read_bytes()
    with open(path, "rb") as reader:
        model.layers[0].kernel.assign(np.ones((3, 2)))
        run.save(model, str(path))
        assert reader.read() == content != path.read_bytes()
    assert os.listdir(tmp_path) == ["model.keras"]
    np.testing.assert_array_equal(keras.saving.load_model(path).layers[0].kernel, np.ones((3, 2)))


def test_save_that_is_stopped_leaves_what_was_there(tmp_path, monkeypatch):
    run = tfdist.initialize(strategy="one_device")
    model, path = make_model(), tmp_path / "model.keras"
    run.save(model, path)
    content = path.read_bytes()

    def stop(self, file):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", stop)
    with pytest.raises(OSError, match="No space left"):
        run.save(model, path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["model.keras"]
