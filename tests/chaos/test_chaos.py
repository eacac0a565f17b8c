"""Every task × every failure × every moment, in real processes: nothing is lost and no process left."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import programs
import pytest

pytestmark = pytest.mark.cluster
RECIPE = Path(__file__).with_name("recipe.py")
EPOCHS, NUM_EXAMPLES, STEPS = 5, 330, 21
TASKS = {"multiworker": ["worker:0", "worker:1"], "ps": ["chief:0", "worker:1", "ps:0"]}
ACTIONS = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM"}
MOMENTS = {
    "start": "before the first step",
    "step=45": "inside an epoch",
    "checkpoint": "while a checkpoint is written",
    "end": "at the end",
}
# Those that differ most; the others are variations, and take half an hour.
FEW = {
    ("multiworker", "kill", "worker:0", "checkpoint"): [],
    ("multiworker", "stop", "worker:1", "step=45"): [pytest.mark.ci],
    ("ps", "term", "ps:0", "step=45"): [pytest.mark.ci],
    ("ps", "stop", "worker:1", "start"): [pytest.mark.ci],
    ("ps", "kill", "chief:0", "checkpoint"): [pytest.mark.ci],
}
ALL = [
    (strategy, action, task, moment)
    for strategy, tasks in TASKS.items()
    for task in tasks
    for action in ACTIONS
    for moment in MOMENTS
]


def train(folder, *flags):
    return programs.run(["-m", "tfdist.train", "--run_dir=run", *flags], cwd=folder)


def settings(strategy):
    return [f"--recipe={RECIPE}", f"--strategy={strategy}", "--checkpoint_every_steps=5"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(folder, *settings("multiworker"))
    assert done.returncode == 0, done.stderr
    return folder


def assert_each_example_counted_once(folder, strategy):
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == list(range(EPOCHS))
    assert [record["numbers"] for record in records] == [NUM_EXAMPLES * (NUM_EXAMPLES - 1) / 2] * EPOCHS
    # A ps worker's step may have been applied before it died: it is then done twice, never left out.
    most = STEPS * EPOCHS + (2 if strategy == "ps" else 0)
    assert STEPS * EPOCHS <= records[-1]["step"] <= most
    assert records[-1]["val_loss"] < 1.0


def assert_equal_weights(folder, wanted):
    last = f"run/checkpoints/epoch-{EPOCHS:05d}-step-00000000.npz"
    with np.load(wanted / last) as right, np.load(folder / last) as found:
        for name in set(right.files) - {"__meta__"}:
            np.testing.assert_array_equal(found[name], right[name], err_msg=name)


def assert_no_process_left(folder):
    wanted = f"TFDIST_RUN_DIR={folder}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert wanted not in path.read_bytes(), f"process {path.parent.name} is left"
        except OSError:
            continue


def describe(output):
    found = re.findall(r"(?:goes on|is back|are back) (\d+\.\d) s after the failure", output)
    return found[-1] if found else "done"


@pytest.mark.parametrize(
    ("strategy", "action", "task", "moment"),
    [pytest.param(*case, marks=FEW.get(case, pytest.mark.everything)) for case in ALL],
)
def test_run_survives(tmp_path, undisturbed, record_outcome, strategy, action, task, moment):
    done = train(tmp_path, *settings(strategy), f"--chaos={action}:{task}@{moment}")
    output = done.stdout + done.stderr
    assert f"chaos: {action}:{task}@{moment}" in output, output[-3000:]
    outcome = describe(output)
    if action == "term" and done.returncode == 143:
        outcome = "143"
        done = train(
            tmp_path, *(["--resume"] if (tmp_path / "run/config.json").exists() else settings(strategy))
        )
        output += done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    assert_each_example_counted_once(tmp_path, strategy)
    if strategy == "multiworker":
        assert_equal_weights(tmp_path, undisturbed)
    assert_no_process_left(tmp_path)
    record_outcome(strategy, ACTIONS[action], task, MOMENTS[moment], outcome)
