"""A forked program is what one started anew would be: importing TensorFlow leaves nothing that forks would share."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import programs
import pytest

from tfdist.launcher import job
from tfdist.launcher.process.fork import can_fork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tasks are forked on Linux alone")


def run(folder, body, *words, env=None, forked=True):
    """Runs a script in a fork, or by a Python of its own."""
    script = folder / "a script.py"
    script.write_text(textwrap.dedent(body))
    env = {**os.environ, "PYTHONPATH": programs.REPOSITORY, **(env or {})}
    if forked:
        return programs.run([script, *words], cwd=folder, env=env, timeout=60)
    command = [sys.executable, script, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


SEES = """
    import json, os, signal, sys
    handlers = {number: str(signal.getsignal(number)) for number in (1, 2, 10, 13, 15, 17)}
    print(json.dumps([
        sys.argv, sys.path[0], os.getcwd(), __name__, __file__, sorted(os.listdir("/proc/self/fd"))[:3],
        len(os.listdir("/proc/self/fd")), handlers, os.environ.get("ONLY_HERE"), os.environ.get("HOME"),
        sys.stdin.read(), signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), sys.stdout.encoding,
        getattr(sys.modules["__main__"], "handlers", None) == handlers,
    ]))
"""


def test_program_sees_what_it_would_see_by_itself(tmp_path):
    found, wanted = (
        json.loads(run(tmp_path, SEES, "a b", "--c=1", env={"ONLY_HERE": "x"}, forked=forked).stdout)
        for forked in (True, False)
    )
    # A script of its own has no module `__main__` left of the launcher's; the handlers are its own.
    assert found[:-1] == wanted[:-1]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
        ("import atexit, sys; atexit.register(lambda: print('end', file=sys.stderr))", 0, "end\n"),
        (
            "import sys, threading, time\n"
            "def late():\n    time.sleep(0.3); print('late', file=sys.stderr)\n"
            "threading.Thread(target=late).start()",
            0,
            "late\n",
        ),
    ],
)
def test_ends_as_any_program(tmp_path, body, code, said):
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr) == (code, said)


def test_traceback_begins_with_the_program(tmp_path):
    done, wanted = (
        run(tmp_path, "def f():\n    raise ValueError('x')\nf()", forked=f) for f in (True, False)
    )
    assert done.returncode == wanted.returncode == 1
    assert done.stderr == wanted.stderr


def test_environment_is_shown_to_others(tmp_path):
    """By it the launcher's guard finds what is left of a job."""
    done = run(
        tmp_path,
        "print(open('/proc/self/environ').read().split(chr(0)))",
        env={"TFDIST_JOB": "of this test", "TF_CONFIG": "{}"},
    )
    assert "'TFDIST_JOB=of this test'" in done.stdout and "'TF_CONFIG={}'" in done.stdout


@pytest.mark.parametrize("name", ["random.random()", "numpy.random.rand()", "new64()"])
def test_forks_draw_different_numbers(tmp_path, name):
    """TensorFlow names the parts of functions by them, and two tasks' parts would meet on a ps under one name."""
    body = f"""
        import ctypes, numpy, os, random, tensorflow as tf
        library = os.path.join(os.path.dirname(tf.__file__), "libtensorflow_framework.so.2")
        new64 = ctypes.CDLL(library)._ZN3tsl6random5New64Ev
        print({name})
    """
    assert len({run(tmp_path, body).stdout for _ in range(3)}) == 3


def test_imports_start_nothing(tmp_path):
    """A fork has one thread; the locks that the others hold it would never get."""
    body = """
        import os
        from tensorflow.python.eager import context
        print(len(os.listdir("/proc/self/task")), context._context)
    """
    done = run(tmp_path, body)
    server = Path(f"/proc/{programs.server_pid()}/task")
    assert done.stdout.split() == ["1", "None"]
    # OpenBLAS starts its threads at import, and brings them through a fork.
    assert len(list(server.iterdir())) <= os.cpu_count()


@pytest.mark.parametrize(
    ("words", "can"),
    [
        ([sys.executable, "-m", "json.tool"], True),
        ([sys.executable, "train.py", "-m"], True),
        ([sys.executable, "-m"], False),
        ([sys.executable, "-u", "train.py"], False),
        (["sh", "-c", "true"], False),
    ],
)
def test_only_programs_of_this_python_are_forked(words, can):
    assert can_fork(words, gpu_device="/no/such/device") == can
    assert not can_fork(words, gpu_device="/dev/null")


def test_fork_dies_by_signals_and_leaves_no_zombie(tmp_path):
    (tmp_path / "s.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    with open(tmp_path / "out", "w") as out:
        program = programs.Program([tmp_path / "s.py"], cwd=tmp_path, stdout=out)
    deadline = time.monotonic() + 30
    while "up" not in (tmp_path / "out").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert program.wait(10) == -signal.SIGTERM
    assert not Path(f"/proc/{program.pid}").exists()


def test_allocator_keeps_its_memory_as_the_variables_say(tmp_path):
    """What the C library would have read at a program's start."""
    body = """
        import resource
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            [b"x" * 2**20 for _ in range(64)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults()
        print(faults())
    """
    given, kept = (int(run(tmp_path, body, env=env).stdout) for env in ({}, job._ALLOCATOR))
    assert kept < given / 4
