"""Iterators over datasets whose end holds nobody up."""

from __future__ import annotations

import functools
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_DELAY_SECS = 0.1


def open_iterator(dataset: tf.data.Dataset) -> Iterator[Any]:
    """Returns an iterator that a thread of its own takes down.

    TensorFlow's end of an iterator waits for the thread that tunes the pipeline, which one time in four goes back to
    sleep when it is woken for this: for as long as the pipeline has lived, or a minute.

    Args:
        dataset: What it reads.
    """
    iterator = iter(dataset)
    held = tf.nest.flatten(iterator, expand_composites=True)
    taken_down = weakref.finalize(iterator, _ended().put, held)
    taken_down.atexit = False
    return iterator


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns a dataset without that thread; its degrees of parallelism must be given."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


@functools.cache
def _ended() -> queue.SimpleQueue[Any]:
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def take_down() -> None:
        while True:
            # By then the iterator has let go itself, and what is held here is the last reference.
            timer = threading.Timer(_DELAY_SECS, ended.get().clear)
            timer.daemon = True
            timer.start()

    threading.Thread(target=take_down, name="tfdist-iterators", daemon=True).start()
    return ended
