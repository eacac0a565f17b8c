"""What the doctor reads from a dead run's folder."""

import pytest

from tfdist.diagnostics.log_reader import explain, find_first, read_run
from tfdist.errors import ConfigError
from tfdist.launcher.events import Event, note_event, read_events

NINE, TEN = 1_795_942_800.0, 1_795_946_400.0  # an hour apart
START = Event(kind="start", at=NINE)


def ended(task, code, **facts):
    return Event(kind="exit", task=task, exit_code=code, how=f"exited with code {code}", **facts)


def verdict(task, code):
    return Event(kind="verdict", task=task, exit_code=code)


def end(code):
    return Event(kind="end", exit_code=code)


def write(folder, events, **outputs):
    (folder / "logs").mkdir()
    for event in [] if events is None else [START, *events]:
        note_event(str(folder), event)
    for task, text in outputs.items():
        (folder / f"logs/{task.replace('_', '-')}.log").write_text(text)


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ([ended("worker:1", 137, step=7)], ("worker:1", 7)),
        ([ended("worker:0", 75), ended("worker:1", 3)], ("worker:1", None)),
        ([ended("worker:0", 75)], ("worker:0", None)),
        (
            [
                ended("worker:1", 9),
                Event(text="worker:1 exited with code 9; worker:1 starts again (1 of 3)"),
                ended("ps:0", 1, step=4),
                verdict("ps:0", 1),
                end(1),
            ],
            ("ps:0", 4),
        ),
        ([ended("worker:1", 137), ended("worker:0", 0), end(0)], None),
        ([], None),
    ],
)
def test_first_to_die_is_the_launchers_verdict_or_the_first_that_did_not_only_lose_the_others(events, found):
    first = find_first(events)
    assert (first and (first.task, first.step)) == found


def test_event_is_what_was_noted_and_half_a_line_is_none(tmp_path):
    noted = [ended("worker:1", 3, step=4, at=TEN), Event(text="a\nb é", at=TEN)]
    write(tmp_path, noted)
    with (tmp_path / "logs/launcher.jsonl").open("a") as log:
        log.write('{"kind": "ex')
    assert read_events(str(tmp_path)) == [START, *noted]
    assert (tmp_path / "logs/launcher.log").read_text().count("a\nb é") == 1


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
    last = Event(kind="exit", task="worker:1", how=how, at=TEN, step=5)
    finding = explain(last, output)
    assert finding.severity == "error" and said in finding.text and finding.remedy
    assert finding.text.startswith(f"worker:1 died first, at {last.clock}, at step 5: it {how}")


def test_failure_that_was_made_is_no_riddle():
    last = Event(kind="exit", task="worker:1", how="was killed by SIGKILL (exit code 137)")
    assert "on purpose: chaos: kill" in explain(last, "", ["chaos: kill:worker:1@step=20"]).text


def test_only_the_last_launch_counts(tmp_path):
    last = ended("worker:1", 1, at=TEN)
    events = [
        ended("worker:0", 1, at=NINE),
        end(1),
        Event(kind="start"),
        last,
        verdict("worker:1", 1),
        end(1),
    ]
    again = "\n--- launched again 2026-11-21 11:00:00 ---\n"
    write(tmp_path, events, worker_0="ok", worker_1=f"OOM when allocating{again}ValueError: new")
    found, progress = read_run(str(tmp_path))
    assert (
        found.text.startswith(f"worker:1 died first, at {last.clock}: it exited with code 1")
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
