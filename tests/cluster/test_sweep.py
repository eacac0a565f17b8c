"""A sweep finds the best of its trials, whatever befalls it and them."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tfdist.sweep import main

optuna = pytest.importorskip("optuna")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
RECIPE = """
import keras
import numpy as np
import tfdist

def build_model(*, rate: float = 0.1, crash: bool = False) -> keras.Model:
    if crash:
        raise RuntimeError("crashed on purpose")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model

def build_data(split: str, *, num_examples: int = 64):
    x = np.random.default_rng(len(split)).normal(size=(num_examples, 3)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)

RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=16, epochs=2)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_space(folder, **space):
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return ["--space=space.yaml", "--recipe=./my recipe.py", "--sweep_dir=a sweep"]


def load(folder):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'a sweep/study.db'}")


def states(folder):
    return [trial.state.name for trial in load(folder).get_trials()]


def test_sweep_goes_on_after_it_was_killed(folder):
    words = write_space(folder, **{"set.rate": {"low": 1e-5, "high": 0.3, "log": True}})
    command = [sys.executable, "-m", "tfdist.sweep", *words, "--trials=3", "--parallel=2", "--pruner=none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "trial 1" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2)
    process.kill()
    process.wait()
    process.stdout.close()  # whatever it has started must be gone too: the fixture of all tests looks
    # Of a slow start the first may have ended before the second began.
    num_before = states(folder).count("COMPLETE")
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    # The two are tried again, with what they had chosen, and one more, with what no other has.
    assert states(folder).count("COMPLETE") == 3 and states(folder).count("FAIL") == 2
    rates = [trial.params["set.rate"] for trial in load(folder).trials if trial.state.name == "COMPLETE"]
    assert len(set(rates)) == 3
    values = [float(value) for value in re.findall(r"^trial \d+: val_loss (\S+);", done.stdout, re.MULTILINE)]
    (best,) = re.findall(r"^best: trial \d+, val_loss (\S+)$", done.stdout, re.MULTILINE)
    assert float(best) <= min(values) and len(values) == 3 - num_before
    page = (folder / "a sweep/report.html").read_text()
    assert page.count("<tr") >= 4 and "<svg" in page
    # Enough: nothing is started.
    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and "3 of 3 trials are done" in again.stdout
    assert not re.search(r"^trial", again.stdout, re.MULTILINE)


@pytest.mark.ci
def test_trial_that_fails_is_tried_again_once(folder, capsys):
    words = write_space(folder, **{"set.crash": [True]})
    assert main([*words, "--trials=1"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("failed with exit code 1: ") == 2 and "crashed on purpose" in printed.out
    assert "no trial came to its end" in printed.err
    assert states(folder) == ["FAIL", "FAIL"]
    write_space(folder, **{"set.crash": [False]})
    assert main([*words, "--trials=2"]) == 2
    assert "holds a sweep of another space" in capsys.readouterr().err


@pytest.mark.ci
def test_bad_trial_is_ended_early(folder, capsys):
    words = write_space(folder, **{"set.rate": [0.1, 1e-6]})
    # Of the sampler's own draws: the good one, and then the bad one.
    assert main([*words, "--trials=2", "--epochs=120", "--seed=10"]) == 0
    out = capsys.readouterr().out
    assert "ended early at val_loss" in out
    assert states(folder) == ["COMPLETE", "PRUNED"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epocs=2"], "trial 0 did not start: tfdist.train: unknown flag"),
        pytest.param(
            ["--metric=val_los", "--epochs=1"],
            "metric='val_los': the runs have none of that name; choose one of",
            marks=pytest.mark.ci,
        ),
        (["--direction=maximize"], "wants to minimize its metric"),
        (["--trials=0"], "see --help"),
        (["--space=nowhere.yaml"], "cannot be read"),
    ],
)
def test_mistake_is_one_line(folder, capsys, words, said):
    own = write_space(folder, **{"set.rate": [0.1]})
    if "--direction=maximize" in words:
        optuna.create_study(study_name="sweep", storage=_storage(folder), direction="minimize")
    assert main([*own, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def _storage(folder):
    (folder / "a sweep").mkdir()
    return f"sqlite:///{folder / 'a sweep/study.db'}"


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.ci),
        pytest.param(signal.SIGTERM, marks=pytest.mark.everything),
    ],
)
def test_interrupted_sweep_lets_its_trials_save(folder, number):
    words = write_space(folder, **{"set.rate": [0.1]})
    command = [sys.executable, "-m", "tfdist.sweep", *words, "--epochs=100000", "--trials=1"]
    # As in the background of a shell, where SIGINT is ignored.
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "a sweep/trial-0000/metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + number and errors.splitlines()[-1].startswith(
        "tfdist.sweep: interrupted"
    )
    assert list((folder / "a sweep/trial-0000/checkpoints").glob("*.npz"))
    assert states(folder) == ["RUNNING"]
