"""A task's record of its progress: written by the task, read by the launcher."""

import subprocess
import sys

import pytest

from tfdist.cluster.heartbeat import (
    DUMP_SIGNAL,
    VARIABLE,
    Beat,
    Heartbeat,
    parse_beat,
    read_beat,
    render_beat,
)


@pytest.mark.parametrize(
    "beat", [Beat(state="started"), Beat(state="preparing", step=10**9, num_beats=10**12, begun=10**18)]
)
def test_render_and_parse_undo_each_other(beat):
    assert parse_beat(render_beat(beat)) == beat


@pytest.mark.parametrize(
    "content", [b"", b"working 1", b"x" * 64, render_beat(Beat(state="a b")), b"working -1 1".ljust(64)]
)
def test_anything_else_is_no_record(content):
    assert parse_beat(content) is None


def test_each_beat_changes_the_record_and_steps_stay(tmp_path):
    path = str(tmp_path / "beat")
    assert read_beat(path) is None
    heartbeat = Heartbeat(path)
    begun = read_beat(path).begun
    assert read_beat(path) == Beat(state="started", num_beats=1, begun=begun)
    heartbeat.beat(7)
    heartbeat.beat()
    assert read_beat(path) == Beat(state="working", step=7, num_beats=3, begun=begun)
    heartbeat.rest()
    assert read_beat(path) == Beat(state="resting", step=7, num_beats=4, begun=begun)
    heartbeat.tell()
    assert read_beat(path).state == "told"


def test_nobody_asked_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heartbeat = Heartbeat.from_environment({})
    heartbeat.beat(1)
    assert not list(tmp_path.iterdir())


def test_folder_that_is_gone_is_no_error(tmp_path):
    Heartbeat(str(tmp_path / "gone" / "beat")).beat(1)


def test_signal_brings_the_stacks_and_the_task_goes_on(tmp_path):
    code = (
        "import os, signal; from tfdist.cluster.heartbeat import *; h = Heartbeat.from_environment(os.environ)\n"
        "def stuck(): os.kill(os.getpid(), DUMP_SIGNAL); print('goes on')\nstuck()"
    )
    env = {VARIABLE: str(tmp_path / "beat"), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "goes on\n" and "in stuck" in done.stderr
    assert DUMP_SIGNAL.name == "SIGUSR2"
