"""Hosts behind a link of one's choice, on one machine: Linux, root, `iproute2` and `openssh-server`."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from figures import ROOT

sys.path.insert(0, str(ROOT))
from tests.hosts.ssh_hosts import SshHosts, ssh_hosts

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x2, 0x1000
_MOST_FRAME = 70_000


@contextlib.contextmanager
def linked_hosts(
    folder: Path, count: int, *, rate: str | None = None, round_trip_ms: float = 0.0
) -> Iterator[SshHosts]:
    """Makes hosts that ssh reaches.

    Args:
        folder: For their files.
        count: Of hosts.
        rate: What each one's cable carries in each direction, as `tc` writes it; None: all that the machine can.
        round_trip_ms: From one to another and back.
    """
    with ssh_hosts(folder, count) as hosts, contextlib.ExitStack() as stack:
        for host in hosts.hosts:
            device = "eth0"
            if round_trip_ms:
                # Frames pass two hosts' cables in each direction.
                stack.enter_context(_delayed(host.name, host.address, host.wire, round_trip_ms / 4e3))
                device = "eth1"
            if rate is not None:
                shape = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
                _run("ip", "netns", "exec", host.name, "tc", "qdisc", "add", "dev", device, *shape)
                # What comes to it is what others send; several may send at once.
                _run("tc", "qdisc", "add", "dev", f"d{host.name}" if round_trip_ms else host.wire, *shape)
        yield hosts


@contextlib.contextmanager
def _delayed(host: str, address: str, wire: str, secs: float) -> Iterator[None]:
    """Puts a wire in the place of a host's, whose frames arrive so much later: not every kernel has `netem`."""
    shown = subprocess.run(["ip", "-o", "link", "show", wire], check=True, capture_output=True, text=True)
    bridge = shown.stdout.partition("master ")[2].split()[0]
    process = subprocess.Popen(
        [sys.executable, __file__, bridge, host, address, str(secs)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield
    finally:
        process.kill()
        process.wait()


def _carry(bridge: str, host: str, address: str, delay: float) -> None:
    """Carries frames between a bridge and a host, each so many seconds later."""
    near, far = (_open_tap(f"{end}{host}") for end in "de")
    _run("ip", "link", "set", f"d{host}", "txqueuelen", "10000", "master", bridge, "up")
    _run("ip", "-n", host, "address", "flush", "dev", "eth0")
    _run("ip", "link", "set", f"e{host}", "netns", host, "name", "eth1")
    _run("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth1")
    _run("ip", "-n", host, "link", "set", "eth1", "txqueuelen", "10000", "up")
    print("up", flush=True)
    under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()
    selector = selectors.DefaultSelector()
    selector.register(near, selectors.EVENT_READ, far)
    selector.register(far, selectors.EVENT_READ, near)
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for key, _ in selector.select(wait):
            with contextlib.suppress(BlockingIOError):
                for _ in range(64):
                    frame = os.read(key.fd, _MOST_FRAME)
                    under_way.append((time.monotonic() + delay, key.data, frame))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, end, frame = under_way.popleft()
            with contextlib.suppress(OSError):  # a full queue drops it, as a switch does
                os.write(end, frame)


def _open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)


if __name__ == "__main__":
    _carry(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
