"""Iterators: nobody waits for their end."""

import time

import tensorflow as tf

from tfdist.data import open_iterator, untuned

AGE_SECS = 0.15


def end_secs(open_one):
    """Returns how long it takes to let go of some iterators, each of which has been read for a while."""
    found = []
    for _ in range(12):
        iterator = open_one()
        end = time.monotonic() + AGE_SECS
        while time.monotonic() < end:
            next(iterator)
            time.sleep(0.005)
        start = time.monotonic()
        del iterator
        found.append(time.monotonic() - start)
    return found


def tuned():
    return tf.data.Dataset.range(10**9).map(lambda x: x + 1, num_parallel_calls=tf.data.AUTOTUNE)


def test_end_of_a_tuned_pipeline_holds_nobody_up():
    """TensorFlow itself waits here one time in four, for about as long as the pipeline has lived."""
    assert max(end_secs(lambda: open_iterator(tuned()))) < AGE_SECS / 4


def test_own_pipelines_are_not_tuned():
    assert not untuned(tuned()).options().autotune.enabled
