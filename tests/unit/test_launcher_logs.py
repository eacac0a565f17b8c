import io
import sys

import pytest

from tfdist.cluster.spec import Task
from tfdist.errors import ConfigError
from tfdist.launcher.process.logs import MAX_LINE_BYTES, Display, LineSplitter, TaskOutput, log_path, open_log


def split(*chunks, now=0.0):
    splitter = LineSplitter()
    lines = []
    for chunk in chunks:
        lines += splitter.feed(chunk, now)
    return lines + splitter.finish()


def test_lines_survive_any_cut():
    text = b"one\ntwo \xff\xfe\n\nlast without end"
    for at in range(len(text)):
        assert split(text[:at], text[at:]) == [b"one", b"two \xff\xfe", b"", b"last without end"]
    assert split(*[text[i : i + 1] for i in range(len(text))]) == split(text)


def test_windows_line_ends_are_no_progress_bars():
    assert split(b"one\r\ntwo\r", b"\nthree\r\n") == [b"one", b"two", b"three"]


def test_progress_bar_is_thinned_and_ends_in_its_last_state():
    splitter = LineSplitter()
    seen = []
    for tenth in range(100):
        seen += splitter.feed(f"step {tenth}\r".encode(), tenth / 10)
    seen += splitter.feed(b"step 100\n", 10.0)
    assert len(seen) == 11 and seen[0] == b"step 0" and seen[-1] == b"step 100"


def test_progress_bar_with_leading_carriage_return_is_shown():
    assert split(b"\rstep 1", b"\rstep 2", b"\rstep 3\n")[-1] == b"step 3"


def test_progress_bar_does_not_grow_in_memory():
    splitter = LineSplitter()
    for _ in range(1000):
        splitter.feed(b"x" * 1000 + b"\r", 0.0)
    assert splitter._size < 10_000


def test_very_long_line_survives_whole():
    line = b"x" * (3 * 2**20)
    assert split(*[line[i : i + 65536] for i in range(0, len(line), 65536)], b"\n") == [line]


def test_endless_line_is_cut_but_lost_nowhere():
    lines = split(*[b"y" * 2**20] * 40)
    assert sum(map(len, lines)) == 40 * 2**20
    assert max(map(len, lines)) <= MAX_LINE_BYTES + 2**20


def test_log_keeps_bytes_whole_and_never_overwrites(tmp_path):
    run_dir, task = str(tmp_path / "a run"), Task("worker", 1)
    for text in (b"bar 1\rbar 2\r\n\xff", b"second"):
        output = TaskOutput(task, open_log(run_dir, task))
        output.receive("stdout", text)
        output.receive("stdout", b"")
        output.close()
    kept = log_path(run_dir, task).read_bytes()
    assert kept.startswith(b"bar 1\rbar 2\r\n\xff\n--- launched again") and kept.endswith(b"---\nsecond")
    assert log_path(run_dir, task).name == "worker-1.log"


def test_tail_holds_the_last_lines_of_both_streams():
    output = TaskOutput(Task("ps", 0), None)
    output.receive("stdout", b"".join(b"%d\n" % i for i in range(50)))
    output.receive("stderr", b"boom\n")
    assert len(output.tail) == 20 and list(output.tail)[-2:] == [b"49", b"boom"]


def test_unwritable_run_dir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*choose another --run_dir"):
        open_log(str(tmp_path / "file"), Task("ps", 0))


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_prefix_is_coloured_on_a_terminal_only(monkeypatch, env, coloured):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(raw))
    display = Display(env)
    display.show(Task("worker", 1), "stdout", [b"caf\xe9"])
    assert (b"\x1b[" in raw.getvalue()) == coloured
    assert raw.getvalue().endswith(b" caf\xe9\n") and b"[worker:1]" in raw.getvalue()


def test_stream_without_bytes_below_is_served(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    Display({}).show(Task("chief", 0), "stderr", [b"caf\xe9", b""])
    assert text.getvalue() == "[chief:0] caf\N{REPLACEMENT CHARACTER}\n[chief:0] \n"
