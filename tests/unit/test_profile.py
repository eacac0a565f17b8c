"""A profile of the steps asked for, in TensorBoard's own format."""

import keras
import numpy as np

from tfdist.training.monitoring.profile import ProfileSteps


def fit(callback, epochs=2):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    data = np.ones((12, 2), "float32"), np.ones((12, 1), "float32")
    model.fit(*data, batch_size=4, epochs=epochs, verbose=0, callbacks=[callback])


def test_profile_is_written_across_epochs(tmp_path):
    fit(ProfileSteps(log_dir=tmp_path, first=3, last=4))
    found = list(tmp_path.rglob("*.xplane.pb"))
    assert len(found) == 1
    assert found[0].stat().st_size > 0


def test_profile_ends_with_the_fit(tmp_path):
    fit(ProfileSteps(log_dir=tmp_path, first=6, last=60))
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_steps_that_do_not_come_are_not_profiled(tmp_path):
    fit(ProfileSteps(log_dir=tmp_path, first=7, last=9))
    assert not list(tmp_path.rglob("*.xplane.pb"))
