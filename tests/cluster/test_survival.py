"""`tfdist.train` with tasks that are killed, and runs that are told to go: nothing is lost, and no process left."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import programs
import pytest
from test_train_command import run_train
from tiers import rarely

pytestmark = pytest.mark.cluster
EPOCHS, STEPS = 4, 23
FLAGS = [f"--epochs={EPOCHS}", "--checkpoint_every_steps=5", "--set=filters=8"]


def start(folder, strategy, *more):
    command = ["-m", "tfdist.train", f"--strategy={strategy}", "--run_dir=run", *FLAGS, *more]
    with open(folder / "output", "w") as output:
        return programs.Program(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)


def wait_for_checkpoint(folder, process):
    """Until the second epoch has begun to be saved."""
    deadline = time.monotonic() + 120
    while not list((folder / "run/checkpoints").glob("epoch-0000[1-9]*")):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.02)


def find_task(folder, role, index):
    """The process of a task of this run, by what the launcher has told it."""
    wanted = json.dumps({"type": role, "index": index})
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environ = path.read_bytes().decode(errors="replace").split("\0")
            cwd = os.readlink(path.parent / "cwd")
        except OSError:
            continue
        if cwd == str(folder) and any(v.startswith("TF_CONFIG=") and wanted in v for v in environ):
            return int(path.parent.name)
    raise AssertionError(f"{role}:{index} is not running")


def finish(folder, process):
    code = process.wait(timeout=240)
    return code, (folder / "output").read_text()


def read_epochs(folder):
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_whole(folder, output):
    """Every step once, every epoch once, and it has learned."""
    records = read_epochs(folder)
    assert [record["epoch"] for record in records] == list(range(EPOCHS))
    assert [record["step"] for record in records] == [STEPS * (epoch + 1) for epoch in range(EPOCHS)]
    accuracy = float(re.findall(r"test .*accuracy (\d\.\d+)", output)[-1])
    assert accuracy > 0.8


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run_train(folder, "--strategy=multiworker", "--run_dir=run", *FLAGS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.everything  # tests/chaos kills each of them, and compares the weights
@pytest.mark.parametrize("index", [0, 1])
def test_multiworker_ends_as_if_no_worker_had_been_killed(tmp_path, uninterrupted, index):
    process = start(tmp_path, "multiworker")
    wait_for_checkpoint(tmp_path, process)
    os.kill(find_task(tmp_path, "worker", index), signal.SIGKILL)
    code, output = finish(tmp_path, process)
    assert code == 0, output
    assert "starting all tasks again (1 of 3)" in output and "resumed after epoch" in output
    assert_whole(tmp_path, output)
    last = f"run/checkpoints/epoch-{EPOCHS:05d}-step-00000000.npz"
    with np.load(uninterrupted / last) as wanted, np.load(tmp_path / last) as found:
        for name in set(wanted.files) - {"__meta__"}:
            np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize("task", rarely(["worker:1", "ps:0", "chief:0"], "chief:0", ci=["worker:1"]))
def test_ps_goes_on_whoever_is_killed(tmp_path, task):
    # A worker dies inside many steps that it makes between two words with the chief.
    long = ["--steps_per_loop=16", f"--checkpoint_every_steps={STEPS}"]
    process = start(tmp_path, "ps", *(long if task.startswith("worker") else []))
    wait_for_checkpoint(tmp_path, process)
    role, index = task.split(":")
    os.kill(find_task(tmp_path, role, int(index)), signal.SIGKILL)
    code, output = finish(tmp_path, process)
    assert code == 0, output
    assert f"{task} was killed by SIGKILL" in output and "starting it again" in output
    assert ("chief:0 is started again too" in output) == (role == "ps")
    if role == "worker":
        # Those that it had made of them are made again by another, never left out, and counted.
        records = read_epochs(tmp_path)
        num_repeated = sum(record.get("num_repeated", 0) for record in records)
        assert records[-1]["step"] == STEPS * EPOCHS + num_repeated
        assert 0 <= num_repeated <= 16
        assert len(records) == EPOCHS
    else:
        # A ps is back in a moment, but nothing is trained before the chief is.
        assert re.search(r"training goes on \d+\.\d s after the failure", output), output
        assert_whole(tmp_path, output)


@pytest.mark.parametrize("strategy", rarely(["one_device", "multiworker", "ps"], "multiworker"))
def test_nan_ends_the_run_and_is_not_kept(tmp_path, strategy):
    """A rate that no model stands: one line with the steps, exit code 1, and no checkpoint of ruins."""
    flags = ["--optimizer=sgd", "--learning_rate=1e30", "--checkpoint_every_steps=2", "--epochs=2"]
    done = run_train(tmp_path, f"--strategy={strategy}", "--run_dir=run", *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    line = (
        r"tfdist.train: the (loss is|gradients are) not finite in epoch 1 at step \d+: "
        r"(first in the (\w+ of layer '\w+'|loss; the model's outputs are finite)|in the gradients of .*); "
        r".* of the training data\. Its update was not applied\. Lower"
    )
    assert re.search(line, done.stderr)
    for path in (tmp_path / "run/checkpoints").glob("*.npz"):
        with np.load(path) as stored:
            assert all(np.isfinite(stored[name]).all() for name in stored.files if name != "__meta__")


@pytest.mark.parametrize("strategy", rarely(["one_device", "multiworker", "ps"], "multiworker"))
def test_sigterm_saves_and_leaves_with_143(tmp_path, strategy):
    process = start(tmp_path, strategy)
    wait_for_checkpoint(tmp_path, process)
    process.terminate()
    code, output = finish(tmp_path, process)
    assert code == 143, output
    (epoch, step) = re.findall(r"SIGTERM: the state after epoch (\d+)(?: and (\d+) steps)? is saved", output)[
        0
    ]
    assert (tmp_path / f"run/checkpoints/epoch-{int(epoch):05d}-step-{int(step or 0):08d}.npz").exists()
    resumed = run_train(tmp_path, "--resume", "--run_dir=run")
    assert resumed.returncode == 0, resumed.stderr
    assert_whole(tmp_path, resumed.stdout)


@pytest.mark.parametrize("strategy", rarely(["one_device", "multiworker"], "multiworker", ci=["one_device"]))
def test_tensor_without_memory_is_one_line(tmp_path, strategy):
    (tmp_path / "huge.py").write_text(
        """
import keras, tensorflow as tf, tfdist
from recipes import digits_cnn

class Huge(keras.layers.Layer):
    def call(self, x):
        return x + tf.reduce_sum(tf.random.uniform(tf.constant([64, 2**42], tf.int64)))

def build_model():
    model = keras.Sequential([keras.Input((8, 8, 1)), Huge(), keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model

RECIPE = tfdist.Recipe(build_model=build_model, build_data=digits_cnn.build_data, global_batch_size=64, epochs=1)
"""
    )
    done = run_train(tmp_path, f"--strategy={strategy}", "--recipe=./huge.py", "--run_dir=run")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    task = "this process" if strategy == "one_device" else r"worker:\d"
    line = rf"tfdist.train: {task} is out of memory: OOM when allocating tensor with shape\[64,4398046511104\].*; "
    assert re.search(line, done.stderr), done.stderr
