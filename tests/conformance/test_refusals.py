"""What a strategy cannot honour it refuses by name, with the remedy, before anything is trained."""

import json
import os
import re

import programs
import pytest
import refusals
from worlds import run_world

from tfdist.cluster.ports import PortReservation

ALL = ("one_device", "mirrored-2", "multiworker-2", "ps-1")
SYNC = ("mirrored-2", "multiworker-2")
# Attempt → the worlds that refuse it, and what the line says.
WANTED = {
    "uncompiled": (ALL, ["not compiled", "model.compile"]),
    "small_batch": (SYNC, ["batch_size=1", "at least 2"]),
    "outside": ((*SYNC, "ps-1"), ["outside the strategy's scope", "with run.strategy.scope()"]),
    "two_accumulating": (("ps-1",), ["gradient_accumulation_steps=2", "2 optimizers", "global_batch_size"]),
    "loss_scale": (("ps-1",), ["mixed_float16", "mixed_bfloat16"]),
    "own_without_steps": ((*SYNC, "ps-1"), ["steps_per_epoch"]),
    "by_hand": (SYNC, ["NoOptimizer.train_step", "optimizer.apply"]),
    "backup": (("multiworker-2",), ["BackupAndRestore", "--resume"]),
    "both_weights": (ALL, ["class_weight and sample_weight", "one of them"]),
    "sample_weight": (ALL, ["sample_weight goes with arrays"]),
    "split_stream": (ALL, ["validation_split", "validation_data"]),
    "skip_in_loops": (
        ("one_device", *SYNC),
        ["steps_per_loop=4 with on_nan='skip'", "leave one of the two out"],
    ),
    "no_loop": (ALL, ["steps_per_loop=0", "1 or more"]),
    "split_all": (ALL, ["validation_split=1.0", "between 0 and 1"]),
    "unequal": (ALL, ["22, 21", "the same"]),
    "empty": (ALL, ["no examples"]),
    "no_xla": (ALL, ["jit_compile="]),
    "batches_of_batches": (ALL, ["dataset.unbatch()", "leave batch_size out"]),
    "sized_generator": (ALL, ["batch_size=10", "leave it out"]),
    "rolled_back_generator": (ALL, ["on_nan='rollback' with a generator", "choose 'skip'"]),
    "examples_for_batches": (ALL, ["must be a batch", "pass batch_size=32"]),
    "y_beside_a_dataset": (ALL, ["y beside x", "leave y out"]),
    "dropped_batch": (ALL, ["drop_remainder", "dataset.batch("]),
    "four": (ALL, ["tuple of 4", "sample_weight"]),
}
pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]


def test_multiworker_after_tensorflow_has_started_names_the_remedy(tmp_path):
    """A common slip: a dataset or constant made at the top of a script."""
    script = tmp_path / "late.py"
    script.write_text("import tensorflow as tf, tfdist\ntf.constant(1)\ntfdist.initialize()\n")
    with pytest.raises(
        AssertionError, match=r"ConfigError: TensorFlow has already started.*tfdist.initialize"
    ):
        run_world(script, tmp_path / "unused", "multiworker-2")


@pytest.mark.parametrize("strategy", ["multiworker", "ps"])
def test_missing_task_is_named_in_time(tmp_path, strategy):
    """TensorFlow would wait for it for an hour."""
    with PortReservation(3) as free:
        addresses = [f"127.0.0.1:{port}" for port in free.ports]
    roles = {"worker": addresses[:2]} if strategy == "multiworker" else {}
    roles = roles or {"chief": addresses[:1], "worker": addresses[1:2], "ps": addresses[2:]}
    first = next(iter(roles))
    env = {"TF_CONFIG": json.dumps({"cluster": roles, "task": {"type": first, "index": 0}})}
    script = tmp_path / "script.py"
    script.write_text(f"import tfdist; tfdist.initialize(strategy={strategy!r}, start_timeout_secs=2)")
    done = programs.run([script], cwd=tmp_path, env=os.environ | env)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"no answer within 2 s from worker:\d at {addresses[1]}.*start the task", last), (
        done.stderr
    )


@pytest.fixture(scope="module", params=ALL)
def answers(request, tmp_path_factory):
    """The world, and what it answered."""
    out = tmp_path_factory.mktemp(request.param) / "answers.json"
    run_world(refusals.__file__, out, request.param)
    return request.param, json.loads(out.read_text())


@pytest.mark.parametrize("attempt", WANTED)
def test_refusal_says_what_and_what_instead(answers, attempt):
    """And where an attempt can be honoured, it is."""
    world, found = answers
    refusing, words = WANTED[attempt]
    if world not in refusing:
        assert found[attempt] == ""
        return
    assert "\n" not in found[attempt]
    for word in words:
        assert word in found[attempt]
