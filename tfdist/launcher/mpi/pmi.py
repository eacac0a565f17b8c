"""What MPI's processes ask of whoever has started them: their rank, and where the others are.

`mpiexec` answers it too, but would stand between the launcher and its tasks, whose output, exit codes and freezes it
hides. The questions are lines of text, of the PMI-1 protocol that MPICH and its relatives speak.

Source: "PMI: A Scalable Parallel Process-Management Interface for Extreme-Scale Systems" (Balaji et al. 2010), and
the simple client of MPICH (src/pmi).
"""

import contextlib
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Sequence

_CHUNK_BYTES = 2**16
_MAXES = "kvsname_max=256 keylen_max=64 vallen_max=1024"
# Answers that do not depend on anything.
_FIXED = {
    "init": "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0",
    "get_maxes": f"cmd=maxes rc=0 {_MAXES}",
    "get_appnum": "cmd=appnum rc=0 appnum=0",
    "finalize": "cmd=finalize_ack rc=0",
}


class PmiWorld:
    """What the ranks of one try have said, and the answers; those of one host share memory."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._size = len(hosts)
        # MPICH names its shared memory after it: one that was used before would still hold what was in it.
        self._space = f"tfdist_{os.getpid()}_{secrets.token_hex(8)}"
        self._values = {"PMI_process_mapping": render_mapping(hosts)}
        self._rests: dict[int, bytes] = {}
        self._waiting: list[int] = []

    def receive(self, rank: int, data: bytes) -> list[tuple[int, bytes]]:
        """Takes what a rank has sent, cut anywhere; returns ranks, and what each of them is to be sent."""
        *lines, self._rests[rank] = (self._rests.get(rank, b"") + data).split(b"\n")
        return [answer for line in lines for answer in self._answer(rank, line.decode(errors="replace"))]

    def _answer(self, rank: int, line: str) -> list[tuple[int, bytes]]:
        # A value is the last word of its line, and may hold anything but a line's end.
        line, _, value = line.partition(" value=")
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        command, key = words.get("cmd", ""), words.get("key", "")
        if command == "barrier_in":
            self._waiting.append(rank)
            if len(self._waiting) < self._size:
                return []
            ready, self._waiting = self._waiting, []
            return [(waiting, b"cmd=barrier_out rc=0\n") for waiting in ready]
        if command == "put":
            self._values[key] = value.strip()
            text = "cmd=put_result rc=0 msg=success"
        elif command == "get":
            found = self._values.get(key)
            text = "rc=-1 msg=key_not_found" if found is None else f"rc=0 msg=success value={found}"
            text = f"cmd=get_result {text}"
        elif command == "get_my_kvsname":
            text = f"cmd=my_kvsname rc=0 kvsname={self._space}"
        elif command == "get_universe_size":
            text = f"cmd=universe_size rc=0 size={self._size}"
        else:
            text = _FIXED.get(command, "")
        return [(rank, text.encode() + b"\n")] if text else []


class PmiServer:
    """Answers the ranks of this machine, by a pair of sockets for each, which nobody else can reach."""

    def __init__(self, world: PmiWorld) -> None:
        self._world = world
        self._selector = selectors.DefaultSelector()
        self._sockets: dict[int, socket.socket] = {}
        self._stop, self._wake = socket.socketpair()
        self._selector.register(self._stop, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="tfdist-pmi", daemon=True)
        self._has_begun = False

    def connect(self, rank: int) -> socket.socket:
        """Returns a rank's end, which its process is to inherit and this one to close."""
        own, theirs = socket.socketpair()
        self._sockets[rank] = own
        self._selector.register(own, selectors.EVENT_READ, rank)
        if not self._has_begun:
            self._has_begun = True
            self._thread.start()
        return theirs

    def close(self) -> None:
        """Stops."""
        self._wake.close()
        if self._has_begun:
            self._thread.join()
        for each in (self._stop, *self._sockets.values()):
            each.close()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                data = b""
                with contextlib.suppress(OSError):  # it was killed
                    data = key.fileobj.recv(_CHUNK_BYTES)  # type: ignore[union-attr]
                if not data:
                    self._selector.unregister(key.fileobj)
                for rank, text in self._world.receive(key.data, data):
                    with contextlib.suppress(OSError):
                        self._sockets[rank].sendall(text)


def render_mapping(hosts: Sequence[str]) -> str:
    """Renders each rank's host as MPICH reads it: runs of `(first host, hosts, ranks on each)`."""
    names = list(dict.fromkeys(hosts))
    runs: list[list[int]] = []
    for host in hosts:
        number = names.index(host)
        if runs and runs[-1][0] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return "(vector," + ",".join(f"({number},1,{count})" for number, count in runs) + ")"
