"""The doctor looks at machines that ssh reaches, and names what is wrong with which."""

import glob
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from ssh_hosts import ssh_hosts

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.ci]
REPOSITORY = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with ssh_hosts(tmp_path_factory.mktemp("hosts"), 3) as hosts:
        yield hosts


def examine(lab, folder, *words, names=None):
    listed = ",".join(names or [host.name for host in lab.hosts])
    command = [
        sys.executable,
        "-m",
        "tfdist.doctor",
        f"--hosts={listed}",
        f"--ssh_config={lab.config}",
        *words,
    ]
    env = {**os.environ, "PYTHONPATH": REPOSITORY}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def errors(done):
    return [line for line in done.stdout.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("strategy", ["multiworker", "ps"])
def test_healthy_hosts_have_no_errors(lab, tmp_path, strategy):
    done = examine(lab, tmp_path, f"--strategy={strategy}", "--run_dir=run", "--recipe=digits_cnn")
    assert (done.returncode, errors(done)) == (0, []), done.stdout + done.stderr
    assert "run_dir" not in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert lab.commands() == []


def find_other_python():
    """A Python of this machine of another version, which knows nothing of our packages."""
    folders = [*os.environ["PATH"].split(os.pathsep), *glob.glob("/root/.pyenv/versions/*/bin")]
    say = "import platform, sys; print(sys.executable, platform.python_version())"
    for path in (path for folder in folders for path in glob.glob(f"{folder}/python3.1[0-3]")):
        # A version manager puts programs on the PATH that only say that there is no such version.
        done = subprocess.run([path, "-c", say], capture_output=True, text=True, timeout=30)
        words = done.stdout.split()
        if done.returncode == 0 and words[1].split(".")[:2] != platform.python_version().split(".")[:2]:
            return words
    return pytest.skip("there is no other Python on this machine")


def write_python(path, odd, line):
    """An interpreter that is another one on the host `odd`."""
    path.write_text(f'#!/bin/sh\n[ "$(hostname)" = {odd} ] && {line}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return f"--python={path}"


def test_wrong_python_is_named_with_its_host(lab, tmp_path):
    odd = lab.hosts[1].name
    python, version = find_other_python()
    flag = write_python(tmp_path / "python", odd, f'exec {python} "$@"')
    done = examine(lab, tmp_path, flag)
    assert done.returncode == 1, done.stdout + done.stderr
    found = errors(done)
    assert any(f"worker:1 on {odd}: Python is {version}" in line and python in line for line in found), (
        done.stdout
    )
    assert all(odd in line for line in found)


def test_python_without_packages_is_named_with_its_host(lab, tmp_path):
    """-S leaves out the installed packages; tfdist comes by PYTHONPATH."""
    odd = lab.hosts[1].name
    done = examine(lab, tmp_path, write_python(tmp_path / "python", odd, 'set -- -S "$@"'))
    assert done.returncode == 1, done.stdout + done.stderr
    assert {f"worker:1 on {odd} has no {name}" for name in ("tensorflow", "keras")} == {
        line.removeprefix("error: ").partition(" (")[0] for line in errors(done)
    }


def test_host_that_cannot_run_python_is_named_and_the_others_are_looked_at(lab, tmp_path):
    odd = lab.hosts[1].name
    flag = write_python(tmp_path / "python", odd, "exec /no/such/python")
    done = examine(lab, tmp_path, flag, "--data_files=none/*")
    assert done.returncode == 1
    found = errors(done)
    assert f"host {odd}: " in found[0] and "/no/such/python" in found[0]
    assert sum("no file on" in line for line in found) == 2


def test_hosts_that_do_not_reach_each_other_are_named(lab, tmp_path):
    """Two hosts have no route to each other; the launcher reaches both."""
    first, second, third = lab.hosts
    for host, other in ((first, second), (second, first)):
        subprocess.run(
            ["ip", "-n", host.name, "route", "add", "blackhole", other.address], check=True, timeout=30
        )
    try:
        done = examine(lab, tmp_path, "--wait_secs=5")
    finally:
        for host, other in ((first, second), (second, first)):
            subprocess.run(
                ["ip", "-n", host.name, "route", "delete", "blackhole", other.address], check=True, timeout=30
            )
    assert done.returncode == 1
    assert {line.partition(" at ")[0] for line in errors(done)} == {
        f"error: worker:0 on {first.name} does not reach worker:1 on {second.name}",
        f"error: worker:1 on {second.name} does not reach worker:0 on {first.name}",
    }
    assert third.name not in done.stdout


def test_host_without_ssh_is_named(lab, tmp_path):
    done = examine(
        lab,
        tmp_path,
        names=[lab.hosts[0].name, "192.0.2.1"],
    )
    assert done.returncode == 1
    assert any("host 192.0.2.1: " in line for line in errors(done)), done.stdout


def test_lost_host_is_read_from_the_logs(tmp_path):
    (tmp_path / "lab").mkdir()
    with ssh_hosts(tmp_path / "lab", 2) as own:
        names = ",".join(host.name for host in own.hosts)
        words = [f"--hosts={names}", f"--ssh_config={own.config}", "--run_dir=run"]
        process = subprocess.Popen(
            [sys.executable, "-m", "tfdist.launch", *words, "--", "sh", "-c", "echo ready; sleep 1000"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": REPOSITORY},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in own.hosts:
            assert "ready" in process.stdout.readline()
        own.hosts[1].power_off()
        process.communicate(timeout=90)
    done = subprocess.run(
        [sys.executable, "-m", "tfdist.doctor", "logs", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "worker:1 died first" in done.stdout and f"lost its host {own.hosts[1].name}" in done.stdout
