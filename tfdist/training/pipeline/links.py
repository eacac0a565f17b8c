"""What carries tensors between neighbouring stages: a connection that sends and receives while the stage computes."""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.errors import ClusterError
from tfdist.training.pipeline.grid import Grid

_START_SECS = 60.0
# How long a listener hears one visitor, who may be a stranger and silent.
_GREETING_SECS = 5.0
_KEY_BYTES = 32
_LENGTH = struct.Struct("!Q")


class Link:
    """A connection with a neighbouring stage.

    Args:
        connection: Connected to it.
        peer: Its task, for messages.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._connection = connection
        self._peer = peer
        # None ends either.
        self._to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._received: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        connection.settimeout(None)
        # A last small piece of a large message would wait for the answer to those before it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._threads = [
            threading.Thread(target=run, daemon=True) for run in (self._send_all, self._receive_all)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, tensors: Sequence[Any]) -> None:
        """Sends tensors, and returns at once; whether the neighbour is gone shows when something is to come from it."""
        arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in tensors]
        self._to_send.put(b"".join(array.reshape(-1).view(np.uint8).data for array in arrays))

    def receive(self, specs: Sequence[tf.TensorSpec]) -> list[tf.Tensor]:
        """Waits for what the neighbour sends next.

        Raises:
            OpError: `tf.errors.UnavailableError` if the neighbour is gone.
            RuntimeError: If it sends something else.
        """
        content = self._received.get()
        if content is None:
            self._received.put(None)  # for who asks next
            error: tf.errors.OpError = tf.errors.UnavailableError(
                None, None, f"{self._peer}, the neighbouring stage, is gone"
            )
            raise error
        sizes = [math.prod(spec.shape) * spec.dtype.size for spec in specs]
        if sum(sizes) != len(content):
            raise RuntimeError(f"{self._peer} has sent {len(content)} bytes, and {sum(sizes)} were to come")
        tensors, start = [], 0
        for spec, size in zip(specs, sizes, strict=True):
            array = np.frombuffer(content, np.uint8, size, start).view(spec.dtype.as_numpy_dtype)
            tensors.append(tf.constant(array.reshape(spec.shape)))
            start += size
        return tensors

    def close(self) -> None:
        """Ends the connection when all is sent."""
        self._to_send.put(None)
        self._threads[0].join()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._threads[1].join()
        self._connection.close()

    def _send_all(self) -> None:
        # A loss is found by the thread that receives.
        with contextlib.suppress(OSError):
            while (content := self._to_send.get()) is not None:
                self._connection.sendall(_LENGTH.pack(len(content)))
                self._connection.sendall(content)

    def _receive_all(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                (length,) = _LENGTH.unpack(_read(self._connection, _LENGTH.size))
                self._received.put(_read(self._connection, length))
        self._received.put(None)


def open_links(grid: Grid) -> tuple[Link | None, Link | None]:
    """Returns connections with the stage before and the next one, None where there is none; every process calls it.

    Each stage but the last listens, at the address by which its machine reaches the next one, for that one alone: who
    comes must know a secret that has crossed inside the cluster.

    Raises:
        ClusterError: If a neighbour does not come.
    """
    left, right = grid.neighbours
    deadline = time.monotonic() + _START_SECS
    with contextlib.ExitStack() as stack:
        own = b""
        if right is not None:
            listener = stack.enter_context(_listen(grid.hosts[right]))
            key = secrets.token_bytes(_KEY_BYTES)
            own = json.dumps([*listener.getsockname()[:2], key.hex()]).encode()
        places = [
            grid.broadcast(own if place == grid.rank else b"", source=place)
            for place in range(len(grid.tasks))
        ]
        before = after = None
        if left is not None:
            before = Link(_visit(places[left], grid.tasks[left]), grid.tasks[left])
        if right is not None:
            after = Link(_accept(listener, key, grid.tasks[right], deadline), grid.tasks[right])
    return before, after


def _listen(host: str) -> socket.socket:
    """Listens at the address of this machine by which another is reached."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # nothing is sent
        own = probe.getsockname()[0]
    return socket.create_server((own, 0), family=family)


def _visit(place: bytes, peer: str) -> socket.socket:
    host, port, key = json.loads(place)
    try:
        connection = socket.create_connection((host, port), timeout=_START_SECS)
        connection.sendall(bytes.fromhex(key))
    except OSError as error:
        raise ClusterError(
            f"{peer}, the stage before, cannot be reached at {host}:{port} ({error.strerror or error}): stages send to "
            "each other on ports that the system chooses; let machines of the cluster reach each other on all."
        ) from error
    return connection


def _accept(listener: socket.socket, key: bytes, peer: str, deadline: float) -> socket.socket:
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(TimeoutError):
            visitor = listener.accept()[0]
            if _knows(visitor, key):
                return visitor
            visitor.close()
    raise ClusterError(
        f"{peer}, the next stage, has not come within {_START_SECS:g} s; its own message says why."
    )


def _knows(visitor: socket.socket, key: bytes) -> bool:
    visitor.settimeout(_GREETING_SECS)
    with contextlib.suppress(OSError, EOFError):
        return hmac.compare_digest(bytes(_read(visitor, _KEY_BYTES)), key)
    return False


def _read(connection: socket.socket, length: int) -> bytearray:
    content = bytearray(length)
    view = memoryview(content)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return content
