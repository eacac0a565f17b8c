"""The launcher with real processes, real ports and real signals; the tasks are plain Python, so they start fast."""

import concurrent.futures
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import tfdist
from tfdist.errors import LaunchError
from tfdist.launcher.job import Job
from tfdist.launcher.local import run_local
from tfdist.launcher.supervise import supervisor

pytestmark = pytest.mark.cluster

HEADER = """
import json, os, signal, subprocess, sys, time
task = json.loads(os.environ["TF_CONFIG"])["task"]
me = f"{task['type']}-{task['index']}"
def leave(name, text=""):
    with open(name + ".new", "w") as file:
        file.write(str(text))
    os.rename(name + ".new", name)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The very tfdist that is under test, also where it is not installed.
    root = str(Path(tfdist.__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    return tmp_path


def write_script(folder, body):
    path = folder / "task's script.py"
    path.write_text(HEADER + textwrap.dedent(body))
    return path.name


def launch_args(*args):
    return [sys.executable, "-m", "tfdist.launch", *map(str, args)]


def run(*args, **options):
    return subprocess.run(launch_args(*args), capture_output=True, text=True, timeout=60, **options)


@contextlib.contextmanager
def started(*args, **options):
    # Under nohup SIGHUP is ignored, and a process hands that on to those it starts.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    process = subprocess.Popen(launch_args(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        process.kill()  # its guard then ends the tasks
        process.communicate(timeout=30)


def wait_for(condition, secs=30):
    deadline = time.monotonic() + secs
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
    return value


def wait_for_files(folder, *names):
    wait_for(lambda: all((folder / name).exists() for name in names))
    return [(folder / name).read_text() for name in names]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_every_task_runs_with_its_own_tf_config_and_prefix(folder):
    script = write_script(
        folder,
        """
        print("out", me, sys.argv[1:], os.environ["TFDIST_STRATEGY"], flush=True)
        print("err", me, file=sys.stderr)
        leave(me, os.environ["TF_CONFIG"])
        """,
    )
    done = run("--num_workers=2", "--strategy=mwms", "--run_dir=a run", script, "--x=1 2")
    assert done.returncode == 0, done.stderr
    assert "[worker:0] out worker-0 ['--x=1 2'] multiworker\n" in done.stdout
    assert sorted(done.stderr.splitlines()) == ["[worker:0] err worker-0", "[worker:1] err worker-1"]
    configs = [json.loads(text) for text in wait_for_files(folder, "worker-0", "worker-1")]
    assert configs[0]["cluster"] == configs[1]["cluster"]
    log = (folder / "a run/logs/worker-1.log").read_text()
    assert sorted(log.splitlines()) == ["err worker-1", "out worker-1 ['--x=1 2'] multiworker"]


def test_first_task_starts_at_once(folder):
    def start_secs():
        before = time.time()
        return float(run("--num_workers=1", "--", "date", "+%s.%N").stdout.split()[1]) - before

    def python_secs():
        before = time.time()
        subprocess.run([sys.executable, "-c", "import argparse, selectors, subprocess"], check=True)
        return time.time() - before

    # The best of some, and of Python alone at the same time, for a machine that is busy.
    assert min(start_secs() for _ in range(5)) < max(0.5, 5 * min(python_secs() for _ in range(5)))


def test_bytes_survive_whole(folder):
    script = write_script(
        folder,
        r"""
        out = sys.stdout.buffer
        out.write(b"caf\xe9 " + b"x" * 500_000 + b"\n"); out.flush()
        out.write(b"bar 1\rbar 2\rbar 3\n"); out.flush()
        out.write(b"no end"); out.flush()
        """,
    )
    done = subprocess.run(launch_args("--run_dir=r", script), capture_output=True, timeout=60)
    lines = done.stdout.split(b"\n")
    assert lines[0] == b"[worker:0] caf\xe9 " + b"x" * 500_000
    assert lines[-2:] == [b"[worker:0] no end", b""] and b"[worker:0] bar 3" in lines
    kept = (folder / "r/logs/worker-0.log").read_bytes()
    assert kept == b"caf\xe9 " + b"x" * 500_000 + b"\nbar 1\rbar 2\rbar 3\nno end"


def test_many_lines_of_many_tasks_are_neither_lost_nor_mixed(folder):
    script = write_script(folder, 'for i in range(5000): print(f"{me} {i} " + "z" * 50)')
    done = run("--num_workers=4", script)
    for index in range(4):
        mine = [line for line in done.stdout.splitlines() if line.startswith(f"[worker:{index}] ")]
        expected = [f"[worker:{index}] worker-{index} {i} " + "z" * 50 for i in range(5000)]
        assert mine == expected


def test_first_failure_is_shown_last_and_gives_the_exit_code(folder):
    script = write_script(
        folder,
        """
        if task["index"] == 1:
            while not (os.path.exists("worker-0") and os.path.exists("worker-2")):
                time.sleep(0.01)
            for i in range(50): print("line", i)
            sys.stderr.write("ValueError: the real cause")
            sys.stdout.flush()
            os._exit(7)
        def end(*_):
            print("noise of a victim", flush=True)
            os._exit(9)
        signal.signal(signal.SIGTERM, end)
        leave(me)
        time.sleep(60)
        """,
    )
    done = run("--num_workers=3", "--run_dir=r", script)
    assert done.returncode == 7
    *_, before_last, last = done.stderr.splitlines()
    assert before_last == "[worker:1] ValueError: the real cause"
    assert last == f"tfdist.launch: worker:1 exited with code 7; whole output: {folder}/r/logs/worker-1.log"
    assert "[worker:1] line 49" in done.stderr and "[worker:1] line 20\n" not in done.stderr
    assert "noise" not in done.stdout + done.stderr
    assert "noise of a victim" in (folder / "r/logs/worker-2.log").read_text()


def test_death_by_signal_is_named(folder):
    script = write_script(
        folder,
        """
        if task["index"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """,
    )
    done = run("--num_workers=2", script)
    assert done.returncode == 137
    assert done.stderr.splitlines()[-1] == "tfdist.launch: worker:0 was killed by SIGKILL (exit code 137)"


def test_victim_that_swallows_sigterm_is_killed_after_the_grace(folder):
    script = write_script(
        folder,
        """
        if task["index"] == 0:
            while not os.path.exists("worker-1"): time.sleep(0.01)
            sys.exit(4)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave(me)
        time.sleep(60)
        """,
    )
    start = time.monotonic()
    done = run("--num_workers=2", "--grace_secs=0.3", script)
    assert done.returncode == 4 and time.monotonic() - start < 20
    assert done.stderr.splitlines()[-1] == "tfdist.launch: worker:0 exited with code 4"


def test_ps_job_ends_well_when_the_chief_does(folder):
    script = write_script(
        folder,
        """
        if task["type"] != "chief":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a TensorFlow server may
            leave(me)
            time.sleep(60)
        while not (os.path.exists("worker-0") and os.path.exists("ps-0")): time.sleep(0.01)
        print("trained")
        """,
    )
    start = time.monotonic()
    done = run("--num_workers=1", "--strategy=ps", script)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "[chief:0] trained\n"
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_is_passed_on_and_gives_the_exit_code(folder, number):
    script = write_script(
        folder,
        """
        def end(number, _):
            leave(me + "-got", number)
            sys.exit(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end)
        leave(me)
        time.sleep(60)
        """,
    )
    with started("--num_workers=2", script) as launcher:
        wait_for_files(folder, "worker-0", "worker-1")
        launcher.send_signal(number)
        assert launcher.wait(timeout=20) == 128 + number
    assert wait_for_files(folder, "worker-0-got", "worker-1-got") == [str(int(number))] * 2


def test_ps_job_asks_the_chief_first_so_that_it_can_save(folder):
    script = write_script(
        folder,
        """
        def end(*_):
            if task["type"] == "chief":
                time.sleep(0.5)  # saves; needs the ps for it
                leave("ps-asked-early", os.path.exists("ps-0-got"))
            leave(me + "-got")
            os._exit(0)
        signal.signal(signal.SIGTERM, end)
        leave(me)
        time.sleep(60)
        """,
    )
    with started("--num_workers=1", "--num_ps=1", script) as launcher:
        wait_for_files(folder, "chief-0", "worker-0", "ps-0")
        launcher.terminate()
        assert launcher.wait(timeout=20) == 143
    assert wait_for_files(folder, "ps-asked-early", "worker-0-got", "ps-0-got")[0] == "False"


def test_second_signal_kills_at_once(folder):
    script = write_script(
        folder,
        """
        signal.signal(signal.SIGINT, lambda *_: leave(me + "-asked"))
        leave(me, os.getpid())
        while True: time.sleep(60)
        """,
    )
    with started("--num_workers=2", "--grace_secs=600", script) as launcher:
        pids = wait_for_files(folder, "worker-0", "worker-1")
        launcher.send_signal(signal.SIGINT)
        wait_for_files(folder, "worker-0-asked", "worker-1-asked")
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=20) == 130
    assert not any(is_running(pid) for pid in pids)


FAMILY = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = "import time; time.sleep(60)"
    near = subprocess.Popen([sys.executable, "-c", code])
    far = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    leave(me, f"{os.getpid()} {near.pid} {far.pid}")
"""


def test_nothing_outlives_a_launcher_that_is_killed(folder):
    script = write_script(folder, FAMILY + "    time.sleep(60)\n")
    with started("--num_workers=2", "--num_ps=1", script) as launcher:
        pids = " ".join(wait_for_files(folder, "chief-0", "worker-0", "worker-1", "ps-0")).split()
        assert len(pids) == 12 and all(is_running(pid) for pid in pids)
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not any(is_running(pid) for pid in pids), secs=10)


