"""A disk that is full for a while: training goes on, says so each time, and what was whole stays."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
REPOSITORY = str(Path(__file__).parents[2])
PROGRAM = """
import os, pathlib, keras, numpy as np, tfdist
from tfdist.training.monitoring.callbacks import MetricsFile, TensorBoardScalars
from tfdist.config.run_dir import RunDir, read_records

folder = pathlib.Path("disk")
class Fill(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == {full}:
            print("kept", *sorted(os.listdir("disk/checkpoints")), flush=True)
            with open("disk/ballast", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(1024)): pass
                except OSError: pass
        if epoch == {free}:
            print("kept", *sorted(os.listdir("disk/checkpoints")), flush=True)
            os.unlink("disk/ballast")

run = tfdist.initialize(strategy="one_device")
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(300), keras.layers.Dense(1)])
model.compile("sgd", "mse")
x = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
run_dir = RunDir(folder)
callbacks = [Fill(), MetricsFile(run_dir=run_dir), TensorBoardScalars(run_dir=run_dir)]
checkpoints = tfdist.Checkpoints(directory=run_dir.checkpoints_dir)
(folder / "checkpoints").mkdir()
run.fit(model, (x, x[:, :1]), epochs=8, batch_size=8, verbose=0, callbacks=callbacks, checkpoints=checkpoints)
print("epochs", *[record["epoch"] for record in read_records(run_dir.metrics_file)])
print("kept", *sorted(os.listdir("disk/checkpoints")))
"""


def run_on_small_disk(folder, program):
    (folder / "disk").mkdir()
    (folder / "program.py").write_text(program)
    shell = 'mount -t tmpfs -o size=160k none disk && exec "$0" program.py'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, sys.executable]
    env = {**os.environ, "PYTHONPATH": REPOSITORY, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip("needs a mount namespace")
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("full", [pytest.param(0, marks=pytest.mark.ci), 2], ids=["from the start", "later"])
def test_training_goes_on_and_nothing_whole_is_removed(tmp_path, full):
    done = run_on_small_disk(tmp_path, PROGRAM.format(full=full, free=5))
    before, meanwhile, after = re.findall("^kept(.*)$", done.stdout, re.MULTILINE)
    assert before == meanwhile != after
    # The newest one may still have been on its way to the disk.
    num_warnings = done.stderr.count("could not be written (No space left on device); training goes on")
    assert num_warnings >= 5 - full
    assert after.split() == [f"epoch-0000{epoch}-step-00000000.npz" for epoch in (6, 7, 8)]
    assert "epochs 0 1 2 3 4 5 6 7" in done.stdout
    assert "Traceback" not in done.stderr
