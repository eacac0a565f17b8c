"""A meeting at rank 0, where ranks that know only their number learn each other's addresses."""

import functools
import json
import socket
import time

from tfdist.errors import ClusterError

_TIMEOUT_SECS = 120.0
_RETRY_SECS = 0.2
# How long rank 0 listens to one visitor, who may be a stranger and silent.
_GREETING_SECS = 5.0


@functools.cache  # A process asks several times, and the others come once.
def meet_ranks(
    *,
    places: tuple[tuple[str, int], ...],
    job: str,
    rank: int,
    size: int,
    timeout_secs: float = _TIMEOUT_SECS,
) -> tuple[str, ...]:
    """Lets every rank learn all hosts; a rank's address is the one from which rank 0 sees it come.

    Args:
        places: Hosts and ports at which rank 0 may be reached; it listens on the first one's port.
        job: A name that all ranks of the job know; others are sent away.
        rank: Of this process.
        size: How many ranks there are.
        timeout_secs: Longest wait for all of them, in seconds.

    Raises:
        ClusterError: If some do not come in time, or rank 0's port is taken.
    """
    deadline = time.monotonic() + timeout_secs
    if rank == 0:
        return _receive(places[0], job, size, deadline)
    reason = "nobody listens"
    while time.monotonic() < deadline:
        for place in places:
            try:
                return _visit(place, job, rank, deadline)
            except OSError as error:
                reason = error.strerror or str(error)
            except ValueError:
                reason = "it belongs to another job"
        time.sleep(_RETRY_SECS)
    named = " or ".join(f"{host}:{port}" for host, port in places)
    raise ClusterError(
        f"rank {rank} has not met rank 0 at {named} within {timeout_secs:g} s ({reason}): "
        "set TFDIST_COORDINATOR=HOST:PORT to where the others can reach rank 0"
    )


def _receive(place: tuple[str, int], job: str, size: int, deadline: float) -> tuple[str, ...]:
    visitors: dict[int, socket.socket] = {}
    try:
        listener = socket.create_server(("", place[1]), backlog=size)
    except OSError as error:
        raise ClusterError(
            f"port {place[1]}, where the ranks meet, cannot be bound ({error.strerror}): "
            "set TFDIST_COORDINATOR=HOST:PORT to a free one"
        ) from None
    with listener:
        while len(visitors) < size - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                visitor = listener.accept()[0]
            except TimeoutError:
                missing = [str(rank) for rank in range(1, size) if rank not in visitors]
                raise ClusterError(
                    f"rank 0 waits on port {place[1]}, and rank {', '.join(missing)} did not come: set "
                    "TFDIST_COORDINATOR=HOST:PORT to where the others can reach rank 0"
                ) from None
            rank = _hear_rank(visitor, job)
            if rank is None or not 0 < rank < size:
                visitor.close()
            else:
                visitors[rank] = visitor
    own = visitors[1].getsockname()[0]  # As the others see it.
    hosts = (own, *(visitors[rank].getpeername()[0] for rank in range(1, size)))
    for visitor in visitors.values():
        with visitor:
            visitor.sendall(json.dumps(hosts).encode() + b"\n")
    return hosts


def _hear_rank(visitor: socket.socket, job: str) -> int | None:
    visitor.settimeout(_GREETING_SECS)
    try:
        greeting = json.loads(visitor.makefile().readline(1000))
        return int(greeting["rank"]) if greeting["job"] == job else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _visit(place: tuple[str, int], job: str, rank: int, deadline: float) -> tuple[str, ...]:
    with socket.create_connection(place, timeout=max(0.01, min(2.0, deadline - time.monotonic()))) as visit:
        visit.sendall(json.dumps({"job": job, "rank": rank}).encode() + b"\n")
        visit.settimeout(max(0.01, deadline - time.monotonic()))
        return tuple(json.loads(visit.makefile().readline()))