def test_launcher_killed_while_it_starts_leaves_nothing(folder):
    script = write_script(folder, 'leave(me + f"-{os.getpid()}")\ntime.sleep(60)')
    for delay in (0.03, 0.05, 0.07, 0.09, None):
        with started("--num_workers=8", script) as launcher:
            if delay is None:
                wait_for(
                    lambda: list(folder.glob("worker-*"))
                )  # the first one is up, the others are on their way
            else:
                time.sleep(delay)
            launcher.kill()

    def running():
        commands = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if path.name != str(os.getpid()) and os.readlink(path / "cwd") == str(folder):
                    commands.append((path / "cmdline").read_bytes())
        return [command for command in commands if command]

    wait_for(lambda: not running(), secs=10)
    time.sleep(0.5)
    assert not running()


def test_nothing_outlives_a_job_that_ends_well(folder):
    script = write_script(folder, FAMILY)
    assert run("--num_workers=1", script).returncode == 0
    pids = wait_for_files(folder, "worker-0")[0].split()
    assert not any(is_running(pid) for pid in pids)


def test_nested_launcher_dies_with_the_outer_one(folder):
    script = write_script(folder, "leave(me, os.getpid())\ntime.sleep(60)")
    inner = launch_args("--num_workers=2", script)
    with started("--num_workers=1", "--", *inner) as launcher:
        pids = wait_for_files(folder, "worker-0", "worker-1")
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not any(is_running(pid) for pid in pids), secs=10)


