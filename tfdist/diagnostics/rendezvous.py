"""The tasks of a cluster meet: each listens on its own port for a while, and visits the others on theirs.

A visitor says a line of JSON with its name and a digest of the addresses that it knows; whoever knows the same gets
this task's facts in return.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfdist.cluster.network_isolation import isolate_port
from tfdist.cluster.peer_allowlist import LISTEN_VARIABLE
from tfdist.cluster.ports import open_listener
from tfdist.cluster.spec import Cluster, Task, split_address
from tfdist.errors import ClusterError

_RETRY_SECS = 0.2
_CONNECT_SECS = 3.0
_MAX_VISITS = 16


class Rendezvous:
    """This task's part in it; a context that leaves neither a listener nor a file behind.

    A process that is no task of the cluster has nobody to meet. `run_dir` is a folder that all may write to.
    """

    def __init__(
        self, cluster: Cluster, facts: Mapping[str, Any], *, run_dir: str | None, wait_secs: float
    ) -> None:
        self._cluster = cluster
        self._facts = facts
        self._digest = _digest(cluster)
        self._run_dir = nearest_folder(run_dir) if run_dir else None
        self._wait_secs = wait_secs
        self._heard: set[str] = set()
        self._errors: dict[str, str | None] = {"port_error": None, "run_dir_error": None}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Rendezvous":
        self._leave_token()  # first, so that whoever gets an answer finds it
        try:
            if self._cluster.task in self._cluster.tasks:
                self._listen()
        except (ClusterError, OSError) as error:
            self._errors["port_error"] = str(error)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def run(self) -> dict[str, Any]:
        """Meets the others.

        Returns:
            What was seen: `peers` (by task: `error` or None, `skew_secs` (at least so far is its clock ahead), `facts`,
            `reads_run_dir`), `heard` (who has come here), `port_error` and `run_dir_error`.
        """
        peers = [task for task in self._cluster.tasks if task != self._cluster.task]
        deadline = time.monotonic() + self._wait_secs
        seen: dict[str, Any] = {}
        if peers and self._cluster.task is not None:
            with concurrent.futures.ThreadPoolExecutor(_MAX_VISITS) as pool:
                visits = [pool.submit(self._visit, task, deadline) for task in peers]
                seen = {str(task): visit.result() for task, visit in zip(peers, visits, strict=True)}
            while time.monotonic() < deadline and len(self._heard) < len(peers):
                time.sleep(_RETRY_SECS)
            self._see_off(peers, deadline)
        return {"peers": seen, "heard": sorted(self._heard), **self._errors}

    def _listen(self) -> None:
        listener = open_listener(self._cluster)
        device = os.environ.get(LISTEN_VARIABLE)
        if device:
            isolate_port(listener.getsockname()[1], device=device)
        meeting = self

        class Reply(socketserver.StreamRequestHandler):
            timeout = _CONNECT_SECS

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    greeting = json.loads(self.rfile.readline(4096))
                    self.wfile.write(meeting._answer(greeting))
                    if greeting["digest"] == meeting._digest:
                        # Last, since whoever has heard all may leave, and cut an answer short.
                        meeting._heard.add(str(greeting["task"]))

        server = socketserver.ThreadingTCPServer(("", 0), Reply, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        server.daemon_threads = True
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        threading.Thread(target=server.serve_forever, args=(_RETRY_SECS,), daemon=True).start()

    def _answer(self, greeting: Mapping[str, str]) -> bytes:
        answer: dict[str, Any] = {"task": str(self._cluster.task), "time": time.time()}
        if greeting["digest"] == self._digest:
            answer["facts"] = dict(self._facts)
        return json.dumps(answer).encode() + b"\n"

    def _visit(self, task: Task, deadline: float) -> dict[str, Any]:
        seen: dict[str, Any] = {"error": "nobody has tried"}
        while seen["error"]:
            try:
                seen = self._ask(task)
            except OSError as error:
                seen["error"] = _say(error)
            except (ValueError, KeyError, TypeError):
                seen["error"] = "another program answers"
            if time.monotonic() >= deadline:
                break
            if seen["error"]:
                time.sleep(_RETRY_SECS)
        return seen

    def _ask(self, task: Task) -> dict[str, Any]:
        place = split_address(self._cluster.address(task))
        with socket.create_connection(place, timeout=_CONNECT_SECS) as connection:
            # Before the greeting: who has been greeted by all may leave, and take its token along.
            reads = self._run_dir is None or _token(self._run_dir, self._digest, task).exists()
            start = time.time()
            greeting = {"task": str(self._cluster.task), "digest": self._digest}
            connection.sendall(json.dumps(greeting).encode() + b"\n")
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline())
            secs = time.time() - start
        seen = {"error": None, "reads_run_dir": reads, "facts": answer.get("facts")}
        # An answer that took its time may have been written at any moment of it.
        skew = answer["time"] - start - secs / 2
        seen["skew_secs"] = round(math.copysign(max(0.0, abs(skew) - secs / 2), skew), 3)
        if answer["task"] != str(task):
            seen["error"] = f"{answer['task']} answers there"
        elif seen["facts"] is None:
            seen["error"] = "it knows another cluster"
        return seen

    def _see_off(self, peers: list[Task], deadline: float) -> None:
        """Lets the others leave first where this is the chief: a launcher ends the others when a chief ends."""
        if self._cluster.task is None or self._cluster.task.type != "chief":
            return
        for task in peers:
            while time.monotonic() < deadline + 2 * _CONNECT_SECS:
                try:
                    socket.create_connection(split_address(self._cluster.address(task)), timeout=1.0).close()
                except OSError:
                    break
                time.sleep(_RETRY_SECS)

    def _leave_token(self) -> None:
        if self._run_dir is None:
            return
        path = _token(self._run_dir, self._digest, self._cluster.task)
        try:
            path.unlink(missing_ok=True)  # of a doctor that was killed
            with open(path, "xb"):
                self._stack.callback(path.unlink, missing_ok=True)
        except OSError as error:
            self._errors["run_dir_error"] = _say(error)


def nearest_folder(path: str) -> Path:
    """Returns a folder, or what it will be made in: looking must make nothing."""
    place = Path(path).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _digest(cluster: Cluster) -> str:
    """Of the addresses whatever their order, so that two who differ in it alone can compare."""
    addresses = sorted(address for own in cluster.addresses.values() for address in own)
    return hashlib.sha256("\n".join(addresses).encode()).hexdigest()[:16]


def _token(run_dir: Path, digest: str, task: Task | None) -> Path:
    name = f"{task.type}-{task.index}" if task else "alone"
    return run_dir / f".tfdist-doctor-{digest}-{name}"


def _say(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "its name does not resolve"
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)
