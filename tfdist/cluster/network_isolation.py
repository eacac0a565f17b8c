"""Closes a cluster's listening sockets to machines that are no part of it.

TensorFlow's servers listen on every interface, whatever address the cluster names, and obey anyone who can
connect. A socket bound to the device `lo` is reachable from this machine alone, one bound to `eth1` from that network;
Linux (5.7 and later) lets the socket's owner do that without root, also after `listen`. Beside that, or in its place,
`tfdist.cluster.peer_allowlist` says from which addresses one may come.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence

from tfdist.cluster.peer_allowlist import admit_only

_log = logging.getLogger("tfdist")
LOOPBACK = "lo"
_LOOPBACK_ADDRESSES = ("127.0.0.1", "::1")
_DESCRIPTORS = "/proc/self/fd"


def isolate_when_listening(
    port: int, *, device: str | None = LOOPBACK, peers: Sequence[str] = (), timeout_secs: float = 60.0
) -> threading.Thread:
    """Closes this process's own listening socket to others, as soon as it exists, by a daemon thread.

    Args:
        port: The port that this process is about to listen on.
        device: The network interface that it stays open to; None: all.
        peers: IP addresses that it stays open to; none: all.
        timeout_secs: How long to look for it.
    """

    def watch() -> None:
        deadline = time.monotonic() + timeout_secs
        while not isolate_port(port, device=device, peers=peers) and time.monotonic() < deadline:
            time.sleep(0.005)

    thread = threading.Thread(target=watch, name="tfdist-door", daemon=True)
    thread.start()
    return thread


def isolate_port(port: int, *, device: str | None = LOOPBACK, peers: Sequence[str] = ()) -> bool:
    """Binds this process's sockets that listen on `port` to a network interface, by default the loopback device.

    Args:
        port: The port.
        device: The interface; None: all.
        peers: IP addresses from which alone one may come, if the kernel lets us; none: all.

    Returns:
        Whether there was such a socket.
    """
    found = False
    for name in os.listdir(_DESCRIPTORS) if os.path.isdir(_DESCRIPTORS) else []:
        try:
            if not os.readlink(f"{_DESCRIPTORS}/{name}").startswith("socket:"):
                continue
            # A copy, so that closing it leaves TensorFlow's own descriptor open.
            copy = os.dup(int(name))
        except OSError:
            continue  # Closed meanwhile.
        with socket.socket(fileno=copy) as listener:
            found |= _close(listener, port, device, peers)
    return found


def _close(listener: socket.socket, port: int, device: str | None, peers: Sequence[str]) -> bool:
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or listener.getsockname()[1] != port:
        return False
    if device is not None:
        _bind_or_filter(listener, port, device)
    if peers:
        admit_only(listener, peers)
    return True


def _bind_or_filter(listener: socket.socket, port: int, device: str) -> None:
    try:
        _bind_to_device(listener, device)
        return
    except PermissionError:
        # Kernels before 5.7 let root alone do that; they let everybody turn packets away, though.
        if device == LOOPBACK and admit_only(listener, _LOOPBACK_ADDRESSES):
            return
    _log.warning(
        "port %d stays OPEN to other machines, which TensorFlow's server obeys: this kernel does not let this user "
        "close it (Linux 5.7 and later do); put a firewall before it, or run as root.",
        port,
    )


def _bind_to_device(listener: socket.socket, device: str) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, f"{device}\0".encode())