def test_simultaneous_launchers_never_share_a_port(folder):
    script = write_script(
        folder,
        """
        import socket
        config = json.loads(os.environ["TF_CONFIG"])
        host, port = config["cluster"][task["type"]][task["index"]].split(":")
        with socket.create_server((host, int(port))):
            leave(f"{sys.argv[1]}-{me}", port)
            while not os.path.exists("all-up"): time.sleep(0.02)
        """,
    )
    with contextlib.ExitStack() as stack:
        launchers = [stack.enter_context(started("--num_workers=3", script, n)) for n in range(10)]
        names = [f"{n}-worker-{i}" for n in range(10) for i in range(3)]
        ports = wait_for_files(folder, *names)
        (folder / "all-up").touch()
        assert [launcher.wait(timeout=30) for launcher in launchers] == [0] * 10
    assert len(set(ports)) == 30


def test_reader_that_goes_away_ends_the_job(folder):
    script = write_script(
        folder, 'leave(me, os.getpid())\nwhile True: print("line", flush=True); time.sleep(0.01)'
    )
    with started("--num_workers=1", script) as launcher:
        (pid,) = wait_for_files(folder, "worker-0")
        launcher.stdout.close()
        launcher.stdout = None
        assert launcher.wait(timeout=20) == 141
    assert not is_running(pid)


