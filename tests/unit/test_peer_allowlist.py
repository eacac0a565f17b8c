"""Who may connect: found from a cluster's addresses, and kept by a filter that the kernel understands."""

import ipaddress
import socket

import pytest

from tfdist.cluster import network_isolation
from tfdist.cluster.peer_allowlist import admit_only, find_peers, is_open, may_filter, render_filter
from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import ClusterError

HEADER = 0xFFF00000


def passes(program, source):
    """Runs a filter on a packet from an address, as the kernel does."""
    address = ipaddress.ip_address(source)
    header = bytearray(40)
    header[0] = address.version << 4
    at = 12 if address.version == 4 else 8
    header[at : at + len(address.packed)] = address.packed
    place, value = 0, 0
    while True:
        operation, if_true, if_false, number = program[place]
        place += 1
        if operation == 0x06:
            return bool(number)
        if operation in (0x20, 0x30):
            start = number - HEADER
            value = int.from_bytes(header[start : start + (4 if operation == 0x20 else 1)], "big")
        elif operation == 0x54:
            value &= number
        elif operation == 0x74:
            value >>= number
        elif operation == 0x05:
            place += number
        else:
            assert operation == 0x15
            place += if_true if value == number else if_false


def test_filter_passes_guests_and_loopback_alone():
    peers = ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::1:0:0:2"]
    program = render_filter(peers)
    for source in [*peers, "127.0.0.1", "127.8.8.8", "::1"]:
        assert passes(program, source), source
    for source in ["10.0.0.3", "11.0.0.1", "128.0.0.1", "fd00::2", "fd00::1:0:0:1", "fd01::1", "::2"]:
        assert not passes(program, source), source


def test_filter_without_guests_passes_loopback_alone():
    program = render_filter([])
    assert passes(program, "127.0.0.1") and passes(program, "::1")
    assert not passes(program, "10.0.0.1") and not passes(program, "fd00::1")


def test_filter_holds_many_guests():
    """More than a conditional jump, of 8 bits, can jump over."""
    peers = [f"10.0.{n // 100}.{n % 100}" for n in range(300)]
    program = render_filter([*peers, "fd00::1"])
    assert passes(program, peers[299]) and passes(program, "fd00::1")
    assert not passes(program, "10.0.3.0") and not passes(program, "fd00::2")
    with socket.socket() as listener:
        assert admit_only(listener, peers) == may_filter()


def cluster_of(*hosts):
    return Cluster(addresses={"worker": tuple(f"{host}:2222" for host in hosts)}, task=Task("worker", 0))


def test_guests_are_the_addresses_of_all_tasks_and_what_was_told():
    cluster = Cluster(addresses={"worker": ("192.0.2.1:1", "192.0.2.1:2", "[2001:db8::2]:1")})
    assert find_peers(cluster, {}) == ("192.0.2.1", "2001:db8::2")
    assert find_peers(cluster, {"TFDIST_ADMIT": "192.0.2.9"}) == ("192.0.2.1", "192.0.2.9", "2001:db8::2")


@pytest.mark.parametrize(
    ("hosts", "env"),
    [
        (("192.0.2.1", "192.0.2.2"), {"TFDIST_ADMIT": "any"}),
        (("192.0.2.1", "192.0.2.2"), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}),
        (("192.0.2.1", "not-yet-there.invalid"), {}),
        (("localhost", "127.0.0.1"), {}),
    ],
)
def test_everybody_may_come(hosts, env):
    assert find_peers(cluster_of(*hosts), env) == ()


def test_open_is_what_neither_kernel_nor_user_has_closed():
    cluster = cluster_of("192.0.2.1", "192.0.2.2")
    assert is_open(cluster, {}) == (not may_filter())
    assert is_open(cluster, {"TFDIST_ADMIT": "any"})
    assert not is_open(cluster, {"TFDIST_ADMIT": "any", "TFDIST_LISTEN_INTERFACE": "eth0"})
    assert not is_open(cluster, {"TFDIST_ADMIT": "any", "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert not is_open(cluster_of("localhost"), {"TFDIST_ADMIT": "any"})


def test_malformed_list_is_an_error():
    with pytest.raises(ClusterError, match=r"TFDIST_ADMIT='10\.0\.0'.*write IP addresses"):
        find_peers(cluster_of("192.0.2.1", "192.0.2.2"), {"TFDIST_ADMIT": "10.0.0"})


def test_address_that_the_others_would_not_admit_is_an_error(monkeypatch):
    """A silent wait otherwise."""
    monkeypatch.setattr("tfdist.cluster.peer_allowlist._find_source", lambda address: "198.51.100.7")
    cluster = cluster_of("192.0.2.1", "192.0.2.2")
    with pytest.raises(ClusterError, match=r"reaches 192\.0\.2\.2 from 198\.51\.100\.7.*TFDIST_ADMIT=198"):
        find_peers(cluster, {})
    assert "198.51.100.7" in find_peers(cluster, {"TFDIST_ADMIT": "198.51.100.7"})
    assert find_peers(cluster_of("127.0.1.1", "192.0.2.2"), {}) == ("127.0.1.1", "192.0.2.2")


@pytest.mark.parametrize("may_filter", [True, False])
def test_kernel_that_lets_no_user_bind_to_a_device_gets_a_filter_or_a_loud_word(
    monkeypatch, caplog, may_filter
):
    """Linux before 5.7, which cannot be had here: its refusal is put in the place of the call."""
    given = []

    def refuse(listener, device):
        raise PermissionError(1, "Operation not permitted")

    def turn_away(listener, peers):
        given.append(tuple(peers))
        return may_filter

    monkeypatch.setattr(network_isolation, "_bind_to_device", refuse)
    monkeypatch.setattr(network_isolation, "admit_only", turn_away)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert network_isolation.isolate_port(listener.getsockname()[1])
    assert given == [("127.0.0.1", "::1")]
    assert ("stays OPEN to other machines" in caplog.text) == (not may_filter)
