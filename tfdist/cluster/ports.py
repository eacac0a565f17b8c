"""Ports: reserved for local tasks without a race, and checked before a TensorFlow server starts."""

import errno
import os
import socket
import time
from collections.abc import Iterable

from tfdist.cluster.peer_allowlist import admit_only, find_peers
from tfdist.cluster.spec import Cluster, Task, split_address
from tfdist.errors import ClusterError, LaunchError

_RETRY_SECS = 0.2
# What an HTTP/2 client, and so a gRPC one, says first: the preface, and settings that change nothing.
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS = 4


class PortReservation:
    """Free ports of this machine that nobody else is given while the reservation is open.

    Each port is held by a socket that is bound, on all interfaces and with SO_REUSEADDR, but never listens. The
    kernel then gives the port to no other socket that asks for a free one, while a server with SO_REUSEADDR
    (gRPC's, and so TensorFlow's) may still bind that very port and listen on it, and a second one may not. So
    the ports can be held as long as the tasks run, and launchers that start at the same time never collide.

    Args:
        count: How many ports.
        port: The one that is wanted; 0: any.

    Raises:
        LaunchError: If the machine has no free ports left, or the one that is wanted is taken.
    """

    def __init__(self, count: int, *, port: int = 0) -> None:
        self._sockets: list[socket.socket] = []
        try:
            for _ in range(count):
                self._sockets.append(_bind("", port))
        except OSError as error:
            self.close()
            what = f"port {port}" if port else f"{count} ports"
            raise LaunchError(
                f"cannot reserve {what} ({error.strerror}): too few are free; stop other programs"
            ) from error
        self.ports: tuple[int, ...] = tuple(held.getsockname()[1] for held in self._sockets)

    def close(self) -> None:
        """Gives the ports back."""
        for held in self._sockets:
            held.close()

    def __enter__(self) -> "PortReservation":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def check_port_free(cluster: Cluster) -> None:
    """Checks that no other program listens on this task's own port.

    A TensorFlow server that meets a taken port says so in its own process only, and its peers wait for an hour. Local
    clusters have nothing to check.

    Raises:
        ClusterError: If the port is taken, or may not be bound.
    """
    if cluster.task is None or cluster.task not in cluster.tasks:
        return
    address = cluster.address(cluster.task)
    port = split_address(address)[1]
    try:
        _bind("", port).close()
    except OSError as error:
        raise ClusterError(
            f"port {port} of {cluster.task} ({address}) cannot be bound ({error.strerror}): "
            "stop the program that has it, or give the task another port (TFDIST_PORT under Slurm or mpirun)"
        ) from None


def check_reachable(cluster: Cluster, *, timeout_secs: float, tasks: Iterable[Task] | None = None) -> None:
    """Waits until other tasks accept connections.

    Only for tasks that serve before this one starts, as a ps cluster's workers and ps do for the chief; for peers
    that wait for each other there is `meet_peers`. By default all but this process are waited for, all together no
    longer than `timeout_secs`.

    Raises:
        ClusterError: If some do not answer in time; the message names each with its address and the reason.
    """
    waiting = list(tasks) if tasks is not None else [task for task in cluster.tasks if task != cluster.task]
    deadline = time.monotonic() + timeout_secs
    while True:
        reasons: dict[Task, str] = {}
        for task in waiting:
            error = _try_to_connect(cluster.address(task), max(0.1, min(2.0, deadline - time.monotonic())))
            if error is not None:
                reasons[task] = error.strerror or str(error)
        waiting = list(reasons)
        if not waiting:
            return
        if time.monotonic() >= deadline:
            missing = ", ".join(f"{task} at {cluster.address(task)} ({reasons[task]})" for task in waiting)
            raise ClusterError(
                f"no answer within {timeout_secs:g} s from {missing}: start the task, or correct its address"
            )
        time.sleep(min(_RETRY_SECS, max(0.0, deadline - time.monotonic())))


def is_refused(address: str, *, timeout_secs: float = 2.0) -> bool | None:
    """Asks whether somebody listens at an address, `host:port`.

    Returns:
        False if somebody does; True if the host itself says that nobody does; None if nothing was heard of it, as while
        the network is down.
    """
    error = _try_to_connect(address, timeout_secs)
    if error is None:
        return False
    return True if isinstance(error, ConnectionRefusedError) else None


def check_grpc_server(address: str, *, timeout_secs: float) -> str | None:
    """Waits until a gRPC server answers at `host:port`; TensorFlow's own calls would wait for one for ever.

    Returns:
        Why there is none; None if there is.

    Raises:
        ClusterError: If the address is malformed.
    """
    place = split_address(address)
    deadline = time.monotonic() + timeout_secs
    while True:
        reason = _try_to_greet(place, max(0.1, min(2.0, deadline - time.monotonic())))
        if reason is None or time.monotonic() >= deadline:
            return reason
        time.sleep(min(_RETRY_SECS, max(0.0, deadline - time.monotonic())))


def meet_peers(cluster: Cluster, *, timeout_secs: float) -> None:
    """Waits until all tasks of the cluster have come to this point, or beyond it.

    Each listens on its own port meanwhile, so that the others find it, and leaves the port to TensorFlow's server.
    That server's own wait lasts an hour, holds Python's lock and says nothing.

    Raises:
        ClusterError: If some do not come in time, or this task's own port is taken.
    """
    with open_listener(cluster):
        check_reachable(cluster, timeout_secs=timeout_secs)


def open_listener(cluster: Cluster) -> socket.socket:
    """Listens on this task's own port as TensorFlow's server will, closed to machines that are no part of the cluster.

    Raises:
        ClusterError: If the port is taken, or may not be bound.
    """
    assert cluster.task is not None
    host, port = split_address(cluster.address(cluster.task))
    check_port_free(cluster)
    peers = find_peers(cluster, os.environ)
    if cluster.is_loopback:
        family = socket.AF_INET6 if host == "::1" else socket.AF_INET
        listener = _bind_family(family, host, port)
    else:
        listener = _bind("", port)
    if peers:
        admit_only(listener, peers)
    listener.listen()
    return listener


def _try_to_connect(address: str, timeout_secs: float) -> OSError | None:
    try:
        socket.create_connection(split_address(address), timeout=timeout_secs).close()
    except OSError as error:
        return error
    return None


def _try_to_greet(place: tuple[str, int], timeout_secs: float) -> str | None:
    """Says what is wrong with a gRPC server; one sends its settings as soon as it is greeted."""
    try:
        with socket.create_connection(place, timeout=timeout_secs) as connection:
            connection.sendall(_HTTP2_GREETING)
            header = b""
            while len(header) < 4 and (more := connection.recv(4 - len(header))):
                header += more
    except OSError as error:
        return error.strerror or str(error)
    return None if len(header) == 4 and header[3] == _HTTP2_SETTINGS else "it does not speak gRPC"


def _bind(host: str, port: int) -> socket.socket:
    """Binds as gRPC does: IPv6 and IPv4 at once, or IPv4 alone where the machine has no IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return _bind_family(socket.AF_INET6, host, port)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return _bind_family(socket.AF_INET, host, port)


def _bind_family(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
