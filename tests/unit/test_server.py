"""When a server that nobody ends knows that its chief has ended."""

import socket
import threading

import pytest

from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import PEER_LOST_CODE, ClusterError
from tfdist.runtime import server


@pytest.fixture
def chief():
    """Somebody who listens, and the cluster of which it is the chief."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        addresses = {"chief": (address,), "worker": ("127.0.0.1:1",), "ps": ("127.0.0.1:2",)}
        yield listening, Cluster(addresses=addresses, task=Task("ps", 0))


def wait(cluster, told, **options):
    """Waits in a thread; returns what there is when it has ended, and the thread."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(server._wait_for_end(cluster, told, **options)), daemon=True
    )
    thread.start()
    return found, thread


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server, "_CHIEF_POLL_SECS", 0.05)


def test_server_ends_well_once_the_chiefs_host_says_that_it_is_gone(chief):
    listening, cluster = chief
    found, thread = wait(cluster, threading.Event(), start_timeout_secs=60.0)
    thread.join(0.5)
    assert thread.is_alive()
    listening.close()
    thread.join(10.0)
    assert found == [0]


def test_server_outlasts_a_chief_that_is_out_of_reach_for_a_while(chief, monkeypatch):
    """The network is down, and up again; a real one cannot be taken down here, so nothing is heard of the host."""
    _, cluster = chief
    down = threading.Event()
    ask = server.is_refused
    monkeypatch.setattr(server, "is_refused", lambda address: None if down.is_set() else ask(address))
    told = threading.Event()
    found, thread = wait(cluster, told, start_timeout_secs=60.0)
    thread.join(0.3)
    down.set()
    thread.join(1.0)
    assert thread.is_alive()
    down.clear()
    thread.join(0.3)
    told.set()
    thread.join(10.0)
    assert found == [None]


def test_chief_that_stays_out_of_reach_is_no_success(chief, monkeypatch):
    _, cluster = chief
    monkeypatch.setattr(server, "_CHIEF_LOST_SECS", 0.2)
    answers = iter([False])
    monkeypatch.setattr(server, "is_refused", lambda address: next(answers, None))
    assert server._wait_for_end(cluster, threading.Event(), 60.0) == PEER_LOST_CODE


def test_chief_that_never_comes_is_named(chief):
    listening, cluster = chief
    listening.close()
    with pytest.raises(ClusterError, match=r"no answer within .* from chief:0"):
        server._wait_for_end(cluster, threading.Event(), 0.1)
