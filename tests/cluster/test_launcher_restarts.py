"""Which tasks the launcher starts again, how often, and with what; the tasks are plain Python."""

import json

import pytest
from test_launcher import folder, run, write_script  # noqa: F401 - folder is a fixture

pytestmark = pytest.mark.cluster
DIE_FIRST = """
times = int(os.environ["TFDIST_RESTART"])
with open(me + "-started", "a") as file:
    file.write(os.environ["TF_CONFIG"] + "\\n")
{body}
"""


def starts(folder, task):  # noqa: F811
    return [json.loads(line) for line in (folder / f"{task}-started").read_text().splitlines()]


def write(folder, body):  # noqa: F811
    return write_script(folder, DIE_FIRST.format(body=body))


def test_killed_task_starts_all_again_on_new_ports(folder):  # noqa: F811
    script = write(
        folder,
        """
while len(open("worker-0-started").readlines() if os.path.exists("worker-0-started") else []) <= times:
    time.sleep(0.01)
if times < 2 and me == "worker-1": os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)
""",
    )
    done = run("--num_workers=2", "--max_restarts=3", script)
    assert done.returncode == 0, done.stderr
    first, second, third = starts(folder, "worker-0")
    addresses = [config["cluster"]["worker"] for config in (first, second, third)]
    assert len({address for pair in addresses for address in pair}) == 6
    assert "worker:1 was killed by SIGKILL" in done.stderr
    assert "starting all tasks again (2 of 3)" in done.stderr


def test_restarts_end_and_the_cause_is_the_exit_code(folder):  # noqa: F811
    script = write(folder, "os.kill(os.getpid(), signal.SIGKILL)")
    done = run("--num_workers=1", "--max_restarts=2", script)
    assert done.returncode == 137
    assert len(starts(folder, "worker-0")) == 3
    assert "again" not in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("end", ["sys.exit(1)", "sys.exit(2)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_exception_or_a_wanted_end_is_final(folder, end):  # noqa: F811
    """The one would come again, the other was meant."""
    done = run("--num_workers=1", "--max_restarts=3", write(folder, end))
    assert done.returncode in (1, 2, 143)
    assert len(starts(folder, "worker-0")) == 1


def test_nothing_is_started_again_unless_asked(folder):  # noqa: F811
    script = write(folder, "os.kill(os.getpid(), signal.SIGKILL)")
    assert run("--num_workers=1", script).returncode == 137
    assert len(starts(folder, "worker-0")) == 1


def test_ps_worker_comes_back_alone_on_its_own_port(folder):  # noqa: F811
    script = write(
        folder,
        """
if me == "worker-0" and len(open("worker-0-started").readlines()) == 1: os.kill(os.getpid(), signal.SIGKILL)
if me == "chief-0":
    while len(open("worker-0-started").readlines() if os.path.exists("worker-0-started") else []) < 2:
        time.sleep(0.01)
    sys.exit(0)
time.sleep(60)
""",
    )
    done = run("--num_workers=1", "--num_ps=1", "--max_restarts=1", script)
    assert done.returncode == 0, done.stderr
    first, second = starts(folder, "worker-0")
    assert first == second
    assert len(starts(folder, "chief-0")) == len(starts(folder, "ps-0")) == 1
    assert "worker:0 was killed by SIGKILL (exit code 137); starting it again (1 of 1)" in done.stderr
