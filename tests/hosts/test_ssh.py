"""One command starts a run on machines that ssh reaches, and leaves nothing there, whatever ends it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ssh_hosts import OTHER_PORT, ssh_hosts

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.ci]
REPOSITORY = str(Path(__file__).parents[2])
METRIC = 0.97  # what tests/cluster/test_recipes.py asks of digits_cnn


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with ssh_hosts(tmp_path_factory.mktemp("hosts"), 3) as hosts:
        yield hosts


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "a folder"
    path.mkdir()
    return path


def start(lab, module, folder, *words, slots=1, hosts=None, **options):
    names = ",".join(f"{host.name}:{slots}" for host in hosts or lab.hosts)
    command = [sys.executable, "-m", module, f"--hosts={names}", f"--ssh_config={lab.config}", *words]
    env = {**os.environ, "PYTHONPATH": REPOSITORY, "GREETING": "hello there"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes, **options)


def run(lab, module, folder, *words, timeout=240, **options):
    process = start(lab, module, folder, *words, **options)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(condition, secs=30):
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


ALL_REDUCE = """
from mpi4py import MPI
import numpy as np, os, socket
world = MPI.COMM_WORLD
total = np.empty(100_000, "f4")
world.Allreduce(np.full(100_000, 10.0 ** world.rank, "f4"), total)
print(socket.gethostname(), world.rank, world.size, int(total.min()), int(total.max()), flush=True)
"""


def test_mpi_spans_the_hosts(lab, folder, monkeypatch):
    """Two ranks share memory on the first host, one is on the second: `mpiexec` is nowhere, nor any port of ours."""
    pytest.importorskip("mpi4py", reason="needs the extra tfdist[mpi]")
    # These hosts have one kernel, by which UCX takes them for one machine, whose memory it could share.
    monkeypatch.setenv("UCX_TLS", "tcp")
    (folder / "program.py").write_text(ALL_REDUCE)
    done = run(
        lab,
        "tfdist.launch",
        folder,
        *("--strategy=multiworker", "--num_workers=3", "program.py"),
        slots=2,
        hosts=lab.hosts[:2],
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = sorted(line.partition("] ")[2].split() for line in done.stdout.splitlines() if "] " in line)
    first, second = (host.name for host in lab.hosts[:2])
    assert said == [
        [first, "0", "3", "111", "111"],
        [first, "1", "3", "111", "111"],
        [second, "2", "3", "111", "111"],
    ]


def test_tasks_are_placed_and_get_environment_and_folder(lab, folder):
    script = 'printf "%s|%s|%s|%s\\n" "$(hostname)" "$GREETING" "$PWD" "$TF_CONFIG"; echo said >&2'
    done = run(
        lab, "tfdist.launch", folder, "--num_ps=2", "--num_workers=4", "--", "sh", "-c", script, slots=2
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        task, _, rest = line.partition("] ")
        host, greeting, own_folder, config = rest.split("|")
        assert (greeting, own_folder) == ("hello there", str(folder))
        found[task[1:]] = host
        cluster = json.loads(config)["cluster"]
    first, second, third = (host.name for host in lab.hosts)
    places = {"chief:0": first, "ps:0": first, "ps:1": second}
    places |= {"worker:0": first, "worker:1": first, "worker:2": second, "worker:3": second}
    assert found == places
    assert [address.rpartition(":")[0] for address in cluster["worker"]] == [first, first, second, second]
    assert third not in done.stdout
    assert "[worker:3] said" in done.stderr
    assert lab.commands() == []


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("exit 3", 3, "worker:0 exited with code 3"),
        ("exit 255", 254, "exited with code 254"),
        ("kill -9 $$", 137, "was killed by SIGKILL"),
    ],
)
def test_first_cause_comes_home(lab, folder, program, code, said):
    script = f'case "$TF_CONFIG" in *\'"index": 0\'*) {program};; *) sleep 60;; esac'
    done = run(lab, "tfdist.launch", folder, "--", "sh", "-c", script)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1]
    assert lab.commands() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_launcher(lab, folder, number):
    """Not even what has made itself a session of its own."""
    script = "setsid sleep 1000 & echo ready; exec sleep 2000"
    process = start(lab, "tfdist.launch", folder, "--grace_secs=2", "--", "sh", "-c", script)
    try:
        for _ in lab.hosts:
            assert "ready" in process.stdout.readline()
        wait_until(lambda: sum("sleep" in c for c in lab.commands()) == 2 * len(lab.hosts))
        process.send_signal(number)
        wait_until(lambda: lab.commands() == [])
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_task_does_not_outlive_its_agent(lab, folder):
    """As where a machine that is short of memory kills the agent."""
    process = start(
        lab, "tfdist.launch", folder, "--", "sh", "-c", "setsid sleep 1000 & echo ready; exec sleep 2000"
    )
    for _ in lab.hosts:
        assert "ready" in process.stdout.readline()
    victim = lab.hosts[1]
    (agent,) = (
        pid
        for pid, command in victim.processes()
        if re.match(r"\S*python\S* -m tfdist.launcher.ssh.agent", command)
    )
    os.kill(agent, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 137 and f"lost its host {victim.name}" in err.splitlines()[-1]
    wait_until(lambda: lab.commands() == [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--python=/no/such/python"], "/no/such/python"),
        (["--ssh_port=1"], "onnection refused"),
    ],
)
def test_host_that_cannot_run_tasks_is_named(lab, folder, words, said):
    done = run(lab, "tfdist.launch", folder, *words, "--", "true")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert said in last and "host t" in last and "must work without a password" in last


def test_port_and_key_are_those_of_the_flags(lab, folder, tmp_path):
    config = tmp_path / "config"
    config.write_text(re.sub("IdentityFile .*", "IdentityFile /no/such/key", lab.config.read_text()))
    (key,) = re.findall("IdentityFile (.*)", lab.config.read_text())
    lab_without = type(lab)(lab.hosts, config)
    refused = run(lab_without, "tfdist.launch", folder, "--", "true")
    assert refused.returncode == 2 and "Permission denied" in refused.stderr
    words = [f"--ssh_port={OTHER_PORT}", f"--identity_file={key}"]
    done = run(lab_without, "tfdist.launch", folder, *words, "--", "sh", "-c", "echo $SSH_CONNECTION")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [str(OTHER_PORT)] * len(lab.hosts)


def test_unknown_host_key_is_refused(lab, folder, tmp_path):
    config = tmp_path / "config"
    config.write_text(lab.config.read_text().replace("known_hosts", "no_known_hosts"))
    lab_without = type(lab)(lab.hosts, config)
    done = run(lab_without, "tfdist.launch", folder, "--", "true")
    assert done.returncode == 2
    assert "Host key verification failed" in done.stderr


@pytest.mark.parametrize(
    ("strategy", "failure"),
    [
        pytest.param("multiworker", "cut:worker:1@step=30", marks=pytest.mark.everything),
        ("ps", "kill:ps:0@step=30"),
    ],
)
def test_digits_learn_on_three_hosts_whatever_happens(lab, folder, strategy, failure):
    """The connection to one is cut, or what runs there is killed: all start again, from the last checkpoint."""
    done = run(
        lab,
        "tfdist.train",
        folder,
        f"--strategy={strategy}",
        "--run_dir=run",
        "--verbose=2",
        "--epochs=8",
        "--checkpoint_every_steps=10",
        f"--chaos={failure}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (accuracy,) = re.findall(r"test .*accuracy (\S+)", done.stdout)
    assert float(accuracy) > METRIC
    assert f"chaos: {failure}" in done.stderr
    assert "goes on" in done.stderr
    assert lab.commands() == []


@pytest.mark.everything
def test_divided_model_spans_the_hosts(lab, folder):
    """Blocks of a layer share a host, stages lie on different ones."""
    flags = ["--strategy=pipeline", "--num_stages=2", "--tensor_parallel=2", "--num_workers=4"]
    words = [*flags, "--recipe=text_lm", "--epochs=1", "--steps_per_epoch=2", "--verbose=2"]
    done = run(lab, "tfdist.train", folder, *words, slots=2, hosts=lab.hosts[:2])
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"2 stages: .* 2 blocks: ", done.stdout) and re.search(r"test .*accuracy", done.stdout)
    assert lab.commands() == []


def test_host_that_is_powered_off_is_named(folder, tmp_path):
    """Without restarts the run ends, as soon as that is noticed."""
    (tmp_path / "lab").mkdir()
    with ssh_hosts(tmp_path / "lab", 2) as own:
        process = start(own, "tfdist.launch", folder, "--", "sh", "-c", "echo ready; sleep 1000")
        for _ in own.hosts:
            assert "ready" in process.stdout.readline()
        own.hosts[1].power_off()
        start_at = time.monotonic()
        _, err = process.communicate(timeout=90)
    assert time.monotonic() - start_at < 20
    assert process.returncode == 137
    assert f"lost its host {own.hosts[1].name}" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("strategy", "num_workers"),
    [pytest.param("multiworker", "1:2", marks=pytest.mark.everything), ("ps", "2")],
)
def test_training_survives_a_host_that_is_powered_off(folder, tmp_path, strategy, num_workers):
    """It goes on from the last checkpoint: with the hosts that are left, or on one that stood by."""
    (tmp_path / "lab").mkdir()
    with ssh_hosts(tmp_path / "lab", 2 if strategy == "multiworker" else 3) as own:
        process = start(
            own,
            "tfdist.train",
            folder,
            f"--strategy={strategy}",
            f"--num_workers={num_workers}",
            "--checkpoint_every_steps=5",
            "--epochs=30",
            "--run_dir=run",
            "--verbose=2",
        )
        try:
            wait_until(lambda: list((folder / "run/checkpoints").glob("*.npz")), 120)
            own.hosts[1].power_off()
            start_at = time.monotonic()
            lines = [""]
            while "goes on" not in lines[-1]:
                lines.append(process.stderr.readline())
                assert lines[-1], "the run has ended"
            assert time.monotonic() - start_at < 60
            assert any(f"lost its host {own.hosts[1].name}" in line for line in lines), "".join(lines)
            assert sum("starting all tasks again" in line for line in lines) == 1, "".join(lines)
        finally:
            process.terminate()
            process.communicate(timeout=90)
    assert own.commands() == []


SERVE = """
import json, os, time, tfdist
tfdist.initialize(strategy="multiworker")
print("ready", *json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"], flush=True)
time.sleep(100)
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)"


