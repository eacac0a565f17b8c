import socket
import threading

import pytest

from tfdist.cluster.ports import (
    PortReservation,
    check_grpc_server,
    check_port_free,
    check_reachable,
    open_listener,
)
from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import ClusterError


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


def test_task_of_a_loopback_cluster_listens_there_alone():
    with PortReservation(1) as reservation, open_listener(cluster_on(*reservation.ports)) as listener:
        assert listener.getsockname() == ("127.0.0.1", reservation.ports[0])


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


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request", "does not speak gRPC"),
        (b"", "does not speak gRPC"),
        (bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), None),
    ],
)
def test_grpc_server_is_told_by_its_first_word(answer, reason):
    """Settings, frame type 4 of RFC 9113; whoever closes or says something else is none."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        found = check_grpc_server(f"127.0.0.1:{server.getsockname()[1]}", timeout_secs=0)
        thread.join()
    assert found == reason if reason is None else reason in found


def test_grpc_server_that_says_nothing_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as server, PortReservation(1) as dead:
        silent = f"127.0.0.1:{server.getsockname()[1]}"
        assert check_grpc_server(silent, timeout_secs=0.1) == "timed out"
        assert check_grpc_server(f"127.0.0.1:{dead.ports[0]}", timeout_secs=0.1) == "Connection refused"
