"""What the doctor reads from a dead run's folder."""

import pytest

from tfdist.diagnostics.log_reader import End, explain, find_first, read_run
from tfdist.errors import ConfigError

START = "2026-11-21 10:00:00 starting all: worker:0, worker:1"


def write(folder, launcher, **outputs):
    (folder / "logs").mkdir()
    if launcher is not None:
        (folder / "logs/launcher.log").write_text("\n".join([START, *launcher]) + "\n")
    for task, text in outputs.items():
        (folder / f"logs/{task.replace('_', '-')}.log").write_text(text)


def notes(*texts):
    return [(f"10:00:0{i}", text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["worker:1 was killed by SIGKILL (exit code 137) at step 7"], End(task="worker:1", how="", step=7)),
        (
            ["worker:0 lost the others (exit code 75)", "worker:1 exited with code 3"],
            End(task="worker:1", how=""),
        ),
        (["worker:0 lost the others (exit code 75)"], End(task="worker:0", how="")),
        (
            [
                "worker:1 exited with code 9",
                "worker:1 exited with code 9; worker:1 starts again (1 of 3)",
                "ps:0 exited with code 1 at step 4",
                "ps:0 exited with code 1; whole output: run/logs/ps-0.log",
                "ended with code 1",
            ],
            End(task="ps:0", how="", step=4),
        ),
        (
            [
                "worker:1 was killed by SIGKILL (exit code 137)",
                "worker:0 exited with code 0",
                "ended with code 0",
            ],
            None,
        ),
        ([], None),
    ],
)
def test_first_to_die_is_the_launchers_verdict_or_the_first_that_did_not_only_lose_the_others(texts, found):
    first = find_first(notes(*texts))
    assert (first and (first.task, first.step)) == (found and (found.task, found.step))


@pytest.mark.parametrize(
    ("how", "output", "said"),
    [
        ("was killed by SIGKILL: out of memory (peak 3.9 GB of 4.0 GB)", "", "most likely out of memory"),
        ("exited with code 1", "tfdist.train: OOM when allocating tensor", "most likely out of memory"),
        ("was killed by SIGKILL (exit code 137)", "", "killed by somebody else"),
        ("exited with code 2", "cannot start '/opt/python' (No such file): correct it", "its Python lacks"),
        ("lost its host h2", "", "its machine or the way to it is gone"),
        ("made no step for 600 s, and was killed", "", "it stood still"),
        ("exited with code 1", "the loss is not finite in epoch 1 at step 6: first in the targets", "NaN"),
        (
            "exited with code 1",
            "port 1 of worker:0 (h:1) cannot be bound (Address already in use)",
            "port was taken",
        ),
        ("exited with code 1", "Traceback\nModuleNotFoundError: No module named 'keras'", "its Python lacks"),
        (
            "exited with code 1",
            '  File "r.py", line 3, in build_data\n    x\nValueError: row 12',
            "bad input: ValueError",
        ),
        ("lost the others (exit code 75)", "tfdist: other tasks are gone", "lost a peer"),
        ("was killed by SIGSEGV (exit code 139)", "", "a crash in native code"),
        ("was killed by SIGTERM (exit code 143)", "", "it was told to end"),
        (
            "exited with code 1",
            "Traceback (most recent call last):\n  File\nKeyError: 'x'",
            "a Python exception: KeyError: 'x'",
        ),
        (
            "exited with code 2",
            "tfdist.train: epochs is -1: it must be",
            "its last line: tfdist.train: epochs",
        ),
        ("exited with code 1", "", "its last line: (nothing)"),
    ],
)
def test_cause_is_read_from_how_it_ended_and_what_it_said(how, output, said):
    finding = explain(End(task="worker:1", how=how, time="10:00:03", step=5), output)
    assert finding.severity == "error" and said in finding.text and finding.remedy
    assert finding.text.startswith(f"worker:1 died first, at 10:00:03, at step 5: it {how}")


def test_failure_that_was_made_is_no_riddle():
    end = End(task="worker:1", how="was killed by SIGKILL (exit code 137)")
    assert "on purpose: chaos: kill" in explain(end, "", ["chaos: kill:worker:1@step=20"]).text


def test_only_the_last_launch_counts(tmp_path):
    launcher = [
        "2026-11-21 10:00:01 worker:0 exited with code 1",
        "2026-11-21 10:00:01 ended with code 1",
        "2026-11-21 11:00:00 starting all: worker:0, worker:1",
        "2026-11-21 11:00:09 worker:1 exited with code 1",
        "2026-11-21 11:00:09 worker:1 exited with code 1; whole output: run/logs/worker-1.log",
        "2026-11-21 11:00:09 ended with code 1",
    ]
    again = "\n--- launched again 2026-11-21 11:00:00 ---\n"
    write(tmp_path, launcher, worker_0="ok", worker_1=f"OOM when allocating{again}ValueError: new")
    found, progress = read_run(str(tmp_path))
    assert (
        found.text.startswith("worker:1 died first, at 2026-11-21 11:00:09")
        and "ValueError: new" in found.text
    )
    assert "no whole epoch" in progress.text


def test_run_without_the_launchers_log_names_who_has_a_cause_of_its_own(tmp_path):
    write(
        tmp_path,
        None,
        worker_0="tfdist: other tasks are gone in the middle of a step",
        worker_1="Traceback (most recent call last):\nKeyError: 1",
        worker_2="all is well",
    )
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "step": 23}\n{"epoch": 1, "step": 46}\n{"epo')
    found, progress = read_run(str(tmp_path))
    assert found.text.startswith("worker:1 died first, at 2") and "KeyError: 1" in found.text
    assert "2 whole epochs, 46 steps" in progress.text


def test_launcher_that_never_ended_is_said(tmp_path):
    write(tmp_path, [], worker_0="ok", worker_1="ok")
    found, _ = read_run(str(tmp_path))
    assert found.severity == "note" and "was killed with all its tasks" in found.remedy


def test_folder_without_logs_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match="has no logs"):
        read_run(str(tmp_path))