@pytest.mark.parametrize(
    ("words", "admitted", "is_closed"),
    [
        ([], "", True),
        (["--listen_interface=eth0"], "any", True),
        ([], "any", False),
    ],
    ids=["peers only", "own interface only", "open"],
)
def test_foreign_network_cannot_connect_to_a_closed_door(
    lab, folder, monkeypatch, words, admitted, is_closed
):
    """A second cable into the first host: its servers hear their peers alone, or their own network, unless told so."""
    monkeypatch.setenv("TFDIST_ADMIT", admitted)
    first, second, third = lab.hosts
    wire = f"f{first.name}"
    ip = ["ip", "-n", first.name]
    subprocess.run(
        ["ip", "link", "add", wire, "type", "veth", "peer", "name", "eth1", "netns", first.name], check=True
    )
    subprocess.run(["ip", "address", "add", "192.0.2.2/30", "dev", wire], check=True)
    subprocess.run(["ip", "link", "set", wire, "up"], check=True)
    subprocess.run([*ip, "address", "add", "192.0.2.1/30", "dev", "eth1"], check=True)
    subprocess.run([*ip, "link", "set", "eth1", "up"], check=True)
    (folder / "serve.py").write_text(SERVE)
    process = start(lab, "tfdist.launch", folder, "--grace_secs=1", *words, "serve.py", hosts=[first, second])
    try:
        line = ""
        while "ready" not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        port = line.split()[2].rpartition(":")[2]

        def connects(address, *prefix):
            return (
                subprocess.run(
                    [*prefix, sys.executable, "-c", CONNECT, address, port], capture_output=True
                ).returncode
                == 0
            )

        assert connects(first.address, "ip", "netns", "exec", second.name)
        assert connects("192.0.2.1") == (not is_closed)
        # One that is no part of the cluster, in its own network.
        assert connects(first.address, "ip", "netns", "exec", third.name) == (admitted == "any")
    finally:
        process.terminate()
        _, err = process.communicate(timeout=60)
        subprocess.run(["ip", "link", "delete", wire], check=True)
    assert err.count("obey anyone who can connect") == (not is_closed)


