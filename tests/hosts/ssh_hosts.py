"""Machines that ssh reaches: network, host name, processes and mounts of their own, on one bridge, an sshd in each."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

OTHER_PORT = 2022
_NETWORKS = 250  # 10.77.0.0/24 and on


class SshHost:
    """One of them."""

    def __init__(self, name: str, addresses: tuple[str, ...], folder: Path) -> None:
        self.name, self.folder = name, folder
        self.addresses, self.address = addresses, addresses[0]  # the second is of IPv6
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def wire(self) -> str:
        """The near end of its cable."""
        return f"v{self.name}"

    def power_off(self) -> None:
        """Kills all its processes at once, and cuts its cable, so that nobody is told."""
        _run("ip", "link", "set", self.wire, "down")
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def commands(self) -> list[str]:
        """Returns the command lines of its processes, but for sshd's own."""
        return [command for _, command in self.processes()]

    def processes(self) -> list[tuple[int, str]]:
        """Returns the same with the numbers that they have here."""
        return [(pid, command) for pid, command in _processes_in(self.name) if "sshd" not in command]


class SshHosts:
    """All of them, and how ssh gets there."""

    def __init__(self, hosts: list[SshHost], config: Path) -> None:
        self.hosts = hosts
        self.config = config

    def commands(self) -> list[str]:
        """Returns the command lines of all their processes."""
        return [command for host in self.hosts for command in host.commands()]


@contextlib.contextmanager
def ssh_hosts(folder: Path, count: int) -> Iterator[SshHosts]:
    """Makes the hosts; their files are this machine's."""
    for program, package in (
        ("ip", "iproute2"),
        ("sshd", "openssh-server"),
        ("ssh-keygen", "openssh-client"),
    ):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"hosts with ssh need the command {program} (package {package})")
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("hosts with ssh need Linux and root")
    number = _claim_number()
    bridge, network = _bridge(number), f"10.77.{number}"
    # Never of the number 0, which ssh would leave out where it looks the address up among the hosts it knows.
    network_v6 = f"fd00:77:{number + 1:x}::"
    hosts = [
        SshHost(
            f"t{number}n{i}",
            (f"{network}.{i}", *([f"{network_v6}{i}"] if socket.has_dualstack_ipv6() else [])),
            folder / f"n{i}",
        )
        for i in range(1, count + 1)
    ]
    try:
        config = _write_files(folder, hosts)
        _run("ip", "address", "add", f"{network}.254/24", "dev", bridge)
        if socket.has_dualstack_ipv6():
            _run("ip", "address", "add", f"{network_v6}ff/64", "dev", bridge, "nodad")
        _run("ip", "link", "set", bridge, "up")
        for host in hosts:
            _start(host, bridge, folder)
        for host in hosts:
            _wait_for(host, config)
        yield SshHosts(hosts, config)
    finally:
        for host in hosts:
            if host.process is not None:
                host.process.send_signal(signal.SIGKILL)
                host.process.wait()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, timeout=30)
            subprocess.run(["ip", "link", "delete", host.wire], capture_output=True, timeout=30)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True, timeout=30)


def _claim_number() -> int:
    """Returns a number that no other hosts on this machine have, by making the bridge of that number.

    Only the kernel knows what runs beside: a number made of the process's id met that of another test process.
    """
    first = random.randrange(_NETWORKS)
    for number in ((first + i) % _NETWORKS for i in range(_NETWORKS)):
        try:
            _run("ip", "link", "add", _bridge(number), "type", "bridge")
        except subprocess.CalledProcessError as error:
            if "exists" not in error.stderr:
                pytest.skip(f"this machine makes no bridges: {error.stderr.strip()}")
        else:
            return number
    raise AssertionError(
        f"bridges {_bridge(0)} to {_bridge(_NETWORKS - 1)} are all there: delete what was left"
    )


def _bridge(number: int) -> str:
    return f"tfdist-b{number}"


def _write_files(folder: Path, hosts: list[SshHost]) -> Path:
    Path("/run/sshd").mkdir(exist_ok=True)
    key = folder / "id"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    known = []
    for host in hosts:
        host.folder.mkdir()
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / "hostkey"))
        names = [
            host.name,
            *host.addresses,
            *(f"[{name}]:{OTHER_PORT}" for name in (host.name, host.address)),
        ]
        known.append(f"{','.join(names)} {(host.folder / 'hostkey.pub').read_text()}")
        listen = "\n            ".join(f"ListenAddress {address}" for address in host.addresses)
        (host.folder / "sshd_config").write_text(
            f"""
            Port 22
            Port {OTHER_PORT}
            {listen}
            HostKey {host.folder}/hostkey
            AuthorizedKeysFile {key}.pub
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            PermitRootLogin prohibit-password
            UsePAM no
            StrictModes no
            PidFile none
            """
        )
    (folder / "known_hosts").write_text("".join(known))
    names = "\n".join(f"{host.address} {host.name}" for host in hosts)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}\n")
    # Nobody listens: a look-up fails at once, rather than after seconds.
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    config = folder / "ssh_config"
    places = "\n".join(f"Host {host.name}\n  HostName {host.address}" for host in hosts)
    config.write_text(
        f"""
        Host *
          User root
          IdentityFile {key}
          IdentitiesOnly yes
          StrictHostKeyChecking yes
          UserKnownHostsFile {folder}/known_hosts
          GlobalKnownHostsFile /dev/null
        """
        + places
        + "\n"
    )
    return config


def _start(host: SshHost, bridge: str, folder: Path) -> None:
    _run("ip", "netns", "add", host.name)
    _run("ip", "link", "add", host.wire, "type", "veth", "peer", "name", "eth0", "netns", host.name)
    _run("ip", "link", "set", host.wire, "master", bridge, "up")
    for words in (
        ["link", "set", "lo", "up"],
        *(
            ["address", "add", f"{a}/64" if ":" in a else f"{a}/24", "dev", "eth0", *["nodad"] * (":" in a)]
            for a in host.addresses
        ),
        ["link", "set", "eth0", "up"],
    ):
        _run("ip", "-n", host.name, *words)
    script = (
        f"hostname {host.name}; mount --bind {folder}/hosts /etc/hosts; mount -t tmpfs shm /dev/shm; "
        f"mount --bind {folder}/resolv.conf /etc/resolv.conf; exec /usr/sbin/sshd -D -e -f {host.folder}/sshd_config"
    )
    inside = [
        "unshare",
        "--uts",
        "--ipc",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        script,
    ]
    with open(host.folder / "sshd.log", "wb") as log:
        host.process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{host.name}", *inside],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait_for(host: SshHost, config: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        done = subprocess.run(
            ["ssh", "-F", str(config), "-o", "BatchMode=yes", host.name, "true"],
            capture_output=True,
            timeout=30,
        )
        if done.returncode == 0:
            return
        log = (host.folder / "sshd.log").read_text()
        assert time.monotonic() < deadline, f"{done.stderr.decode()}\n{log}"
        time.sleep(0.1)


def _processes_in(netns: str) -> list[tuple[int, str]]:
    found = subprocess.run(
        ["ip", "netns", "pids", netns], capture_output=True, text=True, timeout=30
    ).stdout.split()
    processes = []
    for pid in found:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            processes.append((int(pid), command))
    return [(pid, command) for pid, command in processes if command.strip()]


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)
