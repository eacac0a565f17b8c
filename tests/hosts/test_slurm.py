"""`srun python -m tfdist.train` and `launch/slurm.sbatch` on a real Slurm, whose node names do not resolve."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import slurm_cluster
from tiers import rarely

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.ci]

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/machines.md").read_text()
METRIC = 0.97  # what tests/cluster/test_recipes.py asks of digits_cnn
TRAIN = [sys.executable, "-m", "tfdist.train"]
DISTRIBUTIONS = ["block", "cyclic", "plane=2", "arbitrary"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The variables with which a Slurm of the nodes n1 and n2, of 4 CPUs each, is found."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as env:
        path = f"{Path(sys.executable).parent}:{env['PATH']}"  # launch/slurm.sbatch starts python3
        yield {**os.environ, **env, "PYTHONPATH": str(REPOSITORY), "PATH": path}


@pytest.fixture
def run(slurm, tmp_path):
    def run(*words, **env):
        return subprocess.run(
            words, cwd=tmp_path, env=slurm | env, capture_output=True, text=True, timeout=560
        )

    return run


def explain(done):
    return done.stdout[-4000:] + done.stderr[-4000:]


def accuracy(output):
    found = re.findall(r"test .*\baccuracy (\d\.\d+)", output)
    assert found, output[-4000:]
    return float(found[-1])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_roles_are_shown_and_are_those_of_slurm(run, tmp_path, distribution):
    """Each rank knows whether Slurm has started it where the others believe it to be, and refuses otherwise."""
    (tmp_path / "hosts").write_text("n2\nn1\nn2\nn2\nn1\n")
    hosts = {"SLURM_HOSTFILE": str(tmp_path / "hosts")} if distribution == "arbitrary" else {}
    flags = ["-n5", f"--distribution={distribution}", "--label"]
    done = run("srun", *flags, *TRAIN, "--strategy=ps", "--num_ps=2", "--dry_run", **hosts)
    assert done.returncode == 0, explain(done)
    roles = dict(re.findall(r"^(\d): # .* this process is (\S+)$", done.stdout, re.MULTILINE))
    assert roles["0"] == "chief:0"
    assert sorted(roles.values()) == ["chief:0", "ps:0", "ps:1", "worker:0", "worker:1"]
    clusters = set(re.findall(r'TF_CONFIG=\{"cluster": (\{.*?\})', done.stdout))
    assert len(clusters) == 1, explain(done)
    # As Slurm reaches its nodes; the names would not resolve.
    assert set(re.findall(r'"([\d.]+):\d+"', clusters.pop())) == {"127.0.0.1"}


def test_port_that_is_taken_is_named(run):
    """And the other task is ended for it."""
    program = "import socket, subprocess, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1])))"
    program += "; print(s.getsockname()[1], flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        port = holder.stdout.readline().strip()
        done = run("srun", "-n2", "--kill-on-bad-exit=1", *TRAIN, TFDIST_PORT=port)
    finally:
        holder.communicate(timeout=30)
    assert done.returncode != 0
    assert re.search(rf"port {port} of worker:0 .* cannot be bound .*TFDIST_PORT", done.stderr), explain(done)


def test_srun_that_was_not_used_is_said(run, tmp_path):
    (tmp_path / "job").write_text(f"#!/bin/sh\n{shlex.join(TRAIN)} --strategy=one_device --dry_run\n")
    done = run("sbatch", "--wait", "-n2", "--output=log", "job")
    assert done.returncode == 0, explain(done)
    log = (tmp_path / "log").read_text()
    assert log.count("srun was not used") == 1 and "runs it alone" in log


def commands():
    """The commands of the page's part about Slurm."""
    (block,) = re.findall(r"^## Slurm\n.*?```sh\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    return [re.split(r"\s+#\s", line)[0] for line in block.splitlines()]


# Under ps by sbatch, and the other strategy by srun; each is also started by mpirun, and by the launcher itself.
@pytest.mark.parametrize("command", rarely(commands(), "srun"))
def test_command_of_the_readme_runs(run, tmp_path, command, pytestconfig):
    """Without ps in a distribution that is not Slurm's own; with --everything those of srun train to the metric."""
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    strategy = "ps" if "--strategy=ps" in words else "multiworker"
    is_batch = words[0] == "sbatch"
    is_short = is_batch or not pytestconfig.getoption("--everything")
    words += ["--epochs=1", "--steps_per_epoch=2"] if is_short else []
    words += [] if is_batch else ["--verbose=2"]
    if is_batch:
        words.insert(1, "--wait")
    done = run(*words, SLURM_DISTRIBUTION="block" if strategy == "ps" else "cyclic")
    output = done.stdout + "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, output[-4000:] + done.stderr[-4000:]
    if "--dry_run" in words:
        assert "this process is chief:0" in output
        return
    assert f"training digits_cnn under {strategy}" in output and "the run is in runs" in output
    assert is_short or accuracy(output) > METRIC


@pytest.mark.everything
def test_divided_model_trains(run):
    words = [*TRAIN, "--recipe=text_lm", "--strategy=pipeline", "--num_stages=2", "--tensor_parallel=2"]
    short = ["--epochs=1", "--steps_per_epoch=2", "--verbose=2"]
    done = run("srun", "-n4", "--distribution=cyclic", *words, *short)
    assert done.returncode == 0, explain(done)
    assert re.search(r"2 stages: .* 2 blocks: ", done.stdout) and accuracy(done.stdout) > 0, explain(done)


def job_state(run, job):
    """A job's state and how often it was restarted, or ("", 0) when it is gone."""
    shown = run("scontrol", "show", "job", "--oneliner", job).stdout
    return tuple(re.findall(r"\b(?:JobState|Restarts)=(\S+)", shown)) or ("", "0")


def wait_until(what, *, secs, explain):
    deadline = time.monotonic() + secs
    while not what():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", rarely(["multiworker", "ps"], "ps"))
def test_job_that_is_told_saves_requeues_and_goes_on(run, tmp_path, strategy):
    """The signal is the one of `sbatch --signal=TERM@60`, for whose minute the test does not wait."""
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    flags = ["--recipe=digits_cnn", f"--strategy={strategy}", "--epochs=8", "--verbose=2"]
    sent = run("sbatch", "-N2", "--ntasks-per-node=1", "--output=log", "launch/slurm.sbatch", *flags)
    assert sent.returncode == 0, explain(sent)
    job = sent.stdout.split()[-1]
    log = tmp_path / "log"

    def read():
        return log.read_text() if log.exists() else ""

    try:
        wait_until(lambda: re.search(r"epoch +2/8", read()), secs=200, explain=read)
        run("scancel", "--signal=TERM", job)
        wait_until(lambda: job_state(run, job)[1] == "1", secs=90, explain=read)
        # Slurm lets a requeued job wait for two minutes. In the second in which it was killed a node would refuse it.
        time.sleep(2)
        wait_until(
            lambda: run("scontrol", "update", f"JobId={job}", "StartTime=now").returncode == 0,
            secs=60,
            explain=read,
        )
        wait_until(
            lambda: job_state(run, job)[0] in ("COMPLETED", "FAILED", "TIMEOUT", ""), secs=400, explain=read
        )
    finally:
        run("scancel", job)
    assert job_state(run, job)[0] == "COMPLETED", read()
    assert re.search(r"SIGTERM: the state after epoch \d+.* is saved", read())
    assert re.search(r"resumed after epoch [1-9]", read()), read()[-4000:]
    assert len(re.findall(r"epoch +1/8", read())) == 1  # not from the beginning
    assert read().count("tfdist: requeued") == 1, read()[-4000:]
    assert accuracy(read()) > METRIC