def test_chief_knows_the_width_of_the_terminal(folder):
    script = write_script(folder, 'print(os.environ.get("COLUMNS", "none"))')
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    try:
        process = subprocess.Popen(launch_args("--num_workers=1", script), stdout=theirs, env=env)
        assert process.wait(timeout=30) == 0
        assert os.read(ours, 1000).decode().strip() == f"[worker:0] {120 - len('[worker:0] ')}"
    finally:
        os.close(ours)
        os.close(theirs)


def test_later_failure_to_start_ends_with_one_line(folder):
    bad = folder / "bad"
    bad.write_text("#!/no/such/interpreter\n")
    bad.chmod(0o755)
    done = run("--num_workers=2", "--", "./bad")
    assert done.returncode == 2 and done.stderr.startswith("tfdist.launch: cannot start './bad'")


def test_neither_launch_nor_its_help_loads_tensorflow():
    code = (
        "import sys, tfdist.launch, tfdist.cluster.environments;"
        "print({'tensorflow', 'keras', 'rich'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.slow
def test_tensorflow_servers_listen_on_the_ports_that_are_held_for_them(folder):
    script = write_script(
        folder,
        """
        import tensorflow as tf
        config = json.loads(os.environ["TF_CONFIG"])
        cluster = tf.train.ClusterSpec(config["cluster"])
        if task["type"] != "chief":
            server = tf.distribute.Server(cluster, job_name=task["type"], task_index=task["index"])
            server.join()
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        coordinator = tf.distribute.coordinator.ClusterCoordinator(tf.distribute.ParameterServerStrategy(resolver))
        with coordinator.strategy.scope():
            total = tf.Variable(0.0)
        for _ in range(10):
            coordinator.schedule(tf.function(lambda: total.assign_add(1.0)))
        coordinator.join()
        print("total", total.numpy())
        """,
    )
    done = run("--num_workers=1", "--num_ps=1", script)
    assert done.returncode == 0, done.stderr
    assert "[chief:0] total 10.0" in done.stdout


def test_worker_that_outlives_its_peers_is_mentioned(monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "SETTLE_SECS", 0.1)
    job = Job(command=["sh", "-c", """case $TF_CONFIG in *'"index": 1'*) sleep 2;; esac"""], num_workers=2)
    assert run_local(job) == 0
    assert "worker:1 still run 0.1 s after the others ended" in capfd.readouterr().err


def test_caller_gets_its_handlers_and_descriptors_back(folder):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    descriptors = os.listdir("/proc/self/fd")
    assert run_local(Job(command=["true"], num_workers=3)) == 0
    with pytest.raises(LaunchError):
        run_local(Job(command=["/no/such/program"], num_workers=2, run_dir=str(folder)))
    assert os.listdir("/proc/self/fd") == descriptors
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_job_runs_outside_the_main_thread():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_local, Job(command=["sh", "-c", "exit 5"])).result(timeout=30) == 5


def test_full_disk_under_the_launchers_own_output_does_not_end_it(folder):
    """It says so on the other stream, and the tasks run to their end."""
    script = write_script(folder, """for i in range(200): print("x" * 1000)\nleave("done-" + me)""")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            launch_args("--num_workers=2", script), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stdout ends here") == 1
    wait_for_files(folder, "done-worker-0", "done-worker-1")
