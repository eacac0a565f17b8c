"""Which checkpoints are kept, which is read, and what a bad disk does."""

import logging
import os
import threading

import numpy as np
import pytest

from tfdist.errors import ConfigError
from tfdist.training.checkpoint import store
from tfdist.training.checkpoint.snapshot import Snapshot, write_checkpoint
from tfdist.training.checkpoint.store import Checkpoints, CheckpointWriter


def snapshot(epoch, step=0):
    return Snapshot(epoch=epoch, step=step, variables={"w": np.arange(1000.0)}, metrics=[])


def write(folder, *snapshots, keep=3):
    writer = CheckpointWriter(Checkpoints(directory=folder, keep=keep))
    for one in snapshots:
        writer.write(one)
    writer.wait()


def names(folder):
    return sorted(os.listdir(folder))


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, snapshot(0, 5), snapshot(0, 10), snapshot(1), keep=2)
    assert names(tmp_path) == ["epoch-00000-step-00000010.npz", "epoch-00001-step-00000000.npz"]


def test_a_folder_that_is_not_there_holds_none(tmp_path):
    assert Checkpoints(directory=tmp_path / "none").read_newest() is None


@pytest.mark.parametrize(
    "spoil",
    [lambda c: c[: len(c) // 2], lambda c: c[:200] + bytes([c[200] ^ 1]) + c[201:], lambda c: b""],
    ids=["truncated", "bit-flipped", "empty"],
)
def test_one_that_is_not_whole_is_passed_over_with_a_warning(spoil, tmp_path, caplog):
    write(tmp_path, snapshot(1), snapshot(2))
    newest = tmp_path / "epoch-00002-step-00000000.npz"
    newest.write_bytes(spoil(newest.read_bytes()))
    with caplog.at_level(logging.WARNING):
        _, path = Checkpoints(directory=tmp_path).read_newest()
    assert path.name == "epoch-00001-step-00000000.npz"
    assert str(newest) in caplog.text and "Going on from the one before" in caplog.text


def test_damaged_one_gives_its_place_up(tmp_path):
    """Else every later one, which seems to be older, would be deleted at once."""
    write(tmp_path, snapshot(5))
    newest = tmp_path / "epoch-00005-step-00000000.npz"
    newest.write_bytes(newest.read_bytes()[:100])
    write(tmp_path, snapshot(1), keep=1)
    assert names(tmp_path) == ["epoch-00001-step-00000000.npz", f"{newest.name}.damaged"]
    write(tmp_path, snapshot(2), keep=1)
    assert names(tmp_path) == ["epoch-00002-step-00000000.npz", f"{newest.name}.damaged"]


def test_whoever_waits_hears_why_the_last_is_not_written(tmp_path, monkeypatch):
    writer = CheckpointWriter(Checkpoints(directory=tmp_path))
    writer.write(snapshot(1))
    assert writer.wait() == ""
    writer.write(Snapshot(epoch=2, step=0, variables={"w": np.array([np.nan])}, metrics=[]))
    assert writer.wait() == "it holds NaN or infinite numbers"

    def broken(*_):
        raise RuntimeError("no such snapshot")

    monkeypatch.setattr(store, "write_checkpoint", broken)
    writer.write(snapshot(3))
    with pytest.raises(RuntimeError, match="no such snapshot"):
        writer.wait()


def test_a_full_disk_warns_each_time_and_removes_nothing(tmp_path, caplog, monkeypatch):
    write(tmp_path, snapshot(1), snapshot(2), keep=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_checkpoint", full)
    with caplog.at_level(logging.WARNING):
        write(tmp_path, snapshot(3), snapshot(4), keep=2)
    assert len(names(tmp_path)) == 2
    assert caplog.text.count("No space left on device") == 2


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_ruins_are_not_kept(tmp_path, caplog, wrong):
    spoilt = Snapshot(epoch=2, step=3, variables={"w": np.array([1.0, wrong])}, metrics=[])
    with caplog.at_level(logging.WARNING):
        write(tmp_path, snapshot(1), spoilt, keep=1)
    assert names(tmp_path) == ["epoch-00001-step-00000000.npz"]
    assert "epoch-00002-step-00000003.npz is not kept: it holds NaN or infinite numbers" in caplog.text


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / ".epoch-00001-step-00000000.npz.tmp-1").write_bytes(b"torn")
    write(tmp_path, snapshot(2))
    assert names(tmp_path) == ["epoch-00002-step-00000000.npz"]


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    let_go = threading.Event()

    def slow(path, one):
        assert let_go.wait(30)
        write_checkpoint(path, one)

    monkeypatch.setattr(store, "write_checkpoint", slow)
    writer = CheckpointWriter(Checkpoints(directory=tmp_path))
    writer.write(snapshot(1))
    assert writer.is_busy and not names(tmp_path)
    let_go.set()
    writer.wait()
    assert not writer.is_busy and len(names(tmp_path)) == 1


@pytest.mark.parametrize("field", ["every_steps", "every_secs", "keep"])
def test_numbers_must_be_positive(field):
    with pytest.raises(ConfigError, match=rf"{field}=0: it must be more than 0"):
        Checkpoints(directory="c", **{field: 0})
