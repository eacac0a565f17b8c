"""`python -m tfdist.train` as a person runs it: every strategy, what a run leaves, and mistakes in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import programs
import pytest
from tiers import rarely

from tfdist.cluster.ports import PortReservation, check_grpc_server

REPOSITORY = str(Path(__file__).parents[2])
pytestmark = pytest.mark.cluster
STRATEGIES = ["one_device", "mirrored", "multiworker", "ps"]
# Whose finished run is looked at again: the file is the same whatever has trained it.
OTHER_RUNS = rarely(STRATEGIES, "one_device", "mirrored", "multiworker")


def run_train(cwd, *flags, env=None):
    """Runs the command from another folder."""
    return programs.run(["-m", "tfdist.train", *flags], cwd=cwd, env={**os.environ, **(env or {})})


@pytest.fixture(scope="module", params=STRATEGIES)
def finished(request, tmp_path_factory):
    """A short run under each strategy, in a folder whose path holds a space."""
    run_dir = tmp_path_factory.mktemp("a run") / request.param
    done = run_train(
        run_dir.parent,
        f"--strategy={request.param}",
        "--epochs=2",
        "--validation_freq=2",
        f"--run_dir={run_dir}",
        "--export=savedmodel",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return request.param, run_dir, done.stdout


def test_run_reaches_and_leaves(finished):
    """It learns, says where the run is, and leaves every file."""
    strategy, run_dir, output = finished
    accuracy = float(re.findall(r"test .*accuracy (\d\.\d+)", output)[-1])
    assert accuracy > 0.8
    assert str(run_dir) in output
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    # 1,437 examples in batches of 64 are 23 steps: none may be lost.
    assert [line["step"] for line in lines] == [23, 46]
    assert ["val_loss" in line for line in lines] == [False, True]
    assert json.loads((run_dir / "config.json").read_text())["strategy"] == strategy
    assert list((run_dir / "tensorboard").rglob("events*"))
    assert (run_dir / "export" / "saved_model.pb").exists()


def test_model_loads_in_plain_keras(finished, tmp_path):
    """Once in a process that knows nothing of tfdist."""
    strategy, run_dir, _ = finished
    model = keras.models.load_model(run_dir / "model.keras")
    assert model.predict(np.zeros((2, 8, 8, 1), "uint8"), verbose=0).shape == (2, 10)
    if strategy != "ps":
        return
    program = (
        "import sys, keras, numpy as np; m = keras.models.load_model(sys.argv[1]); "
        "print(m.predict(np.zeros((2, 8, 8, 1), 'uint8'), verbose=0).shape, 'tfdist' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_dir / "model.keras")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "(2, 10) False", done.stderr


@pytest.mark.parametrize("finished", OTHER_RUNS, indirect=True)
def test_modes_on_a_finished_run(finished):
    """The folder alone says enough: strategy and recipe come from its config."""
    _, run_dir, output = finished
    flags = [f"--run_dir={run_dir}"]
    evaluated = run_train(run_dir.parent, "--mode=eval", *flags)
    assert evaluated.returncode == 0, evaluated.stderr
    last = re.findall(r"test .*", output)[-1]
    assert last in evaluated.stdout
    predicted = run_train(run_dir.parent, "--mode=predict", *flags)
    assert predicted.returncode == 0, predicted.stderr
    with np.load(run_dir / "predictions.npz") as stored:
        assert stored["predictions"].shape == (360, 10)
    exported = run_train(run_dir.parent, "--mode=export", *flags)
    assert exported.returncode == 0, exported.stderr


@pytest.mark.parametrize("finished", OTHER_RUNS, indirect=True)
def test_finished_run_looks_the_same_to_another_strategy(finished):
    """A model is not bound to what trained it."""
    _, run_dir, output = finished
    evaluated = run_train(run_dir.parent, "--mode=eval", f"--run_dir={run_dir}", "--strategy=mirrored")
    assert re.findall(r"test .*", output)[-1] in evaluated.stdout, evaluated.stderr


def test_tensorflow_says_nothing(finished):
    """Its notes on how it was built, four processes of them, would bury ours."""
    _, run_dir, output = finished
    logs = "".join(path.read_text() for path in run_dir.glob("logs/*.log"))
    assert "oneDNN" not in output + logs


def test_resume_equals_an_uninterrupted_run(tmp_path):
    """Weights bit for bit, seeds of dropout included, and no line double."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--strategy=one_device"]
    assert run_train(tmp_path, *flags, "--epochs=3", f"--run_dir={whole}").returncode == 0
    assert run_train(tmp_path, *flags, "--epochs=2", f"--run_dir={parts}").returncode == 0
    resumed = run_train(tmp_path, *flags, "--epochs=3", f"--run_dir={parts}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after epoch 2" in resumed.stdout
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    last = "checkpoints/epoch-00003-step-00000000.npz"
    with np.load(whole / last) as a, np.load(parts / last) as b:
        for name in set(a.files) - {"__meta__"}:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe=digit_cnn"], "digits_cnn"),
        (["--strategy=mirored"], "mirrored"),
        (["--global-batch-sizes=3"], "global_batch_size"),
        (["--epochs=many"], "many"),
        (["--strategy=mirrored", "--num_replicas=4", "--batch-size=2"], "fewer replicas"),
        (["--set", "filtres=3"], "filters"),
        (["--run_dir=/proc/nowhere/run"], "/proc/nowhere"),
        (["--mode=eval", "--run_dir=/tmp/no-such-run"], "holds no run"),
        (["--recipe=./empty.py"], "RECIPE"),
        (["--recipe=./uncompiled.py"], "not compiled"),
        (["--optimizer=adamm"], "adam"),
        (["--learning_rate=0.1"], "--set learning_rate"),
        (["--mode=eval"], "--run_dir"),
        (["--strategy=ps", "--recipe=digit_cnn"], "digits_cnn"),
        (["--strategy=ps", "--run_dir=/proc/nowhere/run"], "/proc/nowhere"),
        (["--strategy=multiworker", "--batch_size=1"], "2 replicas"),
        (["--strategy=ps", "--recipe=./empty.py"], "RECIPE"),
        (["--strategy=ps", "--num_replicas=0"], "num_replicas"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, words):
    """Exit code 2, no traceback, the remedy in the line."""
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "uncompiled.py").write_text(
        "import keras, numpy as np, tfdist\n"
        "def build_model():\n    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])\n"
        "def build_data(split):\n    return np.zeros((4, 2)), np.zeros((4, 1))\n"
        "RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=2, epochs=1)\n"
    )
    done = run_train(tmp_path, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tfdist.train:")]
    assert words in line


@pytest.mark.parametrize("strategy", ["ps", "multiworker"])
def test_mistake_that_only_the_tasks_see_is_said_once(tmp_path, strategy):
    """The chief speaks for all; the launcher adds who ended and where the log is."""
    done = run_train(tmp_path, f"--strategy={strategy}", "--set", "filtres=3", "--run_dir=r")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "filters" in line]
    assert len(said) == 1, done.stderr
    assert "r/logs/" in done.stderr.splitlines()[-1]


