"""A report tells of a run what its folder does, whatever that lacks, and fetches nothing."""

import html.parser
import json

import numpy as np
import pytest
from tiers import rarely

from tfdist.config.run_config import RunConfig
from tfdist.config.run_dir import RunDir, append_record
from tfdist.launcher.events import Event, note_event
from tfdist.report import main
from tfdist.reporting import is_wanted
from tfdist.reporting.record import read_record
from tfdist.reporting.write import write_report

EPOCH = {"step": 23, "wall_secs": 3.0, "examples_per_sec": 900.0, "memory_mb": 480.0}


def make_run(folder, *, num_epochs=3, events=(), results=None, **settings):
    run_dir = RunDir(folder)
    folder.mkdir(parents=True)
    values = {"recipe": "digits_cnn", "global_batch_size": 64, "epochs": 3, "run_dir": str(folder)}
    environment = {"host": "h1", "recipe_defaults": {"global_batch_size": 64, "epochs": 15}}
    run_dir.write_config(RunConfig(**{**values, **settings}), environment)
    for epoch in range(num_epochs):
        step_secs = [{"input": 1e-3, "compute": 4e-3 * (1 + worker)} for worker in range(2)]
        logs = {"loss": 1 / (1 + epoch), "val_loss": 2 / (1 + epoch), "f1": [0.5, 0.6], "accuracy": 0.9}
        append_record(run_dir.metrics_file, {"epoch": epoch, **EPOCH, "step_secs": step_secs, **logs})
    if results is not None:
        run_dir.write_results(results)
    if events:
        run_dir.logs_dir.mkdir()
        (run_dir.logs_dir / "worker-1.log").write_text("ValueError: <b>that</b> row\n")
    for event in events:
        note_event(str(folder), event)
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.text, self.links, self.tags, self.in_style = "", [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.in_style = tag == "style"

    def handle_data(self, data):
        self.text += "" if self.in_style else data


def read(folders, output=None):
    return Page(write_report([str(folder) for folder in folders], output).read_text())


def ended(task, code, **facts):
    how = f"exited with code {code}"
    return Event(kind="exit", text=f"{task} {how}", task=task, how=how, exit_code=code, **facts)


def test_page_of_a_finished_run(tmp_path):
    make_run(tmp_path / "run", results={"test": {"loss": np.float32(0.25)}, "trained_secs": 9.0})
    page = read([tmp_path / "run"])
    assert "Finished." in page.text and "0.25" in page.text and "digits_cnn under one_device" in page.text
    assert "goes on by" not in page.text
    # A curve for each metric that is one number, with its validation; f1 is two.
    for title in ("loss", "accuracy", "examples a second", "Where a step's time went"):
        assert title in page.text
    assert "validation" in page.text and "f1" not in page.text.replace("1f1b", "")


def test_nothing_is_fetched(tmp_path):
    page = read([make_run(tmp_path / "run", results={"test": {}})])
    assert "script" not in page.tags and "link" not in page.tags
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []


def test_page_of_a_run_that_died_says_of_what(tmp_path):
    events = [
        Event(kind="start", text="starting all: worker:0, worker:1", at=100.0),
        ended("worker:1", 1, at=160.0, step=40),
        Event(kind="verdict", text="worker:1 exited with code 1", task="worker:1", exit_code=1, at=161.0),
        Event(kind="end", text="ended with code 1", exit_code=1, at=162.0),
    ]
    page = read([make_run(tmp_path / "run", num_epochs=1, events=events)])
    assert "Failed." in page.text and "worker:1 died first" in page.text
    assert "<b>that</b> row" in page.text  # as text, not as bold
    assert "60.0 s" in page.text and "What happened when" in page.text
    assert f"--resume --run_dir={tmp_path}/run" in page.text
    assert "1 of 3" in page.text


@pytest.mark.parametrize(
    ("events", "results", "state"),
    [
        ([], {"test": {"loss": 1.0}}, "finished"),
        ([], {"error": "ValueError: no"}, "failed"),
        ([], None, "unfinished"),
        ([Event(kind="start")], None, "unfinished"),
        ([Event(kind="start"), Event(kind="end", exit_code=143)], None, "stopped"),
        ([Event(kind="start"), Event(kind="end", exit_code=3)], None, "failed"),
        (
            [Event(kind="start"), ended("worker:0", 137), Event(kind="end", exit_code=0)],
            {"test": {}},
            "finished",
        ),
    ],
)
def test_state_follows_from_what_was_left(tmp_path, events, results, state):
    make_run(tmp_path / "run", events=events, results=results)
    assert read_record(str(tmp_path / "run")).state == state


def test_results_of_an_earlier_end_are_forgotten_when_the_run_goes_on(tmp_path):
    folder = make_run(tmp_path / "run", results={"test": {"loss": 1.0}})
    run_dir = RunDir(folder)
    run_dir.write_config(run_dir.read_config())
    assert read_record(str(folder)).state == "unfinished"


def test_runs_are_compared_side_by_side(tmp_path):
    make_run(tmp_path / "a", results={"test": {"loss": 0.1}}, seed=1)
    make_run(tmp_path / "b", num_epochs=0, seed=2, strategy="ps", num_ps=1)
    page = read([tmp_path / "a", tmp_path / "b"], str(tmp_path / "both.html"))
    assert "2 runs" in page.text and "a training" in page.text
    assert page.text.index("seed") > 0 and "num_ps" in page.text


@pytest.mark.parametrize(
    "name", rarely(["<script>alert(1)</script>", "a & b", "ein Lauf"], ci=["a ", "ein "])
)
def test_names_are_text(tmp_path, name):
    make_run(tmp_path / name.replace("/", "∕"), recipe="./<i>.py", overrides=("a=<b>",))
    page = read([tmp_path / name.replace("/", "∕")])
    assert "script" not in page.tags and "i" not in page.tags
    assert "a=<b>" in page.text


def test_only_what_differs_from_the_defaults_is_said_first(tmp_path):
    make_run(tmp_path / "run", drop_remainder=True)
    said = read_record(str(tmp_path / "run")).said_settings
    assert said == {
        "recipe": "digits_cnn", "strategy": "one_device", "global_batch_size": 64, "epochs": 3, "drop_remainder": True,
    }  # fmt: skip


def test_numbers_that_are_none_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", num_epochs=0)
    lines = [{"epoch": 0, "loss": "NaN"}, {"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": "Infinity"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"epoch": 3, "los')  # as a crash leaves it
    assert read_record(str(folder)).series("loss") == ([2], [0.5])
    assert "loss" in read([folder]).text


def test_images_are_shown_right_and_wrong(tmp_path):
    folder = make_run(tmp_path / "run", results={"test": {}})
    images = np.random.default_rng(0).random((3, 8, 8, 1))
    np.savez(RunDir(folder).samples_file, images=images, labels=[3, 4, 5], predicted=[3, 9, 5])
    page = read([folder])
    assert sum(link.startswith("data:image/png") for link in page.links) == 3
    assert "9, is 4" in page.text


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([str(tmp_path / "empty")], "holds no run"),
        ([], "required: RUN_DIR"),
        (["--nonsense"], "see --help"),
        ([str(make_run(tmp_path / "run")), f"--output={tmp_path}/no/page.html"], "cannot be written"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_whoever_wants_none_gets_none():
    assert is_wanted("on", {}) and not is_wanted("off", {}) and not is_wanted("on", {"TFDIST_REPORT": "off"})
