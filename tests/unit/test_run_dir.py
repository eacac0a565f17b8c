import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfdist.config.run_config import RunConfig
from tfdist.config.run_dir import RunDir, append_record, write_atomically
from tfdist.errors import ConfigError


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / 'a run\'s "dir" é')


def build_config(**changes):
    return RunConfig(
        **({"recipe": "digits_cnn", "global_batch_size": 8, "epochs": 1, "run_dir": "x"} | changes)
    )


def test_create_keeps_the_config(run_dir):
    run_dir.create(build_config(seed=3))
    assert run_dir.read_config() == build_config(seed=3)
    assert [item.name for item in run_dir.path.iterdir()] == ["config.json"]


def test_check_leaves_no_file(run_dir):
    run_dir.check(build_config())
    assert list(run_dir.path.iterdir()) == []


def test_create_accepts_the_launchers_logs(run_dir):
    run_dir.logs_dir.mkdir(parents=True)
    run_dir.create(build_config())


def test_an_earlier_run_is_not_overwritten(run_dir):
    run_dir.create(build_config())
    with pytest.raises(ConfigError, match=r"already holds a run of 'digits_cnn' .* add --resume"):
        run_dir.create(build_config(seed=7))
    assert run_dir.read_config() == build_config()


def test_a_folder_of_other_files_is_refused(run_dir):
    run_dir.path.mkdir()
    (run_dir.path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not empty \(thesis.tex\)"):
        run_dir.check(build_config())


def test_resume_goes_on_with_the_same_model(run_dir):
    run_dir.create(build_config())
    longer = build_config(epochs=9, resume=True, strategy="ps", num_ps=1)
    run_dir.create(longer)
    assert run_dir.read_config() == build_config()  # until its checkpoint has been found to fit
    run_dir.write_config(longer)
    assert run_dir.read_config() == longer


@pytest.mark.parametrize(
    "changes", [{"recipe": "text_lm"}, {"overrides": ("filters=8",)}, {"optimizer": "sgd"}]
)
def test_resume_with_another_model_is_refused(run_dir, changes):
    run_dir.create(build_config())
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}=.* or start anew"):
        run_dir.check(build_config(resume=True, **changes))


@pytest.mark.parametrize("changes", [{"resume": True}, {"mode": "eval"}, {"mode": "export"}])
def test_what_needs_a_run_says_when_there_is_none(run_dir, changes):
    with pytest.raises(ConfigError, match="holds no run"):
        run_dir.check(build_config(**changes))
    assert not run_dir.path.exists()


def test_eval_of_a_finished_run_keeps_its_config(run_dir):
    run_dir.create(build_config())
    run_dir.create(build_config(mode="eval"))
    assert run_dir.read_config().mode == "train"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_file_in_the_way_is_one_line(tmp_path, mode):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run_dir=") as caught:
        RunDir(tmp_path / "file" / "run").check(build_config(mode=mode))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that even root cannot write")
def test_an_unwritable_folder_is_one_line():
    with pytest.raises(ConfigError, match="cannot be written .* choose a folder") as caught:
        RunDir(Path("/proc/tfdist run")).check(build_config())
    assert "\n" not in str(caught.value)


def test_a_broken_config_is_refused(run_dir):
    run_dir.path.mkdir()
    run_dir.config_file.write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="cannot be read"):
        run_dir.read_config()


def test_metrics_keep_every_digit_and_stay_json(run_dir):
    run_dir.path.mkdir()
    record = {
        "epoch": 0,
        "loss": 0.1 + 0.2,
        "f32": np.float32(0.1),
        "n": np.int64(3),
        "per_class": np.array([1.5, np.nan]),
    }
    append_record(run_dir.metrics_file, record)
    append_record(
        run_dir.metrics_file,
        {"epoch": 1, "loss": float("nan"), "up": float("inf"), "down": np.float32("-inf")},
    )

    def refuse(name):
        raise AssertionError(name)

    first, second = (
        json.loads(line, parse_constant=refuse) for line in run_dir.metrics_file.read_text().splitlines()
    )
    assert first == {
        "epoch": 0,
        "loss": 0.1 + 0.2,
        "f32": float(np.float32(0.1)),
        "n": 3,
        "per_class": [1.5, "NaN"],
    }
    assert second == {"epoch": 1, "loss": "NaN", "up": "Infinity", "down": "-Infinity"}
    assert float(second["up"]) == float("inf")


def test_metrics_cut_short_by_a_crash_are_repaired(run_dir):
    run_dir.path.mkdir()
    for epoch in range(3):
        append_record(run_dir.metrics_file, {"epoch": epoch})
    with open(run_dir.metrics_file, "a") as file:
        file.write('{"epoch": 3, "lo')
    assert run_dir.drop_metrics_from(2) == [{"epoch": 0}, {"epoch": 1}]
    append_record(run_dir.metrics_file, {"epoch": 2})
    assert run_dir.metrics_file.read_text() == '{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n'


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("config.json", "old")]


def test_the_module_loads_no_tensorflow():
    code = (
        "import sys, tfdist.config.run_dir; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