def test_resume_needs_no_other_flag(tmp_path):
    """What the run was comes from its folder; the total of epochs is given anew."""
    small = ["--strategy=ps", "--set", "filters=4", "--steps_per_epoch=3"]
    first = run_train(tmp_path, *small, "--epochs=1", "--run_dir=r")
    assert first.returncode == 0, first.stderr
    resumed = run_train(tmp_path, "--resume", "--epochs=2", "--run_dir=r")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after epoch 1" in resumed.stdout
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert json.loads((tmp_path / "r/config.json").read_text())["overrides"] == ["filters=4"]


def test_strategy_that_does_not_fit_the_cluster(tmp_path):
    """A ps task under multiworker."""
    spec = {"cluster": {"chief": ["localhost:1"], "worker": ["localhost:2"], "ps": ["localhost:3"]}}
    env = {"TF_CONFIG": json.dumps({**spec, "task": {"type": "chief", "index": 0}})}
    done = run_train(tmp_path, "--strategy=multiworker", env=env)
    assert done.returncode == 2
    assert "no use for ps tasks" in done.stderr


def test_help_and_list_load_no_tensorflow(tmp_path):
    """They answer at once."""
    for flag, words in (
        ("--help", "--strategy"),
        ("--list_recipes", "digits_cnn"),
        ("--dry_run", "TF_CONFIG"),
    ):
        flags = [flag, "--strategy=ps"]
        done = run_train(tmp_path, *flags, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert done.returncode == 0
        assert words in done.stdout
        assert not re.search(r"\| +tensorflow$", done.stderr, re.MULTILINE)


def test_server_loads_no_keras(tmp_path):
    """It starts a second sooner and keeps 90 MB; scikit-learn, whose libraries the kernel lists, comes with Keras."""
    with PortReservation(3) as held:
        chief, worker, ps = (f"127.0.0.1:{port}" for port in held.ports)
        spec = {"cluster": {"chief": [chief], "worker": [worker], "ps": [ps]}}
        env = {"TF_CONFIG": json.dumps({**spec, "task": {"type": "ps", "index": 0}})}
        server = subprocess.Popen(
            [sys.executable, "-m", "tfdist.train", "--strategy=ps"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": REPOSITORY, **env},
        )
        try:
            assert check_grpc_server(ps, timeout_secs=120) is None
            loaded = Path(f"/proc/{server.pid}/maps").read_text()
        finally:
            server.kill()
            server.wait()
    assert "/tensorflow/" in loaded and "/sklearn/" not in loaded
