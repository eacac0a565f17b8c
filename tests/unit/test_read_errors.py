"""What TensorFlow says of data that cannot be read becomes one line with the remedy."""

import pytest
import tensorflow as tf

from tfdist.data.read_errors import readable_faults
from tfdist.errors import ConfigError


def cached(path):
    return tf.data.Dataset.range(6).cache(str(path)).repeat(2)


def test_cache_that_another_process_writes_is_named(tmp_path):
    first = iter(cached(tmp_path / "cache"))
    next(first)
    with (
        pytest.raises(ConfigError, match=r"writes the same file of dataset.cache\(\).*cache_0.lockfile"),
        readable_faults(),
    ):
        list(cached(tmp_path / "cache"))
    assert next(first) == 1


def test_cache_that_another_process_has_put_together_is_named(tmp_path):
    """As it does when it was done first: the parts that both have written are gone."""
    iterator = iter(cached(tmp_path / "cache"))
    next(iterator)
    for path in tmp_path.glob("cache_*"):
        path.unlink()
    with pytest.raises(ConfigError, match="give each worker a file of its own"), readable_faults():
        for _ in iterator:
            pass


def test_other_errors_stay(tmp_path):
    with pytest.raises(tf.errors.InvalidArgumentError), readable_faults():
        tf.reshape(tf.zeros([3]), [2])
