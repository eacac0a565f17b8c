"""Criteo's layout, on small files: what a line becomes, which split it goes to, and what a bad one says."""

import numpy as np
import pytest
import tensorflow as tf

from recipes._criteo import read_criteo
from tfdist.errors import ConfigError

HASHES = [f"{7919 * c:08x}" for c in range(26)]


def line(label=0, numbers=range(13), hashes=HASHES):
    return "\t".join(map(str, [label, *numbers, *hashes])) + "\n"


def read(folder, split, num_rows=100):
    return list(read_criteo(folder, split, num_rows=num_rows).as_numpy_iterator())


def test_a_line_becomes_numbers_ids_and_a_label(tmp_path):
    """As the challenge's train.txt has it: whole numbers, some below zero, hashes, and any of them left empty."""
    numbers = ["", -2, 0, 1, 2, 3, 40, 500, 6000, "", 10, 11, ""]
    hashes = ["", *HASHES[1:12], HASHES[1], *HASHES[13:25], ""]
    (tmp_path / "train.txt").write_text(line(1, numbers, hashes) + line())
    (inputs, label), (second, other_label) = read(tmp_path, "train")
    assert inputs["numbers"].tolist() == [n or 0 for n in numbers]
    assert (label.tolist(), other_label.tolist()) == ([1], [0])
    first_ids = 100 * np.arange(26)
    assert inputs["ids"].dtype == np.int32
    rows = inputs["ids"] - first_ids
    assert rows[0] == rows[25] == 0, "an empty id has a row to itself"
    assert all(0 < row < 100 for row in rows[1:25])
    assert rows[12] == rows[1], "the same hash in another column has the same place there"
    np.testing.assert_array_equal(second["ids"][1:12], inputs["ids"][1:12])
    assert len({*rows[1:25]}) > 15, "hashes are spread over the rows"


def test_of_a_single_file_every_seventh_line_is_test(tmp_path):
    (tmp_path / "train.txt").write_text("".join(line(numbers=[n] * 13) for n in range(1, 22)))
    (tmp_path / "test.txt").write_text("no label here\n")
    parts = [[int(x["numbers"][0]) for x, _ in read(tmp_path, split)] for split in ("train", "test")]
    assert parts[1] == [7, 14, 21]
    assert parts[0] == [n for n in range(1, 22) if n % 7]


def test_of_several_days_the_last_is_test(tmp_path):
    for day in (0, 2, 10):
        (tmp_path / f"day_{day}").write_text(line(numbers=[day] * 13) * 2)
    assert [int(x["numbers"][0]) for x, _ in read(tmp_path, "train")] == [0, 0, 2, 2]
    assert [int(x["numbers"][0]) for x, _ in read(tmp_path, "test")] == [10, 10]


@pytest.mark.parametrize(
    "bad",
    [
        line().partition("\t")[2],
        line()[:-10] + "\n",
        line(label=2),
        line(numbers=["x", *range(12)]),
        line(hashes=[*HASHES[:25], "no hash"]),
        line().replace("\t", ","),
        "\n",
    ],
    ids=["no label", "a field too few", "label", "number", "hash", "commas", "empty"],
)
def test_a_malformed_line_is_named(tmp_path, bad):
    (tmp_path / "train.txt").write_text(line() * 3 + bad + line())
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"train\.txt:4: a line is 0 or 1, 13 whole"):
        read(tmp_path, "train")


def test_a_stream_is_saved_and_goes_on(tmp_path):
    """Where a run is resumed inside an epoch."""
    (tmp_path / "train.txt").write_text("".join(line(numbers=[n] * 13) for n in range(20)))
    dataset = read_criteo(tmp_path, "train", num_rows=10)
    iterator = iter(dataset)
    for _ in range(5):
        next(iterator)
    saved = tf.train.Checkpoint(iterator=iterator).save(str(tmp_path / "saved"))
    expected = [x["numbers"][0].numpy() for x, _ in iterator]
    again = iter(dataset)
    tf.train.Checkpoint(iterator=again).restore(saved)
    assert [x["numbers"][0].numpy() for x, _ in again] == expected


def test_a_folder_without_its_files_is_refused(tmp_path):
    (tmp_path / "test.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds none of Criteo's files; unpack train\.txt"):
        read_criteo(tmp_path, "train", num_rows=10)


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_rows=1: it must be at least 2"):
        read_criteo(tmp_path, "train", num_rows=1)