def test_interface_with_two_tasks_on_a_host_is_refused(lab, folder):
    done = run(lab, "tfdist.launch", folder, "--listen_interface=eth0", "--", "true", slots=2)
    assert done.returncode == 2
    assert "with 2 tasks on" in done.stderr.splitlines()[-1]


SCREEN = (Path(REPOSITORY) / "docs/machines.md").read_text().partition("\n## ssh\n")[2].partition("\n## ")[0]
COMMANDS = [
    line.partition("#")[0].split()
    for line in re.findall(r"```sh\n(.*?)```", SCREEN, re.DOTALL)[0].splitlines()
]


@pytest.mark.parametrize(
    "command",
    [
        # What trains does so from the file of hosts, by default.
        pytest.param(
            words,
            id=" ".join(words[2:4]),
            marks=pytest.mark.everything
            if "tfdist.train" in words and "--hostfile=hosts.txt" not in words
            else (),
        )
        for words in COMMANDS
    ],
)
def test_command_of_the_readme_runs(lab, folder, command):
    # In the file stand bare IPv6 addresses, if there is such a thing.
    place = -1 if "--hostfile=hosts.txt" in command else 0
    names = {f"h{i}": [host.name, *host.addresses[1:]][place] for i, host in enumerate(lab.hosts, start=1)}
    (folder / "hosts.txt").write_text(f"{names['h1']} slots=2\n{names['h2']} # one\n")
    (folder / "my_script.py").write_text("import tfdist\nprint('I am', tfdist.initialize().cluster.task)\n")
    words = [re.sub(r"\bh[12]\b", lambda match: names[match[0]], word) for word in command[1:]]
    words.insert(2, f"--ssh_config={lab.config}")
    if "tfdist.train" in words:
        words += ["--epochs=1", "--steps_per_epoch=2", "--verbose=2"]
    env = {**os.environ, "PYTHONPATH": REPOSITORY}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "hostname" in words:
        assert sorted(re.findall(r"\] (\S+)", done.stdout)) == sorted(names[name] for name in ("h1", "h2"))
    elif "tfdist.train" in words:
        assert re.search(r"test .*accuracy", done.stdout)
    else:
        assert len(re.findall("I am worker:", done.stdout)) == 2
