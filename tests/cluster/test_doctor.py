"""The doctor on this machine: before a run, by way of the launcher, and after runs that really died."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import programs
import pytest

from tfdist.cluster.ports import PortReservation
from tfdist.cluster.spec import Cluster, Task, render_tf_config
from tfdist.diagnostics.rendezvous import Rendezvous

pytestmark = pytest.mark.cluster
REPOSITORY = str(Path(__file__).parents[2])

NAN_RECIPE = '''
"""One target is not a number."""
import keras
import numpy as np

import tfdist


def build_model() -> keras.Model:
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def build_data(split: str):
    x, y = np.ones((64, 4), "float32"), np.zeros((64, 1), "float32")
    y[50] = float("nan")
    return x, y


RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=16, epochs=2)
'''
# Takes the port that is another's own, before that one starts its server.
TAKES_A_PORT = """
import json, os, socket
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]
if index == 1:
    taken = socket.create_server(("127.0.0.1", int(config["cluster"]["worker"][1].rpartition(":")[2])))
import tfdist
tfdist.initialize(strategy="multiworker")
"""


def start(*words, cwd, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": REPOSITORY, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=200):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def run(*words, cwd):
    """Runs a command that trains."""
    done = programs.run(["-m", *words], cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def read_logs(folder, run_dir="run"):
    code, out, err = finish(start("tfdist.doctor", "logs", run_dir, cwd=folder))
    assert code == 1, out + err
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("num_ps", [0, 2])
def test_healthy_machine_has_no_errors(tmp_path, num_ps):
    words = ["--num-workers=3", f"--num-ps={num_ps}", "--run-dir=run", "--recipe=digits_cnn"]
    code, out, err = finish(start("tfdist.doctor", *words, cwd=tmp_path))
    assert (code, err) == (0, ""), out + err
    assert "error: " not in out and "run_dir" not in out
    assert list(tmp_path.iterdir()) == []


def test_findings_are_json_and_errors_exit_with_1(tmp_path):
    words = ["--num_workers=2", "--recipe=no_such", "--json"]
    code, out, _ = finish(start("tfdist.doctor", *words, cwd=tmp_path))
    assert code == 1
    findings = json.loads(out)
    assert [f["severity"] for f in findings if "no_such" in f["text"]] == ["error", "error"]
    assert all(set(f) == {"severity", "text", "remedy", "issue"} for f in findings)


@pytest.mark.parametrize("words", [["--no_such=1"], ["logs"], ["logs", "no/such/run"], ["--hosts=h1:x"]])
def test_mistake_in_the_flags_is_one_line(tmp_path, words):
    code, out, err = finish(start("tfdist.doctor", *words, cwd=tmp_path))
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def doctors(folder, *words, second_env=None):
    """Runs it as each of two tasks that somebody else starts; returns exit codes and outputs."""
    with PortReservation(2) as held:
        cluster = Cluster(addresses={"worker": tuple(f"127.0.0.1:{port}" for port in held.ports)})
        started = []
        for task, more in zip(cluster.tasks, ({}, second_env or {}), strict=True):
            own = [word.format(task=task.index) for word in words]
            config = {"TF_CONFIG": render_tf_config(cluster.with_task(task))}
            started.append(start("tfdist.doctor", *own, cwd=folder, env=config | more))
        return [finish(process)[:2] for process in started]


def test_tasks_that_somebody_else_starts_meet(tmp_path):
    done = doctors(tmp_path, "--run_dir=run")
    assert [code for code, _ in done] == [0, 0], done
    assert "run_dir" not in done[0][1] + done[1][1]
    assert list(tmp_path.iterdir()) == []


def test_run_dir_that_the_others_do_not_see_is_a_warning(tmp_path):
    for name in ("run-0", "run-1"):
        (tmp_path / name).mkdir()
    done = doctors(tmp_path, "--run_dir=run-{task}")
    assert [code for code, _ in done] == [0, 0], done
    assert "warning: worker:1 on " in done[1][1] and "does not see what worker:0" in done[1][1]
    assert "does not see" not in done[0][1]  # what a worker writes nobody needs
    assert [list(path.iterdir()) for path in tmp_path.iterdir()] == [[], []]


def test_task_that_is_alone_names_the_missing_one_and_a_taken_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, PortReservation(1) as held:
        ports = (taken.getsockname()[1], held.ports[0])
        cluster = Cluster(
            addresses={"worker": tuple(f"127.0.0.1:{port}" for port in ports)}, task=Task("worker", 0)
        )
        env = {"TF_CONFIG": render_tf_config(cluster)}
        code, out, _ = finish(start("tfdist.doctor", "--wait_secs=1", cwd=tmp_path, env=env))
    assert code == 1
    assert f"port {ports[0]} of worker:0" in out and "Address already in use" in out
    assert f"does not reach worker:1 at 127.0.0.1:{ports[1]} (Connection refused)" in out


def test_clock_that_is_ahead_is_named(tmp_path):
    """Python's clock alone, since this machine's cannot be set."""
    (tmp_path / "sitecustomize.py").write_text("import time; own = time.time; time.time = lambda: own() + 90")
    path = os.pathsep.join([str(tmp_path), REPOSITORY])
    first, second = doctors(tmp_path, second_env={"PYTHONPATH": path})
    assert (first[0], second[0]) == (0, 0)
    assert re.search(r"warning: the clock of worker:1 on \S+ is (89|90)\.\d s ahead of worker:0", first[1]), (
        first
    )
    assert re.search(r"warning: the clock of worker:0 on \S+ is (89|90)\.\d s behind worker:1", second[1]), (
        second
    )


def test_facts_are_told_to_nobody_else():
    """Whoever does not know the cluster's addresses hears a name and a time."""
    with PortReservation(2) as held:
        addresses = {"worker": tuple(f"127.0.0.1:{port}" for port in held.ports)}
        cluster = Cluster(addresses=addresses, task=Task("worker", 0))
        with Rendezvous(cluster, {"secret": 1}, run_dir=None, wait_secs=1.0):
            answers = []
            for words in ({"task": "worker:1", "digest": "guessed"}, {"task": "worker:1"}, [], "x"):
                with socket.create_connection(("127.0.0.1", held.ports[0]), timeout=10) as connection:
                    connection.sendall(json.dumps(words).encode() + b"\n")
                    answers.append(connection.makefile("rb").readline())
    assert set(json.loads(answers[0])) == {"task", "time"}
    assert answers[1:] == [b"", b"", b""]


