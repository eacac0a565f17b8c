import socket

import pytest

from tfdist.cluster import Cluster, Task
from tfdist.errors import ClusterError
from tfdist.ports import PortReservation, check_port_free, check_reachable


def cluster_on(*ports, me=0):
    return Cluster(addresses={"worker": tuple(f"127.0.0.1:{p}" for p in ports)}, task=Task("worker", me))


def test_reserved_port_goes_to_nobody_who_asks_for_a_free_one():
    with PortReservation(200) as mine, PortReservation(200) as others:
        taken = set(mine.ports)
        assert len(taken) == 200 and not taken & set(others.ports)
        with socket.create_server(("127.0.0.1", 0)) as server:
            assert server.getsockname()[1] not in taken


def test_reserved_port_serves_one_server_and_no_second():
    with PortReservation(1) as reservation:
        address = ("127.0.0.1", reservation.ports[0])
        check_port_free(cluster_on(*reservation.ports))  # a task's own check passes under its launcher's hold
        with socket.create_server(address):
            with pytest.raises(OSError, match="in use"):
                socket.create_server(address)
            socket.create_connection(address, timeout=5).close()
        with socket.create_server(address):  # and again: a task that is started once more
            pass


def test_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port {port} of worker:0 .*in use"):
            check_port_free(cluster_on(port))


def test_local_cluster_and_evaluator_have_no_port_to_check():
    check_port_free(Cluster())
    check_port_free(Cluster(addresses={"worker": ("127.0.0.1:1",)}, task=Task("evaluator", 0)))


def test_reachable_names_who_is_missing():
    with socket.create_server(("127.0.0.1", 0)) as server, PortReservation(2) as dead:
        up = server.getsockname()[1]
        check_reachable(cluster_on(dead.ports[0], up), timeout_secs=5)  # itself is not asked
        with pytest.raises(
            ClusterError, match=rf"worker:2 at 127.0.0.1:{dead.ports[1]} \(Connection refused\)"
        ) as e:
            check_reachable(cluster_on(dead.ports[0], up, dead.ports[1]), timeout_secs=0.1)
        assert "worker:1" not in str(e.value)
