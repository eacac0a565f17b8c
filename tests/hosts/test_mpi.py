"""`mpirun … python -m tfdist.train` with a real Open MPI, on this machine and on two, and with a real MPICH."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import ADDRESSES, two_hosts
from tiers import rarely

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.ci]

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/machines.md").read_text()
METRIC = 0.97  # what tests/cluster/test_recipes.py asks of digits_cnn
TRAIN = [sys.executable, "-m", "tfdist.train"]
# mpirun calls it as it would call ssh: HOST COMMAND. The second host needs a name of its own.
AGENT = """\
#!/bin/sh
shift
exec {enter} unshare --uts sh -c "hostname other-host; $*"
"""


def find_mpirun(maker):
    """The MPI of that maker: Debian's Open MPI and the `mpich` wheel of the exchange both call theirs `mpirun`."""
    programs = [
        program
        for folder in [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)]
        for name in ("mpirun.openmpi", "mpirun")
        if (program := shutil.which(name, path=folder))
    ]
    for program in programs:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30)
        if maker in done.stdout:
            return program
    return pytest.skip(f"mpirun of {maker} is missing (Open MPI: openmpi-bin; HYDRA: pip install mpich)")


@pytest.fixture
def start(tmp_path):
    def start(*command):
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=560,
        )

    return start


@pytest.fixture
def mpirun(start):
    """Runs Open MPI's mpirun, on this machine or, by a prefix, on another."""
    program = find_mpirun("Open MPI")

    def mpirun(*words, prefix=()):
        own = [program, "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
        own += [] if prefix else ["--mca", "oob_tcp_if_include", "lo"]  # no door to other machines
        return start(*prefix, *own, *words)

    return mpirun


def explain(done):
    return done.stdout[-4000:] + done.stderr[-4000:]


def accuracy(output):
    (last,) = re.findall(r"test .*\baccuracy (\d\.\d+)", output)
    return float(last)


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as pair:
        yield pair


def test_ranks_on_two_hosts_find_each_other(mpirun, hosts, tmp_path):
    """mpirun names no hosts: the ranks meet where it runs."""
    agent = tmp_path / "agent"
    agent.write_text(AGENT.format(enter=shlex.join(hosts[1].command())))
    agent.chmod(0o755)
    slots = ",".join(f"{address}:2" for address in ADDRESSES)
    flags = ["-np", "4", "--host", slots, "--mca", "plm_rsh_agent", str(agent), "-x", "PYTHONPATH"]
    words = [*TRAIN, "--strategy=ps", "--epochs=1", "--steps_per_epoch=4", "--verbose=2"]
    shown = mpirun(*flags, *words, "--dry_run", prefix=hosts[0].command())
    assert shown.returncode == 0, explain(shown)
    clusters = set(re.findall(r'TF_CONFIG=\{"cluster": (\{.*?\})', shown.stdout))
    assert len(clusters) == 1, explain(shown)
    here, there = ADDRESSES
    assert re.sub(r":\d+", "", clusters.pop()) == (
        f'{{"chief": ["{here}"], "worker": ["{here}", "{there}"], "ps": ["{there}"]}}'
    )
    done = mpirun(*flags, *words, prefix=hosts[0].command())
    assert done.returncode == 0, explain(done)
    assert "the run is in" in done.stdout


@pytest.mark.everything
def test_divided_model_trains(mpirun):
    words = [*TRAIN, "--recipe=text_lm", "--strategy=pipeline", "--num_stages=2", "--tensor_parallel=2"]
    done = mpirun("-np", "4", *words, "--epochs=1", "--steps_per_epoch=2", "--verbose=2")
    assert done.returncode == 0, explain(done)
    assert re.search(r"2 stages: .* 2 blocks: ", done.stdout) and accuracy(done.stdout) > 0, explain(done)


def commands():
    """The commands of the page's part about MPI."""
    (block,) = re.findall(r"^## MPI\n.*?```sh\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    return [re.split(r"\s+#\s", line)[0] for line in block.splitlines()]


@pytest.mark.parametrize("command", rarely(commands(), "mpirun -np 4"))
def test_command_of_the_readme_runs(mpirun, command, pytestconfig):
    """With --everything to the metric."""
    program, *words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    assert program == "mpirun"
    is_ps = "--strategy=ps" in words
    # Each task on one core alone, where TensorFlow's parameter servers would hang.
    bound = ["--bind-to", "core:overload-allowed"] if is_ps else []
    is_short = not pytestconfig.getoption("--everything")
    words += [] if "--dry_run" in words else ["--verbose=2"]
    words += ["--epochs=1", "--steps_per_epoch=2"] if is_short else []
    done = mpirun(*bound, *words)
    assert done.returncode == 0, explain(done)
    if "--dry_run" in words:
        assert "this process is chief:0" in done.stdout
    else:
        assert f"training digits_cnn under {'ps' if is_ps else 'multiworker'}" in done.stdout
        assert is_short or accuracy(done.stdout) > METRIC


def test_mpich_starts_the_same_run(start):
    flags = ["-np", "2", *TRAIN, "--epochs=1", "--steps_per_epoch=2", "--verbose=2"]
    # Hydra's proxies are told by which interface they find it: no door to other machines.
    done = start(find_mpirun("HYDRA"), "-iface", "lo", *flags)
    assert done.returncode == 0, explain(done)
    assert "training digits_cnn under multiworker" in done.stdout and "the run is in runs" in done.stdout
