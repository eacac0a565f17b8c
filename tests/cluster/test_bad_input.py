"""Data and folders that do not fit what a run has begun with: one clear line, and nothing is overwritten."""

import re

import pytest
from test_train_command import run_train

pytestmark = pytest.mark.cluster
RECIPE = """
import keras, numpy as np, tensorflow as tf, tfdist

class Shrinking:
    "Loses five of its examples while it is read."
    def __init__(self):
        self.count = 20
    def __len__(self):
        return self.count
    def __getitem__(self, place):
        if place == 3:
            self.count = 15
        return np.full(3, place / 20, "float32"), np.float32(place / 20)

def build_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model

def build_data(split, *, kind: str = "arrays"):
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    stream = tf.data.Dataset.from_tensor_slices((x, x[:, 0]))
    if split == "test" or kind == "arrays":
        return x, x[:, 0]
    if kind == "shrinking":
        return Shrinking()
    if kind == "few":
        return stream.take(1)
    # As TFDS promises what its files once held.
    return stream.take(15).apply(tf.data.experimental.assert_cardinality(20))

RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=4, epochs=2)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own.py").write_text(RECIPE)
    return tmp_path


def train(folder, *flags):
    return run_train(folder, "--recipe=./own.py", "--run_dir=run", "--verbose=2", *flags)


def read_files(folder):
    """Everything in the run's folder, but for what the tasks print."""
    files = (path for path in (folder / "run").rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.parent.name != "logs"}


def assert_one_line(done, words):
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tfdist.train:")]
    assert re.search(words, line), line


def test_run_dir_and_checkpoint_of_something_else_are_refused(folder):
    done = train(folder)
    assert done.returncode == 0, done.stderr
    before = read_files(folder)
    (folder / "other.py").write_text(RECIPE)
    resume = ["--resume", "--epochs=3"]
    attempts = [
        ([], "already holds a run of .*own.py"),
        (["--recipe=./other.py"], "already holds a run of .*own.py"),
        ([*resume, "--recipe=./other.py"], "holds a run with recipe=.*own.py.*, this one has .*other.py"),
        ([*resume, "--optimizer=adam"], "holds a run with optimizer=None, this one has 'adam'"),
        ([*resume, "--set", "kind=few"], "holds a run with overrides=.*start anew in another run_dir"),
    ]
    for flags, words in attempts:
        assert_one_line(train(folder, *flags), words)
        assert read_files(folder) == before
    # The same recipe by name, which makes another model now.
    (folder / "own.py").write_text(RECIPE.replace("Dense(4)", "Dense(16)"))
    assert_one_line(
        train(folder, *resume), r"checkpoint is of another model: .*\(3, 4\) there, \(3, 16\) here"
    )
    assert read_files(folder) == before
    (folder / "own.py").write_text(RECIPE)
    done = train(folder, *resume)
    assert done.returncode == 0, done.stderr
    assert (
        "resumed after epoch 2 from run/checkpoints/epoch-00002-step-00000000.npz: the newest" in done.stdout
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("shrinking", "the data source holds 15 examples, and held 20 when the run began"),
        ("counted", "the data source ended after 15 examples, and promised 20"),
    ],
)
def test_source_that_shrinks_is_refused(folder, kind, words):
    assert_one_line(train(folder, "--set", f"kind={kind}"), words)
    assert not (folder / "run/model.keras").exists()


@pytest.mark.parametrize("shard", ["off", "data"])
def test_workers_without_an_example_help_all_the_same(folder, shard):
    """More shards than examples: the answer is that of one device."""
    flags = ["--set", "kind=few"]
    alone = run_train(folder, "--recipe=./own.py", "--run_dir=alone", *flags)
    assert alone.returncode == 0, alone.stderr
    done = train(folder, *flags, "--strategy=multiworker", "--num_workers=2", f"--shard={shard}")
    assert done.returncode == 0, done.stderr
    losses = [
        re.findall(r"^(?:\[worker:0\] )?test\s+loss (\S+)", text, re.MULTILINE)
        for text in (alone.stdout, done.stdout)
    ]
    assert losses[0] == losses[1] != []
