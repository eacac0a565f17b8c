"""A task's TensorFlow server: its port, its door, and what a worker or ps of a `ps` run does: serve."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import NoReturn

import tensorflow as tf

from tfdist.cluster.cores import count_cores
from tfdist.cluster.environments import tf_config
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.cluster.network_isolation import LOOPBACK, isolate_when_listening
from tfdist.cluster.peer_allowlist import LISTEN_VARIABLE, find_peers, is_open
from tfdist.cluster.ports import check_port_free, check_reachable, is_refused
from tfdist.cluster.spec import Cluster, split_address
from tfdist.errors import PEER_LOST_CODE
from tfdist.runtime import memory
from tfdist.runtime.devices import configure_devices

_log = logging.getLogger("tfdist")
SERVER_GRACE_SECS = 30.0
# How often a server looks whether its chief still listens; how often in a row the chief's host must say that it does
# not; and how long a chief may be out of reach: without its servers' parameters it could not go on.
_CHIEF_POLL_SECS = 2.0
_MIN_REFUSED = 3
_CHIEF_LOST_SECS = 600.0
_MIN_THREADS_PS = 4


def prepare_server(cluster: Cluster, strategy: str) -> None:
    """Sees that this task's port is free, and sets what TensorFlow's servers read from the environment.

    Args:
        cluster: With this process's task.
        strategy: Canonical name.

    Raises:
        ClusterError: If the port is taken.
    """
    check_port_free(cluster)
    _prepare_grpc(cluster, strategy)


def isolate_server(cluster: Cluster) -> None:
    """Closes this task's server to machines that are no part of the cluster, as far as the kernel lets this user."""
    if cluster.task is None or cluster.task not in cluster.tasks:
        return
    interface = LOOPBACK if cluster.is_loopback else os.environ.get(LISTEN_VARIABLE)
    peers = find_peers(cluster, os.environ)
    if interface or peers:
        port = split_address(cluster.address(cluster.task))[1]
        isolate_when_listening(port, device=interface, peers=peers)
    if cluster.is_chief and is_open(cluster, os.environ):
        _log.warning(
            "an open door: the servers at %s obey anyone who can connect%s; put a firewall before them, or name their "
            "own network by --listen_interface: see docs/security.md",
            ", ".join(cluster.address(task) for task in cluster.tasks),
            ", since the kernel lets this user turn nobody away" if peers else "",
        )


def serve(cluster: Cluster, *, start_timeout_secs: float = 300.0) -> NoReturn:
    """Serves a `ps` run's chief as this worker or ps, until the launcher ends this process or the chief is gone.

    The chief may take `start_timeout_secs` to come. At SIGTERM this task serves on for as long as the chief may need to
    save its state.

    Raises:
        ClusterError: If this task's port is taken, or the chief does not come in time.
        SystemExit: At the end, with code 143.
    """
    assert cluster.task is not None
    heartbeat = Heartbeat.from_environment(os.environ)
    prepare_server(cluster, "ps")
    configure_devices(strategy="ps", num_replicas=None)
    isolate_server(cluster)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    server = tf.distribute.Server(
        {role: list(addresses) for role, addresses in cluster.addresses.items()},
        job_name=cluster.task.type,
        task_index=cluster.task.index,
        protocol="grpc",
    )
    # In a thread: `join` never lets Python handle a signal.
    threading.Thread(target=server.join, name="tfdist-server", daemon=True).start()
    # Who sets TF_CONFIG ends the servers too, or keeps them. In other worlds nobody does: they end with the chief.
    if tf_config.detect(os.environ):
        while not told.wait(memory.EVERY_SECS):
            memory.give_back()
    elif (code := _wait_for_end(cluster, told, start_timeout_secs)) is not None:
        what = f"could not be reached for {_CHIEF_LOST_SECS:.0f} s" if code else "has ended"
        print(f"tfdist: the chief {what}", file=sys.stderr, flush=True)
        os._exit(code)  # At once, and whatever the chief's last step has left undone here.
    heartbeat.tell()
    time.sleep(SERVER_GRACE_SECS)
    raise SystemExit(143)


def _prepare_grpc(cluster: Cluster, strategy: str) -> None:
    """Sets what the launcher sets, for tasks that a scheduler has started; what is set already stays."""
    given = os.environ
    given.setdefault("GRPC_FAIL_FAST", "use_caller")
    if any(given.get(name) for name in ("http_proxy", "https_proxy", "grpc_proxy")):
        given.setdefault("no_grpc_proxy", ",".join([*cluster.hosts, given.get("no_proxy", "")]).strip(","))
    if strategy == "ps" and count_cores() < _MIN_THREADS_PS:
        # With fewer, as where mpirun binds a task to one core, tensors between workers and ps would wait for ever.
        given.setdefault("TF_NUM_INTEROP_THREADS", str(_MIN_THREADS_PS))
        given.setdefault("TF_GRPC_WORKER_CACHE_THREADS", str(_MIN_THREADS_PS))


def _wait_for_end(cluster: Cluster, told: threading.Event, start_timeout_secs: float) -> int | None:
    """Waits until this process is told to end, or the chief has come and gone.

    Returns:
        None if it was told; else the exit code: 0, or that of a lost peer if nobody knows what became of the chief.

    Raises:
        ClusterError: If the chief does not come in time.
    """
    assert cluster.chief is not None
    num_refused, heard_at = 0, time.monotonic()
    has_come, deadline = False, heard_at + start_timeout_secs
    while not told.wait(_CHIEF_POLL_SECS):
        memory.give_back()
        refused = is_refused(cluster.address(cluster.chief))
        has_come |= refused is False
        if not has_come:
            if time.monotonic() > deadline:
                check_reachable(cluster, timeout_secs=_CHIEF_POLL_SECS, tasks=[cluster.chief])
            continue
        if refused is not None:
            heard_at = time.monotonic()
            num_refused = num_refused + 1 if refused else 0
        if num_refused == _MIN_REFUSED:
            return 0
        if time.monotonic() - heard_at > _CHIEF_LOST_SECS:
            return PEER_LOST_CODE
    return None
