"""Who may connect to a server of a cluster on several machines: the cluster's own addresses.

The kernel drops what comes from elsewhere, by a packet filter on the listening socket itself (SO_ATTACH_FILTER). Most
kernels let every user set one; newer ones (measured: 6.18) want CAP_NET_ADMIN for it on TCP sockets.
"""

import ctypes
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Mapping

from tfdist.cluster.spec import Cluster, split_address
from tfdist.errors import ClusterError

VARIABLE = "TFDIST_ADMIT"
# Names the interface on which alone the servers of a job on several machines listen.
LISTEN_VARIABLE = "TFDIST_LISTEN_INTERFACE"
ANYBODY = "any"
_SO_ATTACH_FILTER = 26
# Instructions of the kernel's classic packet filter, and where its memory begins with the IP header.
_LOAD_BYTE, _LOAD_WORD, _AND, _SHIFT_RIGHT = 0x30, 0x20, 0x54, 0x74
_JUMP, _JUMP_IF_EQUAL, _RETURN = 0x05, 0x15, 0x06
_IP_HEADER = 0xFFF00000
_SOURCE_V4, _SOURCE_V6 = _IP_HEADER + 12, _IP_HEADER + 8
_PASS, _DROP = (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)
_Instruction = tuple[int, int, int, int]


def find_peers(cluster: Cluster, env: Mapping[str, str]) -> tuple[str, ...]:
    """Finds the addresses from which the tasks of a cluster come.

    TFDIST_ADMIT adds addresses to them, where a machine has several, or leaves the door open by `any`. Pods change
    their addresses when they start again, so on Kubernetes this is left to a NetworkPolicy.

    Returns:
        IP addresses; none where everybody may come, or not all names can be resolved yet.

    Raises:
        ClusterError: If TFDIST_ADMIT is malformed, or the others see this task come from an address that they would
            not admit.
    """
    told = env.get(VARIABLE, "").strip()
    if cluster.is_local or cluster.is_loopback or told == ANYBODY or "KUBERNETES_SERVICE_HOST" in env:
        return ()
    try:
        found = {host: _resolve(host) for host in cluster.hosts}
    except OSError:
        return ()
    peers = {*_parse_addresses(told), *(address for own in found.values() for address in own)}
    if cluster.task in cluster.tasks:
        _check_own(split_address(cluster.address(cluster.task))[0], found, peers)
    return tuple(sorted(peers))


def is_open(cluster: Cluster, env: Mapping[str, str]) -> bool:
    """Tells whether this task's server would hear anyone who can connect.

    Raises:
        ClusterError: As `find_peers`.
    """
    if cluster.is_local or cluster.is_loopback or env.get(LISTEN_VARIABLE):
        return False
    # A pod's door is a NetworkPolicy, which nobody sees from inside.
    return "KUBERNETES_SERVICE_HOST" not in env and not (find_peers(cluster, env) and may_filter())


def may_filter() -> bool:
    """Tells whether the kernel lets this process filter who connects to it."""
    with socket.socket() as scratch:
        return admit_only(scratch, ["127.0.0.1"])


def admit_only(listener: socket.socket, peers: Iterable[str]) -> bool:
    """Lets a TCP socket receive nothing but what comes from IP addresses, or from this machine's loopback device.

    Returns:
        Whether the kernel lets this process do so.
    """
    if not sys.platform.startswith("linux"):
        return False
    program = render_filter(peers)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(code))
        )
    except OSError:
        return False
    return True


def render_filter(peers: Iterable[str]) -> list[_Instruction]:
    """Writes the filter for IP addresses: a program that passes a packet whole or not at all.

    Each instruction is an operation, two jumps (if true, if false) and a number.
    """
    addresses = [ipaddress.ip_address(peer) for peer in peers]
    v4: list[_Instruction] = [(_LOAD_WORD, 0, 0, _SOURCE_V4)]
    v6: list[_Instruction] = []
    for address in [*addresses, ipaddress.ip_address("::1")]:
        if address.version == 4:
            v4 += [(_JUMP_IF_EQUAL, 0, 1, int(address)), _PASS]
            continue
        words = struct.unpack("!4I", address.packed)
        for i, word in enumerate(words):  # the first that differs leads to the next address
            v6 += [(_LOAD_WORD, 0, 0, _SOURCE_V6 + 4 * i), (_JUMP_IF_EQUAL, 0, 7 - 2 * i, word)]
        v6.append(_PASS)
    v4 += [(_AND, 0, 0, 0xFF000000), (_JUMP_IF_EQUAL, 0, 1, 0x7F000000), _PASS, _DROP]
    head = [(_LOAD_BYTE, 0, 0, _IP_HEADER), (_SHIFT_RIGHT, 0, 0, 4), (_JUMP_IF_EQUAL, 0, 1, 6)]
    return [*head, (_JUMP, 0, 0, len(v4)), *v4, *v6, _DROP]


def _resolve(host: str) -> set[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return {str(place[4][0]).partition("%")[0] for place in found}


def _parse_addresses(text: str) -> list[str]:
    try:
        return [str(ipaddress.ip_address(word.strip())) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise ClusterError(
            f"{VARIABLE}={text!r} ({error}): write IP addresses with commas between them, or {ANYBODY}"
        ) from None


def _check_own(own: str, found: Mapping[str, set[str]], peers: set[str]) -> None:
    """Refuses what would be a silent wait: the others would drop what comes from an address that they do not know."""
    if any(ipaddress.ip_address(address).is_loopback for address in found[own]):
        return  # as /etc/hosts often has it; the others know better
    for host in found.keys() - {own}:
        for address in found[host]:
            source = _find_source(address)
            if source is not None and source not in peers:
                raise ClusterError(
                    f"this machine, {own} ({', '.join(sorted(found[own]))}), reaches {host} from {source}, an address "
                    f"that no task has: name it by that one, or set {VARIABLE}={source} for all tasks"
                )


def _find_source(address: str) -> str | None:
    """Returns the address from which the kernel would reach another; sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None
