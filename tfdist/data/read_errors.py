"""What `tf.data` says of data that cannot be read, in one line with the remedy."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from tfdist.errors import ConfigError

_SHARED_CACHE = (
    "another process writes the same file of dataset.cache(), or was killed while it did, as {1} says: give each "
    "worker a file of its own, as by cache(f'PATH-{{run.task.index}}'), and remove what no process writes any more."
)
_FAULTS = {
    r"expected to contain (\d+) elements but contained only (\d+)": (
        "the data source ended after {2} examples, and promised {1}: the order of an epoch follows from its length; "
        "fix the source, or start another run on what it holds now."
    ),
    r"Cannot batch tensors with different shapes.*First element had shape (\[.*?\]).*had shape (\[.*?\])": (
        "examples of the stream have different shapes, {1} and {2}, and so make no batch: bring them to one where they "
        "are read, as by dataset.map(lambda x, y: (tf.pad(x, [[0, LENGTH - tf.shape(x)[0]]]), y))."
    ),
    r"concurrent caching iterator running.*?'(.*?)'": _SHARED_CACHE,
    # Whoever was done first has taken its parts together.
    r"(\S+)\.data-\d{5}-of-\d{5}\S*; No such file": _SHARED_CACHE,
}


@contextlib.contextmanager
def readable_faults() -> Iterator[None]:
    """Raises a `ConfigError` in place of TensorFlow's errors about data."""
    try:
        yield
    except tf.errors.OpError as error:
        for pattern, text in _FAULTS.items():
            if found := re.search(pattern, error.message, re.DOTALL):
                raise ConfigError(text.format(None, *found.groups())) from error
        raise
