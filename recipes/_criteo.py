"""Criteo's click logs, from the tab-separated files that it published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfdist.errors import ConfigError

NUM_NUMBERS = 13
NUM_IDS = 26
_TEST_EVERY = 7  # of the lines of a single file, which holds seven days
_FILE = re.compile(r"train\.txt|day_[0-9]+")
_LINE = rf"[01](\t(-?[0-9]+)?){{{NUM_NUMBERS}}}(\t([0-9a-f]+)?){{{NUM_IDS}}}"
_RULE = "a line is 0 or 1, 13 whole numbers and 26 hashes, apart by tabs; numbers and hashes may be left empty. Here: "


def read_criteo(data_dir: str | Path, split: str, *, num_rows: int) -> tf.data.Dataset:
    """Reads one split of a log.

    An id is a hash, of any number of possible ones, so each column's are hashed once more into `num_rows`; two may
    then share a row. An empty id has the column's first row to itself. An empty number is 0.

    Args:
        data_dir: Folder that holds `train.txt` (the Kaggle challenge's), or `day_0`, `day_1`, … (the terabyte's),
            unpacked. Other files, such as the challenge's `test.txt` without labels, are not looked at.
        split: "test" is the last of several files, of a single one every seventh line; "train" the rest.
        num_rows: Rows for each column of ids.

    Returns:
        Examples of `{"numbers": [13] float32, "ids": [26] int32}`, the ids of column c from `c * num_rows` on, and the
        label, `[1]` float32. A line that breaks the rule is a `tf.errors.InvalidArgumentError` that says which.

    Raises:
        ConfigError: If there is no such file, or `num_rows` is less than 2.
    """
    if num_rows < 2:
        raise ConfigError(f"num_rows={num_rows}: it must be at least 2; the first row is for empty ids.")
    files = _find_files(Path(data_dir).expanduser())
    chosen = files if len(files) == 1 else files[-1:] if split == "test" else files[:-1]
    lines = tf.data.Dataset.from_tensor_slices(chosen).flat_map(_number_lines)
    if len(files) == 1:
        lines = lines.filter(lambda _, number, __: (number % _TEST_EVERY == 0) == (split == "test"))

    def parse(file: tf.Tensor, number: tf.Tensor, line: tf.Tensor) -> Any:
        return _parse(file, number, line, num_rows)

    return lines.map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _find_files(folder: Path) -> list[str]:
    found = [path for path in folder.glob("*") if _FILE.fullmatch(path.name)]
    if not found:
        raise ConfigError(
            f"data_dir={str(folder)!r} holds none of Criteo's files; unpack train.txt, or day_0, day_1, …, there."
        )
    return [str(path) for path in sorted(found, key=lambda path: (len(path.name), path.name))]


def _number_lines(file: tf.Tensor) -> tf.data.Dataset:
    return tf.data.TextLineDataset(file).enumerate(1).map(lambda number, line: (file, number, line))


def _parse(file: tf.Tensor, number: tf.Tensor, line: tf.Tensor, num_rows: int) -> Any:
    complaint = tf.strings.join([file, ":", tf.strings.as_string(number), ": ", _RULE, line])
    is_sound = tf.strings.regex_full_match(line, _LINE)
    with tf.control_dependencies([tf.debugging.Assert(is_sound, [complaint])]):
        line = tf.identity(line)
    defaults: list[list[Any]] = [[0.0]] * (1 + NUM_NUMBERS) + [[""]] * NUM_IDS
    fields = tf.io.decode_csv(line, defaults, field_delim="\t", use_quote_delim=False)
    hashes = tf.stack(fields[1 + NUM_NUMBERS :])
    buckets = tf.cast(tf.strings.to_hash_bucket_fast(hashes, num_rows - 1), tf.int32) + 1
    ids = tf.where(hashes == "", 0, buckets) + num_rows * tf.range(NUM_IDS)
    return {"numbers": tf.stack(fields[1 : 1 + NUM_NUMBERS]), "ids": ids}, fields[0][tf.newaxis]
