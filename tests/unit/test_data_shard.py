"""A worker's part of a stream."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from tfdist.data import build_source, tfds_split
from tfdist.data.shard import shard_source
from tfdist.data.sources.digits import Digits
from tfdist.data.sources.source import ShardedSource, StreamSource
from tfdist.errors import ConfigError


def parts_of(source, shard, num_workers):
    return [shard_source(source, shard, num_workers=num_workers, index=k) for k in range(num_workers)]


def test_tfds_split_of_enough_files_is_shared_by_files(tmp_path, monkeypatch):
    """By itself, each example once, slices of a split too; with fewer files each worker reads all."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    monkeypatch.setattr("tfdist.data.sources.tfds.IN_MEMORY_BYTES", 0)
    builder = Digits(data_dir=tmp_path)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    for split, num_files in (("train", 4), ("train[:40%]", 2)):
        source = build_source(tfds_split(builder, split), class_weight=dict.fromkeys(range(10), 2.0))
        assert isinstance(source, StreamSource) and source.num_files == num_files
        parts = parts_of(source, "auto", 2)
        assert all(isinstance(part, ShardedSource) for part in parts)
        found = collections.Counter(x.tobytes() for p in parts for x, *_ in p.dataset.as_numpy_iterator())
        assert found == collections.Counter(x.tobytes() for x, *_ in source.dataset.as_numpy_iterator())
        assert parts_of(source, "auto", num_files + 1) == [source] * (num_files + 1)
        with pytest.raises(ConfigError, match=f"{num_files} files cannot be shared by 5 workers"):
            parts_of(source, "file", 5)


def test_what_needs_no_sharing_stays_as_it_is():
    """Arrays, a single worker, and a stream that all shall read."""
    arrays = build_source(np.arange(9.0))
    stream = build_source(tf.data.Dataset.range(9))
    assert parts_of(arrays, "file", 2) == [arrays] * 2
    assert parts_of(stream, "file", 1) == [stream]
    assert parts_of(stream, "off", 2) == parts_of(stream, "auto", 2) == [stream] * 2
    with pytest.raises(ConfigError, match="shard='files'.*auto, file, data, off"):
        parts_of(stream, "files", 2)
