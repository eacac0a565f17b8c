"""The door seen from outside: two network namespaces on one wire stand for two machines."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from namespaces import ADDRESSES, ADDRESSES_V6, two_hosts

from tfdist.cluster.network_isolation import isolate_port
from tfdist.cluster.spec import Cluster

pytestmark = pytest.mark.cluster

REPOSITORY = str(Path(__file__).parents[2])
SERVER_ADDRESS = ADDRESSES[0]
GREETED, REFUSED, UNHEARD = "greeted", "ConnectionRefusedError", "TimeoutError"
# The namespaces are new, so that every port in them is free.
PORT = 3001

SERVER = """\
import socket, sys, threading
from tfdist.cluster.network_isolation import isolate_port, isolate_when_listening
from tfdist.cluster.peer_allowlist import may_filter

host, port, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
watcher = isolate_when_listening(port) if when == "once it listens" else None
listener = socket.create_server((host, port), family=family, dualstack_ipv6=family == socket.AF_INET6)

def greet():
    while True:
        with listener.accept()[0] as connection:
            connection.sendall(b"hello")

threading.Thread(target=greet, daemon=True).start()
print("listening", flush=True)
for _ in sys.stdin:
    if peers := sys.argv[4:]:
        isolate_port(port, device=None, peers=peers)
        print(may_filter(), flush=True)
    elif watcher is None:
        print(isolate_port(port), flush=True)
    else:
        watcher.join(30)
        print(not watcher.is_alive(), flush=True)
"""

TF_SERVERS = {
    "tfdist": "import tfdist; tfdist.initialize(strategy='ps')",
    "tensorflow": (
        "import tensorflow as tf; resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver();"
        "tf.distribute.Server(resolver.cluster_spec(), 'ps', 0).join()"
    ),
}

CONNECT = """\
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3) as connection:
        print("greeted" if sys.argv[3] == "connect" or connection.recv(5) == b"hello" else "silent")
except OSError as error:
    print(type(error).__name__)
