"""Closes a local cluster's listening sockets to other machines.

TensorFlow's servers listen on every interface, whatever address the cluster names, and obey anyone who can
connect. A socket bound to the device `lo` is reachable from this machine alone; Linux lets the socket's owner do
that without root, also after `listen`.
"""

from __future__ import annotations

import os
import socket
import threading
import time

_DESCRIPTORS = "/proc/self/fd"


def close_when_listening(port: int, *, timeout_secs: float = 60.0) -> threading.Thread:
    """Closes this process's own listening socket to other machines, as soon as it exists.

    Args:
        port: The port that this process is about to listen on.
        timeout_secs: How long to look for it.

    Returns:
        The daemon thread that waits for the socket.
    """

    def watch() -> None:
        deadline = time.monotonic() + timeout_secs
        while not close_to_other_machines(port) and time.monotonic() < deadline:
            time.sleep(0.005)

    thread = threading.Thread(target=watch, name="tfdist-door", daemon=True)
    thread.start()
    return thread


def close_to_other_machines(port: int) -> bool:
    """Binds this process's sockets that listen on `port` to the loopback device.

    Args:
        port: The port.

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
            found |= _close(listener, port)
    return found


def _close(listener: socket.socket, port: int) -> bool:
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or listener.getsockname()[1] != port:
        return False
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
    return True
