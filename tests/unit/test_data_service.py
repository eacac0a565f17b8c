"""What a tf.data service is refused for, before anything is started."""

import numpy as np
import pytest
import tensorflow as tf

from tfdist.cluster.spec import Cluster, Task
from tfdist.data import build_source
from tfdist.data.service import DataService
from tfdist.data.sources.source import ServedSource
from tfdist.errors import ConfigError


class TwoReaders:
    """A loop of two processes, as far as can be asked before they meet."""

    num_readers = 2


class Numbered:
    """Examples by number."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return np.float32(index)


def cluster_of(*hosts):
    return Cluster(addresses={"worker": tuple(f"{host}:1" for host in hosts)}, task=Task("worker", 0))


def test_local_service_serves_one_machine():
    """Its port is closed to the others, which would wait for it."""
    with pytest.raises(ConfigError, match="chief's machine only.*--data_service=HOST:PORT"):
        DataService("local", loop=TwoReaders(), cluster=cluster_of("10.0.0.1", "10.0.0.2"))
    service = DataService("local", loop=TwoReaders(), cluster=cluster_of("127.0.0.1", "localhost"))
    source = service.share(build_source(tf.data.Dataset.range(9)))
    assert isinstance(source, ServedSource) and source.num_readers == 2


def test_what_is_no_stream_is_refused():
    """Also examples that are read by number."""
    service = DataService("local", loop=TwoReaders(), cluster=cluster_of("127.0.0.1", "localhost"))
    for data in (np.arange(9.0), Numbered(), lambda context: tf.data.Dataset.range(9)):
        with pytest.raises(ConfigError, match="data_service='local' prepares a tf.data.Dataset"):
            service.share(build_source(data))
