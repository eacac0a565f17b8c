"""However workers share a stream, each example comes once an epoch."""

import numpy as np
import pytest
import sharded
import tensorflow as tf
from worlds import run_world

WORKERS = 2
pytestmark = [pytest.mark.ci, pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of two processes saw of files of 3, 20, 0 and 15 examples: 3 for one worker, 35 for the other."""
    files, out = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("out")
    number = 0
    for place, count in enumerate((3, 20, 0, 15)):
        with tf.io.TFRecordWriter(str(files / f"{place}.tfrecord")) as writer:
            for _ in range(count):
                writer.write(str(number))
                number += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FILES", str(files))
        run_world(sharded.__file__, out, f"multiworker-{WORKERS}")
    found = []
    for path in sorted(out.glob("*.npz")):
        with np.load(path) as stored:
            found.append(dict(stored))
    assert len(found) == WORKERS
    return found


@pytest.mark.parametrize(("way", "steps"), [("file", 9), ("data", 5), ("off", 5)])
def test_each_example_comes_once_an_epoch(seen, way, steps):
    """In training and evaluation, in as many steps as the longest part has batches: none is empty."""
    for process in seen:
        np.testing.assert_array_equal(process[f"{way}/seen"], np.ones([2, sharded.COUNT]))
        np.testing.assert_array_equal(process[f"{way}/evaluated"], np.ones(sharded.COUNT))
        assert process[f"{way}/steps"] == 2 * steps
        np.testing.assert_array_equal(process[f"{way}/weights"], seen[0][f"{way}/weights"])


def test_dropped_remainder_leaves_whole_batches(seen):
    """They end with the worker that ends first: before a step, where it has less than a batch."""
    for process in seen:
        assert process["file_dropped/steps"] == 0
        counts = process["data_dropped/seen"]
        assert counts.max() == 1
        np.testing.assert_array_equal(counts.sum(axis=1), [32, 32])
        assert process["data_dropped/steps"] == 8


def test_steps_go_round_each_workers_own_part(seen):
    """As many steps as asked for, of whole batches where a part has enough."""
    for process in seen:
        assert process["file_steps/steps"] == 6
        assert process["file_steps/seen"][:, 3:23].max() == 1


def test_too_few_files_are_refused_everywhere(seen):
    """With both numbers and the remedy, by each worker alike."""
    for process in seen:
        assert "1 files cannot be shared by 2 workers" in str(process["refused/one_file"])
        assert "--shard=data" in str(process["refused/one_file"])
        assert "reads none" in str(process["refused/no_file"])
