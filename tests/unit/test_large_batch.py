"""What changes with the batch: the rate by its rules, LARS by its paper's algorithm."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist.commands.flags import build_config, parse_flags, resolve_run
from tfdist.errors import ConfigError
from tfdist.optimizers import LARS, build_optimizer, rate_factor
from tfdist.recipe import load_recipe

DIGITS = load_recipe("digits_cnn")


@pytest.mark.parametrize(
    ("scaling", "size", "base", "factor"),
    [("linear", 1024, 256, 4.0), ("sqrt", 1024, 256, 2.0), ("linear", 64, 256, 0.25), ("SQRT", 7, 7, 1.0)],
)
def test_rate_factor_follows_its_rule(scaling, size, base, factor):
    assert rate_factor(scaling, global_batch_size=size, base_batch_size=base) == factor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": "squared"}, "no scaling of the learning rate 'squared'. Choose one of linear, sqrt"),
        ({"scaling": "liner"}, "Did you mean 'linear'"),
        ({"base_batch_size": 0}, "base_batch_size=0: it must be 1 or more"),
        ({"global_batch_size": -1}, "global_batch_size=-1: it must be 1 or more"),
    ],
)
def test_rate_factor_refuses(changes, message):
    given = {"scaling": "linear", "global_batch_size": 8, "base_batch_size": 8} | changes
    with pytest.raises(ConfigError, match=message):
        rate_factor(given.pop("scaling"), **given)


def test_rate_factor_multiplies_the_rate_given_and_the_optimizers_own():
    assert float(build_optimizer("sgd", rate_factor=4.0).learning_rate) == pytest.approx(0.4)
    assert float(build_optimizer("sgd", learning_rate=0.5, rate_factor=4.0).learning_rate) == 2.0
    warm = build_optimizer("sgd", learning_rate=0.5, rate_factor=4.0, warmup_steps=3)
    assert float(warm.learning_rate) == 0.5  # a quarter, at the first of three steps


@pytest.mark.parametrize(("given", "base"), [([], DIGITS.global_batch_size), (["--base_batch_size=32"], 32)])
def test_base_batch_size_is_the_recipes_unless_given(given, base):
    flags = parse_flags(["--optimizer=sgd", "--lr_scaling=linear", "--global_batch_size=256", *given])
    config = build_config(resolve_run(flags, None, {}), DIGITS)
    assert (config.lr_scaling, config.base_batch_size) == ("linear", base)


def test_lars_is_its_papers_algorithm():
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(4, 3)), rng.normal(size=3)
    variables = [keras.Variable(w, dtype="float32"), keras.Variable(b, dtype="float32")]
    optimizer = LARS(learning_rate=2.0, momentum=0.8, trust_coefficient=0.01, weight_decay=0.1)
    velocity, bias_velocity = np.zeros_like(w), np.zeros_like(b)
    for _ in range(4):
        g, h = rng.normal(size=w.shape), rng.normal(size=b.shape)
        optimizer.apply([tf.constant(g, tf.float32), tf.constant(h, tf.float32)], variables)
        local_rate = 0.01 * np.linalg.norm(w) / (np.linalg.norm(g) + 0.1 * np.linalg.norm(w))
        velocity = 0.8 * velocity + 2.0 * local_rate * (g + 0.1 * w)
        w = w - velocity
        bias_velocity = 0.8 * bias_velocity + 2.0 * h
        b = b - bias_velocity
    np.testing.assert_allclose(variables[0].numpy(), w, rtol=1e-5)
    np.testing.assert_allclose(variables[1].numpy(), b, rtol=1e-5)


def test_lars_moves_from_zero_and_stays_where_there_is_no_gradient():
    zero, still = keras.Variable(np.zeros((2, 2), np.float32)), keras.Variable(np.ones((2, 2), np.float32))
    optimizer = LARS(learning_rate=0.5, momentum=0.0, weight_decay=0.1)
    optimizer.apply([tf.ones((2, 2)), tf.zeros((2, 2))], [zero, still])
    np.testing.assert_array_equal(zero.numpy(), np.full((2, 2), -0.5))
    np.testing.assert_array_equal(still.numpy(), np.ones((2, 2)))


def test_lars_takes_rows_of_a_table_as_the_dense_gradient():
    rows = tf.IndexedSlices(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([2, 2]), tf.constant([3, 2]))
    found = []
    for gradient in (rows, tf.constant([[0.0, 0.0], [0.0, 0.0], [4.0, 6.0]])):
        table = keras.Variable(np.ones((3, 2), np.float32))
        LARS().apply([gradient], [table])
        found.append(table.numpy())
    np.testing.assert_array_equal(*found)


def test_lars_is_saved_and_loaded():
    optimizer = build_optimizer("lars", learning_rate=3.0, momentum=0.5, weight_decay=1e-4)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is LARS
    assert again.get_config() == optimizer.get_config()
    assert (again.gradient_decay, again.momentum) == (1e-4, 0.5)


def test_lars_refuses_a_trust_that_moves_nothing():
    with pytest.raises(ConfigError, match="trust_coefficient=0: it must be greater than 0"):
        LARS(trust_coefficient=0)
