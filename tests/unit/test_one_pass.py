"""Adam's update in one pass: Keras's numbers up to rounding, and Keras's own bits where it does not apply."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist.optimizers.one_pass import in_one_pass

LARGE, SMALL = (1024, 256), (8, 4)
KINDS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adam, its rate falling": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), beta_1=0.8, epsilon=1e-5, clipnorm=1.0
    ),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True),
}


def train(optimizer, shape, *, one_pass, steps=5):
    """Returns the weight and its slots after some steps, and the operations that a step was made of."""
    rng = np.random.default_rng(0)
    variable = keras.Variable(rng.normal(size=shape).astype("float32"))
    optimizer.build([variable])
    apply = in_one_pass(optimizer, optimizer.apply) if one_pass else optimizer.apply
    step = tf.function(lambda g: apply([g], [variable]), autograph=False)
    for _ in range(steps):
        step(tf.constant(rng.normal(size=shape), tf.float32))
    kinds = {op.type for op in step.get_concrete_function(tf.zeros(shape)).graph.get_operations()}
    return [variable.numpy(), *(v.numpy() for v in optimizer.variables)], kinds


@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_move_as_in_keras(kind):
    theirs, _ = train(KINDS[kind](), LARGE, one_pass=False)
    ours, operations = train(KINDS[kind](), LARGE, one_pass=True)
    assert "ResourceApplyAdam" in operations
    for own, keras_value in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, keras_value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: keras.optimizers.Adam(0.01), SMALL),
        (lambda: keras.optimizers.Adam(0.01, amsgrad=True), LARGE),
        (lambda: keras.optimizers.Nadam(0.01), LARGE),
    ],
)
def test_others_keep_keras_bits(build, shape):
    theirs, _ = train(build(), shape, one_pass=False)
    ours, operations = train(build(), shape, one_pass=True)
    assert "ResourceApplyAdam" not in operations
    for own, keras_value in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(own, keras_value)


def test_rows_are_keras_business():
    """A row-sparse gradient reaches Keras's own update, which Adam makes dense."""
    variables = [keras.Variable(np.ones(LARGE, "float32")) for _ in range(2)]
    slices = tf.IndexedSlices(tf.ones([2, LARGE[1]]), tf.constant([3, 5]), tf.constant(LARGE))
    for variable, wrap in zip(variables, (lambda o: o.apply, lambda o: in_one_pass(o, o.apply)), strict=True):
        optimizer = keras.optimizers.Adam(0.01)
        optimizer.build([variable])
        wrap(optimizer)([slices], [variable])
    np.testing.assert_array_equal(*(v.numpy() for v in variables))


def test_optimizer_is_as_it_was_afterwards():
    optimizer = keras.optimizers.Adam(0.01)
    train(optimizer, LARGE, one_pass=True, steps=1)
    assert "update_step" not in optimizer.__dict__
