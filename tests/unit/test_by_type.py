"""Tensors of several types that are reduced together come back in their order."""

import tensorflow as tf

from tfdist.collectives import reduce_all


class Doubling:
    """What two replicas with the same values would do."""

    num_replicas_in_sync = 2

    def all_reduce(self, op, tensors):
        assert op == tf.distribute.ReduceOp.SUM
        assert len({tensor.dtype for tensor in tensors}) == 1, "TensorFlow crashes on mixed types"
        return [2 * tensor for tensor in tensors]


def test_mixed_types_keep_their_order():
    values = [tf.constant(1.0), tf.constant(2, tf.int64), tf.constant(3.0), tf.constant(4, tf.int64)]
    found = reduce_all(Doubling(), tf.distribute.ReduceOp.SUM, values)
    assert [value.numpy() for value in found] == [2.0, 4, 6.0, 8]
    assert [value.dtype for value in found] == [value.dtype for value in values]
