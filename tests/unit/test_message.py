import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from tfdist.training.ps.message import PackedFunction, pack_batches, unpack_batch


def test_results_are_one_tensor_and_the_same_bits():
    """Of every type a metric or a check may have, NaN and the largest numbers among them."""
    wanted = {
        "floats": np.array([[1.5, np.nan], [-np.inf, 2**-149]], np.float32),
        "double": np.float64(1 / 3),
        "half": np.array([1.5], ml_dtypes.bfloat16),
        "counts": (np.array([2**63 - 1], np.int64), np.int32(-7)),
        "flags": [np.array([True, False]), np.zeros((0, 3), np.uint8)],
    }
    message = PackedFunction(lambda: tf.nest.map_structure(tf.constant, wanted))
    sent = message.function()
    assert sent.dtype == tf.uint8
    found = message.unpack(sent.numpy())
    tf.nest.assert_same_structure(found, wanted)
    for got, want in zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("result", ["text", "open"])
def test_what_has_no_fixed_bytes_is_sent_as_it_is(result):
    message = PackedFunction(lambda x: {"y": tf.constant("text") if result == "text" else x})
    function = message.function.get_concrete_function(tf.TensorSpec([None], tf.float32))
    assert function.structured_outputs["y"].dtype == (tf.string if result == "text" else tf.float32)
    assert message.unpack({"y": 1}) == {"y": 1}


def test_equal_batches_are_stacked():
    batches = [({"x": tf.fill([2, 3], n)}, tf.fill([2], -n)) for n in range(3)]
    packed = pack_batches(batches)
    assert len(tf.nest.flatten(packed)) == 2
    for place, batch in enumerate(batches):
        found = unpack_batch(packed, place)
        tf.nest.map_structure(np.testing.assert_array_equal, found, batch)


@pytest.mark.parametrize("count", [1, 2])
def test_ragged_batches_stay_apart(count):
    batches = [tf.ragged.constant([[1, n], [2]]) for n in range(count)]
    packed = pack_batches(batches)
    for place, batch in enumerate(batches):
        assert unpack_batch(packed, place) is batch


@pytest.mark.parametrize("shapes", [((6, 4), (1, 4)), ((2, 5), (2, 3))])
def test_batches_of_other_shapes_stay_apart(shapes):
    """A pass's short last batch, accumulated with the one before it; sentences of other lengths."""
    batches = [(tf.ones(shape), tf.range(shape[0])) for shape in shapes]
    packed = pack_batches(batches)
    assert [unpack_batch(packed, place)[0].shape for place in (0, 1)] == list(shapes)
