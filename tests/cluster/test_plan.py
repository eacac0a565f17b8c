"""A plan's trials are real, and what it foretells of them holds for a run."""

import json
import os
import subprocess
import sys

import pytest
from tiers import rarely

from tfdist.plan import main

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
RECIPE = """
import time
import keras
import numpy as np
import tfdist

class Slow(keras.layers.Layer):
    def call(self, x):
        import tensorflow as tf
        return tf.ensure_shape(tf.numpy_function(self.wait, [x], x.dtype), x.shape)

    @staticmethod
    def wait(x):
        time.sleep(1e-3 * len(x))
        return x

def build_model(*, crash: bool = False) -> keras.Model:
    if crash:
        raise RuntimeError("crashed on purpose")
    model = keras.Sequential([keras.Input((3,)), Slow(), keras.layers.Dense(512), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model

def build_data(split: str):
    x = np.random.default_rng(len(split)).normal(size=(640, 3)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)

RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=64, epochs=3)
"""


# Each way's workers and batch sizes among those that are tried.
FORETOLD = {
    "every_step": {("every_step", 2, 64), ("every_step", 2, 128)},
    "local_sgd,delayed,ps": {("local_sgd", 2, 128), ("ps", 1, 64), ("ps", 2, 64)},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("ways", rarely(FORETOLD, ci=["local_sgd"]))
def test_steps_take_as_long_as_foretold(folder, capsys, ways):
    """A step that sleeps a millisecond for each example tells what each way must take, on any machine."""
    flags = ["--recipe=./my recipe.py", f"--ways={ways}", "--json"]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    timed = {(way["way"], way["num_workers"], way["global_batch_size"]): way for way in found["ways"]}
    assert found["model"]["steps_per_epoch"] == 10 and found["refused"] == {}
    for (name, num_workers, batch_size), way in timed.items():
        # Two workers of ps step each on whole batches, at the same time.
        least = batch_size / 1000 / num_workers
        assert least < way["step_secs"] < 2.5 * least, (name, num_workers)
        assert way["hours"] == pytest.approx(way["step_secs"] * 3 * (640 // batch_size) / 3600)
        assert 50 < way["memory_mb"] < 5_000
    assert FORETOLD[ways] <= set(timed)
    if ("every_step", 2, 64) in timed:
        sent = timed["every_step", 2, 64]["sent_mb_per_sec"] * timed["every_step", 2, 64]["step_secs"]
        # All gradients, and the number that travels along.
        assert sent == pytest.approx(2_562 * 4 / 1e6, abs=1e-4)


@pytest.mark.ci
def test_model_that_one_process_cannot_hold_is_planned_in_parts(folder, capsys):
    """Of what one process cannot do the plan tells, and of what a divided model cannot be."""
    text = RECIPE.replace(
        "keras.Sequential([keras.Input((3,)), Slow(),", "Small([keras.Input((3,)), keras.layers.Dense(512),"
    )
    dies = """
class Small(keras.Sequential):
    def __init__(self, layers):
        super().__init__(layers)
        import os, tensorflow as tf
        if os.environ.get("TFDIST_STRATEGY") == "one_device":
            os._exit(137)  # as the kernel ends who has taken too much
"""
    (folder / "my recipe.py").write_text(text.replace("def build_model", dies + "\ndef build_model"))
    assert main(["--recipe=./my recipe.py", "--ways=stages,blocks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ways = {way["way"]: way for way in found["ways"]}
    assert set(found["refused"]) == {"one_device"}, found["refused"]
    assert set(ways) == {"stages", "blocks"}
    assert found["model"]["num_parameters"] == 4 * 512 + 513 * 512 + 513
    assert 0 < ways["stages"]["step_secs"] < 5 and "--tensor_parallel=2" in ways["blocks"]["flags"]


@pytest.mark.everything
def test_model_that_cannot_have_a_way_is_planned_without_it(folder, capsys):
    text = RECIPE.replace(
        "keras.optimizers.SGD(0.1)", "keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)"
    )
    (folder / "my recipe.py").write_text(text)
    assert main(["--recipe=./my recipe.py", "--ways=every_step,delayed"]) == 0
    said = capsys.readouterr().out
    assert "without delayed: sync='delayed' with gradient_accumulation_steps" in said
    assert "every_step" in said and "python -m tfdist.train '--recipe=./my recipe.py'" in said


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        pytest.param(["--recipe=nobody"], 2, "nobody", marks=pytest.mark.everything),
        pytest.param(["--recipe=./my recipe.py", "--set=width=3"], 2, "width", marks=pytest.mark.everything),
        pytest.param(["--recipe=./my recipe.py", "--set=crash=true"], 1, "crashed", marks=pytest.mark.ci),
        (["--recipe=./my recipe.py", "--hosts=nobody.invalid"], 2, "nobody.invalid"),
        (["--recipe=./my recipe.py", "--epoch=3"], 2, "epochs"),
    ],
)
def test_what_cannot_be_tried_is_said_in_one_line(folder, words, code, part, capfd):
    assert main(words) == code
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("trying ")]
    assert captured.out == "" and len(lines) == 1 and part in lines[0], captured.err


def test_killed_plan_leaves_nothing(folder):
    command = [sys.executable, "-m", "tfdist.plan", "--recipe=./my recipe.py", "--ways=every_step"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    while "multiworker" not in process.stderr.readline():
        assert process.poll() is None
    process.kill()
    process.wait()
    process.stderr.close()  # whatever it has started must be gone too: the fixture of all tests looks


def test_help_is_there_at_once():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tfdist.plan", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "--link" in done.stdout
    assert not {"tensorflow", "keras", "simpy", "numpy", "matplotlib"} & {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines()
    }
