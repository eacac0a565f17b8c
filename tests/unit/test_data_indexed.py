"""Objects that read examples by number take part in the same order as arrays."""

import numpy as np
import pytest
import tensorflow as tf
from test_data_batches import read_epoch

from tfdist.data import IndexedSource, build_source, tfds_split
from tfdist.data.sources.digits import Digits
from tfdist.errors import ConfigError


class Squares:
    """Examples made when they are asked for, as a PyTorch dataset does."""

    def __init__(self, count):
        self.count = count
        self.asked = []

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        self.asked.append(place)
        return {"a": np.float64(place), "b": np.full((2, 3), place % 256, np.uint8)}, place


class Several(Squares):
    """Reads several at once."""

    def __getitems__(self, places):
        return [Squares.__getitem__(self, place) for place in places]

    def __getitem__(self, place):
        assert place == 0, "one by one, where several can be read at once"
        return super().__getitem__(place)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The digits in TFDS's array_record format: their builder."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    builder = Digits(data_dir=tmp_path_factory.mktemp("records"), file_format="array_record")
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize("kind", [Squares, Several])
@pytest.mark.parametrize("shuffle", [True, pytest.param(False, marks=pytest.mark.ci)])
def test_order_is_that_of_arrays(kind, shuffle):
    """For any number of replicas, from any step on, over several passes."""

    class Numbers(kind):
        def __getitem__(self, place):
            return np.float32(super().__getitem__(place)[1])

        if kind is Several:

            def __getitems__(self, places):
                return [np.float32(y) for _, y in super().__getitems__(places)]

    arrays = build_source((np.arange(37, dtype=np.float32),))
    indexed = build_source(Numbers(37))
    assert isinstance(indexed, IndexedSource)
    for replicas, first, steps in ((1, 0, None), (3, 2, None), (2, 0, 3)):
        options = {"num_replicas": replicas, "batch": 8, "first_step": first, "steps": steps}
        wanted = read_epoch(arrays, shuffle=shuffle, **options)
        for mine, theirs in zip(read_epoch(indexed, shuffle=shuffle, **options), wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_seek_reads_nothing_before():
    """Only what is asked for, from the step on."""
    data = Squares(10_000_000)
    source = build_source(data)
    data.asked.clear()
    read = source.take(tf.constant([9_999_999, 3], tf.int64))
    assert data.asked == [9_999_999, 3]
    np.testing.assert_array_equal(read[1], [9_999_999, 3])


def test_examples_keep_their_form():
    """Nests, dtypes, one empty part, class weights; float64 becomes Keras's float32."""
    source = build_source(Several(6), class_weight={3: 5.0})
    x, y, w = source.sample_batch(4)
    assert (x["a"].dtype, x["b"].dtype, y.dtype) == (tf.float32, tf.uint8, tf.int64)
    assert x["b"].shape == (4, 2, 3)
    np.testing.assert_array_equal(w, [1, 1, 1, 5])
    x, y, _ = source.take(tf.zeros([0], tf.int64))
    assert x["b"].shape == (0, 2, 3) and y.shape == (0,)


def test_source_that_shrinks_is_refused():
    """Before a step of the next epoch, with both sizes."""
    data = Squares(20)
    source = build_source(data)
    data.count = 15
    with pytest.raises(ConfigError, match="holds 15 examples, and held 20") as error:
        read_epoch(source, num_replicas=1, batch=5)
    assert "\n" not in str(error.value)


def test_unequal_example_is_named():
    """Its number and both shapes; none is stretched to fit."""

    class Ragged(Squares):
        def __getitem__(self, place):
            return np.zeros(1 if place == 7 else 3, np.float32)

    with pytest.raises(ValueError, match=r"example 7 has shape \(1,\), the first example \(3,\)"):
        build_source(Ragged(9)).take(tf.range(9, dtype=tf.int64))
    with pytest.raises(ValueError, match="example 7"):
        build_source(Ragged(9)).take(tf.constant([7], tf.int64))


def test_nothing_is_refused():
    with pytest.raises(ConfigError, match="no examples"):
        build_source(Squares(0))


def test_array_records_come_through_tfds(records):
    """Any place of a split, the supervised pair or the features asked for, mapped; a bare data source too."""
    from sklearn.datasets import load_digits

    part = build_source(tfds_split(records, "train[:50%]"))
    assert isinstance(part, IndexedSource) and part.num_examples == 718
    images, labels = part.sample_batch(718)
    known = {
        (i.astype(np.uint8).tobytes(), int(n)) for i, n in zip(*load_digits(return_X_y=True), strict=True)
    }
    found = {(i.tobytes(), int(n)) for i, n in zip(images.numpy(), labels.numpy(), strict=True)}
    assert found <= known and len(found) > 700
    bare = build_source(records.as_data_source(split="train[:50%]"))
    np.testing.assert_array_equal(bare.sample_batch(718)[0], images)

    def double(label, image):
        return tf.cast(image, tf.float32) * 2, label

    mapped = build_source(tfds_split(records, "train[:50%]", keys=("label", "image"), map_example=double))
    np.testing.assert_array_equal(mapped.sample_batch(5)[0], images[:5].numpy() * 2.0)
    batches = read_epoch(mapped, num_replicas=2, batch=100)
    assert [b.shape for b in batches] == [(100, 8, 8, 1)] * 7 + [(18, 8, 8, 1)]
    with pytest.raises(ConfigError, match="no_such"):
        build_source(tfds_split(records, "no_such"))
