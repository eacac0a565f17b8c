"""The distributed answer equals the single-device answer: every case under every strategy, in real processes."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest

PROGRAM = str(Path(__file__).with_name("cases.py"))
WORLDS = {
    "one_device": ["one_device"],
    "mirrored-2": ["mirrored", "2"],
    "mirrored-4": ["mirrored", "4"],
    "multiworker-2": ["multiworker"],
    "ps-1": ["ps"],
}
pytestmark = [pytest.mark.conformance, pytest.mark.cluster]


def run_program(out, words, launch):
    command = [sys.executable, *launch, PROGRAM, str(out), *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    with np.load(out) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs each world once, when first asked for."""
    folder = tmp_path_factory.mktemp("worlds")

    @functools.cache
    def attempt(world):
        # A failure is kept too: a broken world need not be run again for each case.
        try:
            return start(world)
        except AssertionError as error:
            return error

    def get(world):
        found = attempt(world)
        if isinstance(found, AssertionError):
            raise found
        return found

    def start(world):
        if world == "keras":
            return run_program(folder / "keras.npz", ["keras"], [])
        words = WORLDS[world]
        launch = {
            "multiworker": ["-m", "tfdist.launch", "--strategy=multiworker", "--num_workers=2"],
            "ps": ["-m", "tfdist.launch", "--strategy=ps", "--num_workers=1", "--num_ps=1"],
        }.get(words[0], [])
        return run_program(folder / f"{world}.npz", words, launch)

    return get


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", cases.CASES)
def test_case_equals_keras(results, world, case):
    """Weights, history, evaluation, predictions and iterations agree to float32 rounding."""
    if case == "dropout" and world in ("mirrored-2", "mirrored-4", "multiworker-2"):
        pytest.skip("replicas draw their own masks by design, as test_replicas.py holds")
    wanted = {k: v for k, v in results("keras").items() if k.startswith(case + "/")}
    found = {k: v for k, v in results(world).items() if k.startswith(case + "/")}
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        if name.endswith(("kind_loss", "size_loss")):
            # Keras averages these over batches, whatever their size; tfdist over examples, so that the parts add up.
            whole = f"{case}/{name.partition('/')[2].partition('_')[0]}_"
            parts = found[f"{whole}kind_loss"] + 0.3 * found[f"{whole}size_loss"]
            np.testing.assert_allclose(parts, found[f"{whole}loss"], rtol=2e-5)
            continue
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)
