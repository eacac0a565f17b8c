"""Iterators: nobody waits for their end."""

import subprocess
import sys
import time

import pytest
import tensorflow as tf
from tiers import rarely

from tfdist.data.iterators import open_iterator, untuned

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


ENDS = """
import atexit, threading, time

def show():  # behind all that was registered later
    time.sleep(0.15)  # time for one more to begin
    print("in TensorFlow:", Held.begun - Held.done)

atexit.register(show)

import tensorflow as tf
from tfdist.data import iterators

class Held(list):
    begun = done = 0

    def clear(self):
        Held.begun += 1
        time.sleep(0.2)
        Held.done += 1

for i in range(20):
    iterators._ended().put(Held())
time.sleep({secs})
"""


@pytest.mark.parametrize("secs", rarely(("0.1", "0.0", "0.2"), "0.0", "0.2"))
def test_nothing_is_taken_down_while_the_process_ends(secs):
    """A thread that came back from TensorFlow while Python ended has aborted processes with all their work done."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS.replace("{secs}", secs)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "in TensorFlow: 0" in done.stdout
