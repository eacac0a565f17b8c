"""Which tasks the launcher starts again, how often, and with what; the tasks are plain Python."""

import json

import pytest
from test_launcher import folder, run, write_script  # noqa: F401 - folder is a fixture

pytestmark = pytest.mark.cluster
DIE_FIRST = """
times = int(os.environ["TFDIST_RESTART"])
with open(me + "-started", "a") as file:
    file.write(os.environ["TF_CONFIG"] + "\\n")
def starts(task): return len(open(task + "-started").readlines()) if os.path.exists(task + "-started") else 0
def wait_for(**tasks):
    # Until each task (worker_0=2) was started that often: an interpreter may take seconds to begin.
    while any(starts(task.replace("_", "-")) < count for task, count in tasks.items()): time.sleep(0.01)
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
wait_for(worker_0=times + 1)
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
if me == "worker-0" and starts(me) == 1: os.kill(os.getpid(), signal.SIGKILL)
if me == "chief-0":
    wait_for(worker_0=2, ps_0=1)
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


def count_starts(folder, *tasks):  # noqa: F811
    return [len(starts(folder, task)) for task in tasks]


SERVE_AND_END = """
if me == "{dies}" and starts(me) == 1: wait_for({once}); os.kill(os.getpid(), signal.SIGKILL)
if me == "chief-0" and starts(me) == {chiefs}: wait_for({at_last}); time.sleep(1); sys.exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("dies", "counts"),
    [("chief-0", [2, 1, 1]), ("ps-0", [2, 1, 2])],
)
def test_ps_job_keeps_those_who_live(folder, dies, counts):  # noqa: F811
    """A dead chief takes nobody along, a dead ps the chief, which has to fill it again."""
    script = write(
        folder,
        SERVE_AND_END.format(
            dies=dies,
            once="chief_0=1, worker_0=1, ps_0=1",
            chiefs=2,
            at_last="chief_0={}, worker_0={}, ps_0={}".format(*counts),
        ),
    )
    done = run("--num_workers=1", "--num_ps=1", "--max_restarts=1", script)
    assert done.returncode == 0, done.stderr
    assert count_starts(folder, "chief-0", "worker-0", "ps-0") == counts
    assert len(set(map(str, [config["cluster"] for config in starts(folder, "chief-0")]))) == 1


def test_elastic_ps_job_goes_on_without_a_worker(folder):  # noqa: F811
    everyone = "chief_0=1, worker_0=1, worker_1=1, ps_0=1"
    script = write(folder, SERVE_AND_END.format(dies="worker-1", once=everyone, chiefs=1, at_last=everyone))
    done = run("--num_workers=1:2", "--num_ps=1", script)
    assert done.returncode == 0, done.stderr
    assert count_starts(folder, "chief-0", "worker-0", "worker-1", "ps-0") == [1, 1, 1, 1]
    assert "worker:1 was killed by SIGKILL (exit code 137); 1 workers go on" in done.stderr


def test_elastic_ps_job_takes_workers_in_again_while_it_works(folder):  # noqa: F811
    body = """
if me == "chief-0":
    from tfdist.cluster.heartbeat import Heartbeat
    heartbeat = Heartbeat.from_environment(os.environ)
    while starts("worker-1") < 3: heartbeat.beat(1); time.sleep(0.01)
    sys.exit(0)
if me == "worker-1" and starts(me) < 3: wait_for(worker_0=1, ps_0=1); os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    done = run("--num_workers=1:2", "--num_ps=1", "--rescale_every_secs=0.5", write(folder, body))
    assert done.returncode == 0, done.stderr
    assert count_starts(folder, "chief-0", "worker-0", "worker-1", "ps-0") == [1, 1, 3, 1]
    assert len(set(map(str, [config["cluster"] for config in starts(folder, "worker-1")]))) == 1
    assert done.stderr.count("starting worker:1 again, to go on with all workers") == 2


def test_too_few_workers_end_an_elastic_ps_job(folder):  # noqa: F811
    script = write(folder, "if me.startswith('worker'): os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert run("--num_workers=1:2", "--num_ps=1", script).returncode == 137


def test_elastic_sync_job_leaves_the_place_of_the_dead_empty_once(folder):  # noqa: F811
    body = """
wait_for(worker_0=times + 1)
if times < 2 and me == "worker-2" or times == 1 and me == "worker-1": os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1 if times == 2 else 60)
"""
    done = run("--num_workers=2:3", "--max_restarts=3", write(folder, body))
    assert done.returncode == 0, done.stderr
    sizes = [len(config["cluster"]["worker"]) for config in starts(folder, "worker-0")]
    assert sizes == [3, 2, 2]


def test_lost_peers_are_tried_again_and_a_failure_behind_them_is_not(folder):  # noqa: F811
    lost = "wait_for(worker_0=times + 1, worker_1=times + 1)\nsys.exit(75) if times == 0 else None"
    done = run("--num_workers=2", "--max_restarts=1", write(folder, lost))
    assert done.returncode == 0, done.stderr
    assert "lost the others (exit code 75)" in done.stderr
    assert count_starts(folder, "worker-0", "worker-1") == [2, 2]


def test_failure_behind_lost_peers_is_the_cause(folder):  # noqa: F811
    body = (
        "wait_for(worker_0=1, worker_1=1)\nsys.exit(75) if me == 'worker-0' else (time.sleep(1), sys.exit(1))"
    )
    done = run("--num_workers=2", "--max_restarts=1", write(folder, body))
    assert done.returncode == 1
    assert count_starts(folder, "worker-0", "worker-1") == [1, 1]


def test_stopped_task_is_found_and_started_again(folder):  # noqa: F811
    body = """
if times == 0 and me == "worker-1": os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(20 if times == 0 else 0)
"""
    done = run("--num_workers=2", "--max_restarts=1", write(folder, body))
    assert done.returncode == 0, done.stderr
    assert "worker:1 was stopped for 3 s, and killed" in done.stderr


def test_task_that_hangs_leaves_its_stack_and_is_started_again(folder):  # noqa: F811
    body = """
from tfdist.cluster.heartbeat import Heartbeat
heartbeat = Heartbeat.from_environment(os.environ)
def hang(): time.sleep(60)
for step in range(20):
    heartbeat.beat(step)
    time.sleep(0.01)
hang() if times == 0 else heartbeat.rest()
"""
    flags = ("--num_workers=1", "--max_restarts=1", "--hang_timeout_secs=1", "--run_dir=run")
    done = run(*flags, write(folder, body))
    assert done.returncode == 0, done.stderr
    assert "worker:0 made no step for 1 s" in done.stderr
    assert "in hang" in (folder / "run/logs/worker-0.log").read_text()


def test_restarts_long_ago_do_not_count(folder):  # noqa: F811
    script = write(folder, "time.sleep(1.2)\nif times < 2: os.kill(os.getpid(), signal.SIGKILL)")
    flags = ("--num_workers=1", "--max_restarts=1", "--restart_window_secs=1")
    done = run(*flags, script)
    assert done.returncode == 0, done.stderr
    assert len(starts(folder, "worker-0")) == 3
