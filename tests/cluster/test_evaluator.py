"""The task that evaluates beside the training finds what training would have found between its epochs."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest
from test_train_command import run_train

import tfdist.train
from tfdist.commands import place

pytestmark = pytest.mark.cluster
# All checkpoints are kept: four such epochs take less time than the evaluator to begin.
RUN = [
    "--recipe=digits_cnn",
    "--epochs=4",
    "--global_batch_size=128",
    "--keep_checkpoints=9",
    "--run_dir=run",
]


start = functools.partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What a run finds that evaluates by itself, after each epoch, and which model it keeps."""
    folder = tmp_path_factory.mktemp("plain")
    done = run_train(folder, *RUN, "--keep_best=val_accuracy")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_lines(folder / "run/metrics.jsonl")
    best = json.loads((folder / "run/best.json").read_text())
    accuracies = [line["val_accuracy"] for line in lines]
    assert best["value"] == max(accuracies) == accuracies[best["epoch"]]
    keras.models.load_model(folder / "run/best.keras")
    assert json.loads((folder / "run/results.json").read_text())["best"] == best
    return [{n: v for n, v in line.items() if n.startswith("val_")} for line in lines], best


def check(folder, expected, tolerance=4e-3):
    """Each epoch was evaluated once, as between the epochs of a run that does so itself."""
    lines = read_lines(folder / "run/eval.jsonl")
    assert sorted(line["epoch"] for line in lines) == [0, 1, 2, 3]
    for line in lines:
        for name, value in expected[0][line["epoch"]].items():
            assert line[name] == pytest.approx(value, abs=tolerance), name
        assert line["step"] == (line["epoch"] + 1) * 12
    return lines


@pytest.mark.ci
def test_evaluates_each_epoch_and_keeps_the_best(tmp_path, expected):
    flags = ["--strategy=multiworker", "--num_workers=2", "--evaluator", "--keep_best=val_accuracy"]
    done = run_train(tmp_path, *RUN, *flags, env={"TFDIST_REPORT": "on"})
    assert done.returncode == 0, done.stderr[-3000:]
    check(tmp_path, expected, 0.1)  # two replicas draw other dropout masks than one
    assert all("val_loss" not in line for line in read_lines(tmp_path / "run/metrics.jsonl"))
    best = json.loads((tmp_path / "run/best.json").read_text())
    assert best["value"] == pytest.approx(expected[1]["value"], abs=0.1)
    model = keras.models.load_model(tmp_path / "run/best.keras")
    assert model.count_params() > 0
    assert list((tmp_path / "run/tensorboard/validation").iterdir())
    assert "val_accuracy" in (tmp_path / "run/report.html").read_text()
    # By hand, of a run that is over: nothing is left to do.
    before = (tmp_path / "run/eval.jsonl").read_text()
    # Whatever has started it: it is no rank that others would wait for.
    rank = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    done = run_train(tmp_path, "--mode=follow", "--run_dir=run", env=rank)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/eval.jsonl").read_text() == before


def find_follower(run_dir):
    """Returns the process that follows a run, None while there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "--mode=follow" in words and f"--run_dir={run_dir}" in words:
            return int(folder.name)
    return None


@pytest.mark.ci
def test_survives_its_own_death(tmp_path, expected):
    command = [sys.executable, "-m", "tfdist.train", *RUN[:-1], f"--run_dir={tmp_path}/run", "--evaluator"]
    with start(command, cwd=tmp_path) as process:
        deadline = time.monotonic() + 120
        while (pid := find_follower(f"{tmp_path}/run")) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert "the evaluator" in errors and "starting it again" in errors
    check(tmp_path, expected)
    assert find_follower(f"{tmp_path}/run") is None


@pytest.mark.ci
def test_ends_with_a_run_that_is_killed(tmp_path):
    command = [sys.executable, "-m", "tfdist.train", *RUN[:-1], f"--run_dir={tmp_path}/run", "--evaluator"]
    with start(command, cwd=tmp_path) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run/eval.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = find_follower(f"{tmp_path}/run")
        process.kill()
        process.wait()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_is_the_evaluator_of_tf_config(tmp_path, expected):
    cluster = {"worker": ["127.0.0.1:1"]}
    env = {
        name: os.environ | {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": name, "index": 0}})}
        for name in ("worker", "evaluator")
    }
    command = [sys.executable, "-m", "tfdist.train", *RUN, "--strategy=one_device", "--evaluator=elsewhere"]
    with start(command, cwd=tmp_path, env=env["evaluator"]) as evaluator:
        done = subprocess.run(
            command, cwd=tmp_path, env=env["worker"], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said, errors = evaluator.communicate(timeout=120)
    assert evaluator.returncode == 0, errors[-3000:]
    assert "evaluator: epoch 4: val_loss" in said
    check(tmp_path, expected)


def test_says_whom_it_waits_for(monkeypatch, capsys):
    monkeypatch.setattr(place, "_RUN_BEGINS_SECS", 0.5)
    monkeypatch.setattr(place, "_TELL_SECS", 0.1)
    assert tfdist.train.main(["--mode=follow", "--run_dir=runs/nobody"]) == 2
    captured = capsys.readouterr()
    assert "waiting for a run in runs/nobody" in captured.out and captured.err.count("\n") == 1
