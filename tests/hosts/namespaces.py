"""Two network namespaces on one wire, which stand for two machines."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

ADDRESSES = ("192.0.2.1", "192.0.2.2")
ADDRESSES_V6 = ("2001:db8::1", "2001:db8::2")


class Host:
    """A network namespace, in which processes run as on a machine of their own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Makes the hosts, with the addresses of `ADDRESSES` and, if there is IPv6, of `ADDRESSES_V6`."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and the command ip (iproute2)")
    hosts = first, second = Host(f"tfdist-{os.getpid()}-a"), Host(f"tfdist-{os.getpid()}-b")
    wire = f"tfd{os.getpid()}"
    try:
        for host in hosts:
            try:
                _ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
        _ip("link", "add", wire, "netns", first.name, "type", "veth", "peer", wire, "netns", second.name)
        for host, address, address_v6 in zip(hosts, ADDRESSES, ADDRESSES_V6, strict=True):
            _ip("-n", host.name, "address", "add", f"{address}/30", "dev", wire)
            if socket.has_dualstack_ipv6():
                _ip("-n", host.name, "address", "add", f"{address_v6}/64", "dev", wire, "nodad")
            _ip("-n", host.name, "link", "set", wire, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, timeout=30)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
