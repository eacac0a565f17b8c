"""A job that goes on with fewer workers when one dies, and later with all: the answer stays that of one device."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time

import numpy as np
import programs
import pytest
from test_chaos import NUM_EXAMPLES, RECIPE, STEPS, assert_no_process_left, train
from tiers import rarely

pytestmark = [pytest.mark.cluster, pytest.mark.ci]
# Gradient descent without dropout: the number of replicas must not show.
MODEL = [f"--recipe={RECIPE}", "--set=dropout=0", "--optimizer=sgd", "--learning_rate=0.05"]
ELASTIC = ["--strategy=multiworker", "--num_workers=2:3", "--chaos=kill:worker:0@step=45"]
BACK = {
    "restart": (["--rescale_every_secs=1"], "saving, to go on with all workers"),
    "in_process": (["--elastic=in_process"], "worker:0 joins the others"),
}


def wait_until(condition, process, output, secs=150):
    deadline = time.monotonic() + secs
    while not condition(output.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()[-6000:]
        time.sleep(0.05)


@pytest.mark.parametrize("how", rarely(BACK, "restart"))
def test_goes_on_with_fewer_and_then_with_all(tmp_path, how):
    flags, sign = BACK[how]
    command = [
        "-m",
        "tfdist.train",
        "--run_dir=run",
        *MODEL,
        *ELASTIC,
        *flags,
        "--epochs=100000",
    ]
    output = tmp_path / "output"
    with output.open("w") as file:
        process = programs.Program(command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda text: sign in text, process, output)
        # From then on a line of an epoch comes from all three.
        num_lines = output.read_text().count(f"{STEPS}/{STEPS}") + 5
        wait_until(lambda text: text.count(f"{STEPS}/{STEPS}") > num_lines, process, output)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143, output.read_text()[-6000:]
    finally:
        process.kill()
    text = output.read_text()
    assert re.search(r"training goes on \d+\.\d s after the failure", text)
    assert "Traceback" not in text
    assert_epochs_follow_each_other(tmp_path, how)
    assert_weights_are_those_of_one_device(tmp_path)
    assert_no_process_left(tmp_path)


def assert_epochs_follow_each_other(folder, how):
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(len(records)))
    assert [record["step"] for record in records] == [STEPS * (i + 1) for i in range(len(records))]
    whole = NUM_EXAMPLES * (NUM_EXAMPLES - 1) / 2
    short = [record["epoch"] for record in records if record["numbers"] != whole]
    # In the process, what the dead worker had counted of its epoch is gone; its examples are not.
    assert short in ([], [2]) if how == "in_process" else not short
    assert all(record["numbers"] <= whole for record in records)


def assert_weights_are_those_of_one_device(folder):
    last = sorted((folder / "run/checkpoints").glob("epoch-*-step-00000000.npz"))[-1]
    epochs = int(last.name.split("-")[1])
    done = train(folder, *MODEL, "--run_dir=alone", f"--epochs={epochs}", "--verbose=0")
    assert done.returncode == 0, done.stderr
    with np.load(last) as found, np.load(folder / "alone/checkpoints" / last.name) as right:
        assert set(found.files) == set(right.files)
        for name in set(right.files) - {"__meta__"}:
            np.testing.assert_allclose(found[name], right[name], atol=1e-5, err_msg=name)
