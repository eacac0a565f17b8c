"""Iterators over datasets whose end holds nobody up."""

from __future__ import annotations

import atexit
import functools
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_DELAY_SECS = 0.1
# How long a process that ends waits for those that are being taken down.
_END_SECS = 1.0


def open_iterator(dataset: tf.data.Dataset) -> Iterator[Any]:
    """Returns an iterator that a thread of its own takes down.

    TensorFlow's end of an iterator waits for the thread that tunes the pipeline, which one time in four goes back to
    sleep when it is woken for this: for as long as the pipeline has lived, or a minute.
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

    lock = threading.Lock()
    at_work: set[threading.Thread] = set()
    is_ending = False

    def clear(held: list[Any]) -> None:
        with lock:
            is_late = is_ending
            if not is_late:
                at_work.add(threading.current_thread())
        if is_late:
            threading.Event().wait()  # for ever: it is held until the process is gone
        held.clear()
        at_work.discard(threading.current_thread())

    def take_down() -> None:
        while True:
            # By then the iterator has let go itself, and what is held here is the last reference.
            timer = threading.Timer(_DELAY_SECS, clear, [ended.get()])
            timer.daemon = True
            timer.start()

    def end() -> None:
        # A thread that comes back from TensorFlow while Python ends aborts the process, with all its work done.
        nonlocal is_ending
        with lock:
            is_ending = True
        deadline = time.monotonic() + _END_SECS
        for thread in list(at_work):
            thread.join(max(0.0, deadline - time.monotonic()))

    threading.Thread(target=take_down, name="tfdist-iterators", daemon=True).start()
    atexit.register(end)
    return ended