def test_killed_task_is_named_with_time_and_step(tmp_path):
    words = ["--strategy=multiworker", "--num_workers=2", "--run_dir=run", "--epochs=2"]
    code, _, err = run(
        "tfdist.train", *words, "--chaos=kill:worker:1@step=20", "--max_restarts=0", cwd=tmp_path
    )
    assert code == 137, err
    line = read_logs(tmp_path)
    assert re.search(
        r"worker:1 died first, at \d{4}-\d\d-\d\d [\d:]{8}, at step 2\d: it was killed by SIGKILL", line
    )
    assert "on purpose: chaos: kill:worker:1" in line


def test_nan_is_named(tmp_path):
    (tmp_path / "nan.py").write_text(NAN_RECIPE)
    words = ["--strategy=multiworker", "--num_workers=2", "--run_dir=run", "--recipe=nan.py"]
    code, _, err = run("tfdist.train", *words, cwd=tmp_path)
    assert code == 1, err
    line = read_logs(tmp_path)
    assert re.match(r"error: worker:\d died first", line)
    assert "most likely NaN or infinity" in line and "the targets" in line


def test_taken_port_is_named(tmp_path):
    (tmp_path / "port.py").write_text(TAKES_A_PORT)
    code, _, err = run(
        "tfdist.launch", "--preload", "--num_workers=2", "--run_dir=run", "port.py", cwd=tmp_path
    )
    assert code == 1, err
    line = read_logs(tmp_path)
    assert "worker:1 died first" in line and "most likely its port was taken" in line


def test_run_that_ended_well_has_no_cause(tmp_path):
    code, _, err = finish(
        start("tfdist.launch", "--num_workers=2", "--run_dir=run", "--", "true", cwd=tmp_path)
    )
    assert code == 0, err
    code, out, _ = finish(start("tfdist.doctor", "logs", "run", cwd=tmp_path))
    assert code == 0 and "no task has failed" in out