"""


def connect(host, address, port=PORT, *, until="greeting"):
    """What a process on a host meets at an address: a greeting, or the name of an error."""
    done = subprocess.run(
        host.command(sys.executable, "-S", "-c", CONNECT, address, str(port), until),
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout.strip() or done.stderr


@pytest.fixture(scope="module")
def hosts():
    """A server and a client, joined by a wire."""
    with two_hosts() as pair:
        yield pair


@pytest.fixture
def start(hosts):
    """Starts Python programs on the server host; they end with the test."""
    started = []

    def start(program, *words, prefix=(), env=None, stderr=None):
        process = subprocess.Popen(
            hosts[0].command(*prefix, sys.executable, "-c", program, *words),
            env={**os.environ, "PYTHONPATH": REPOSITORY, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=30)


def ask_to_close(process):
    process.stdin.write("close\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("listening_on", "loopbacks"), [("0.0.0.0", ["127.0.0.1"]), ("::", ["127.0.0.1", "::1"])]
)
def test_other_machines_are_refused_after_closing_and_loopback_is_not(hosts, start, listening_on, loopbacks):
    if listening_on == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server, client = hosts
    process = start(SERVER, listening_on, str(PORT), "when asked")
    assert process.stdout.readline() == "listening\n"
    assert connect(client, SERVER_ADDRESS) == GREETED
    assert {connect(server, address) for address in loopbacks} == {GREETED}

    assert ask_to_close(process) == "True"
    assert connect(client, SERVER_ADDRESS) == REFUSED
    assert {connect(server, address) for address in loopbacks} == {GREETED}

    # A second call finds the socket that the first one closed.
    assert ask_to_close(process) == "True"
    assert connect(client, SERVER_ADDRESS) == REFUSED


def test_closing_needs_no_privilege(hosts, start):
    if shutil.which("setpriv") is None:
        pytest.skip("dropping capabilities needs the command setpriv (util-linux)")
    prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    process = start(SERVER, "0.0.0.0", str(PORT), "when asked", prefix=prefix)
    assert process.stdout.readline() == "listening\n"
    capabilities = Path(f"/proc/{process.pid}/status").read_text().partition("CapEff:")[2].split()[0]
    assert int(capabilities, 16) == 0
    assert ask_to_close(process) == "True"
    assert connect(hosts[1], SERVER_ADDRESS) == REFUSED
    assert connect(hosts[0], "127.0.0.1") == GREETED


@pytest.mark.parametrize(
    ("addresses", "stranger"), [(ADDRESSES, "192.0.2.9"), (ADDRESSES_V6, "2001:db8::1:0:2")]
)
def test_guests_are_greeted_and_strangers_unheard(hosts, start, addresses, stranger):
    if ":" in stranger and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server, client = hosts
    for peer, met in ((addresses[1], GREETED), (stranger, UNHEARD)):
        process = start(SERVER, "::" if ":" in stranger else "0.0.0.0", str(PORT), "when asked", peer)
        assert process.stdout.readline() == "listening\n"
        assert connect(client, addresses[0]) == GREETED
        assert ask_to_close(process) == "True"
        assert connect(client, addresses[0]) == met
        assert connect(server, "127.0.0.1") == GREETED
        process.kill()
        process.wait()


def test_kernel_that_lets_nobody_filter_leaves_the_door_open_and_says_so(hosts, start):
    """Some let every user, others want CAP_NET_ADMIN: what is said is what is so."""
    if shutil.which("setpriv") is None:
        pytest.skip("dropping capabilities needs the command setpriv (util-linux)")
    prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    process = start(SERVER, "0.0.0.0", str(PORT), "when asked", "192.0.2.9", prefix=prefix)
    assert process.stdout.readline() == "listening\n"
    is_filtered = ask_to_close(process) == "True"
    assert connect(hosts[1], SERVER_ADDRESS) == (UNHEARD if is_filtered else GREETED)


def test_close_when_listening_waits_for_the_socket(hosts, start):
    process = start(SERVER, "0.0.0.0", str(PORT), "once it listens")
    assert process.stdout.readline() == "listening\n"
    assert ask_to_close(process) == "True"
    assert connect(hosts[1], SERVER_ADDRESS) == REFUSED
    assert connect(hosts[0], "127.0.0.1") == GREETED


def test_other_ports_stay_open(hosts, start):
    closed, other = (start(SERVER, "0.0.0.0", str(port), "when asked") for port in (PORT, PORT + 1))
    for process in (closed, other):
        assert process.stdout.readline() == "listening\n"
    assert ask_to_close(closed) == "True"
    assert connect(hosts[1], SERVER_ADDRESS, PORT) == REFUSED
    assert connect(hosts[1], SERVER_ADDRESS, PORT + 1) == GREETED


def wait_for(what, *, secs):
    deadline = time.monotonic() + secs
    while not what():
        assert time.monotonic() < deadline, f"not within {secs} s"
        time.sleep(0.2)


def test_ps_task_on_a_localhost_cluster_cannot_be_reached_from_another_machine(hosts, start, tmp_path):
    server, client = hosts
    ports = {}
    for first, (name, program) in zip((4001, 5001), TF_SERVERS.items(), strict=True):
        roles = {role: [f"localhost:{first + i}"] for i, role in enumerate(("chief", "worker", "ps"))}
        tf_config = json.dumps({"cluster": roles, "task": {"type": "ps", "index": 0}})
        with open(tmp_path / name, "wb") as log:
            start(program, env={"TF_CONFIG": tf_config}, stderr=log)
        ports[name] = first + 2

    def reach(host, address, name):
        return connect(host, address, ports[name], until="connect")

    for name in TF_SERVERS:
        wait_for(lambda name=name: reach(server, "127.0.0.1", name) == GREETED, secs=120)
    # Without the door TensorFlow is open to everybody, whatever address the cluster names.
    assert reach(client, SERVER_ADDRESS, "tensorflow") == GREETED
    # The door closes some milliseconds after TensorFlow has begun to listen.
    wait_for(lambda: reach(client, SERVER_ADDRESS, "tfdist") == REFUSED, secs=5)
    assert reach(server, "localhost", "tfdist") == GREETED


def test_only_a_listening_socket_of_that_port_is_closed():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as connection:
            descriptors = len(os.listdir("/proc/self/fd"))
            assert not isolate_port(connection.getsockname()[1])
            assert not isolate_port(bound.getsockname()[1])
            assert isolate_port(port)
            assert len(os.listdir("/proc/self/fd")) == descriptors
            with listener.accept()[0] as accepted:
                accepted.sendall(b"hello")
                assert connection.recv(5) == b"hello"


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ({"worker": ("localhost:1", "127.0.0.1:2")}, True),
        ({"chief": ("[::1]:1",), "worker": ("localhost:2",)}, True),
        ({"chief": ("localhost:1",), "worker": ("localhost:2",), "ps": ("10.0.0.2:3",)}, False),
        ({"worker": ("localhost.example.com:1",)}, False),
        ({}, False),
    ],
)
def test_is_loopback_wants_it_of_every_task(addresses, expected):
    assert Cluster(addresses=addresses).is_loopback is expected
