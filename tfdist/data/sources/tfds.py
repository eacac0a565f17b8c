"""TensorFlow Datasets: a split by name, prepared once a machine, in memory where it fits."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.data.sources.indexed import IndexedSource, build_indexed
from tfdist.errors import ConfigError

# Decoded examples up to this size are held in memory, where any batch can be addressed.
IN_MEMORY_BYTES = 512 * 2**20
_NUM_PARALLEL_READS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSplit:
    """One split of a TFDS dataset.

    Attributes:
        name: Dataset, such as "digits" or "mnist", or a `tfds.core.DatasetBuilder`.
        split: Such as "train" or "train[:80%]".
        data_dir: Where it is or shall be prepared; None is `TFDS_DATA_DIR` or, for a dataset that comes with
            tfdist, a cache folder.
        keys: Features that make `(x, y)`; None takes TFDS's supervised pair.
        map_example: Deterministic function of an example.
    """

    name: Any
    split: str
    data_dir: str | None = None
    keys: tuple[str, ...] | None = None
    map_example: Callable[..., Any] | None = None


def tfds_split(
    name: Any,
    split: str,
    *,
    data_dir: str | None = None,
    keys: tuple[str, ...] | None = None,
    map_example: Callable[..., Any] | None = None,
) -> TfdsSplit:
    """Names a split, to be passed to `fit`; nothing is read yet. See `TfdsSplit`.

    Examples:
        >>> import tfdist
        >>> tfdist.tfds_split("mnist", "train[:80%]", data_dir="tensorflow_datasets").split
        'train[:80%]'
    """
    return TfdsSplit(name=name, split=split, data_dir=data_dir, keys=keys, map_example=map_example)


def parse_split(text: str) -> TfdsSplit:
    """Reads "tfds:NAME/SPLIT".

    Raises:
        ConfigError: If it has another form.
    """
    name, slash, split = text.removeprefix("tfds:").rpartition("/")
    if not slash or not name or not split:
        raise ConfigError(f"{text!r} is not of the form tfds:NAME/SPLIT, such as tfds:digits/train.")
    return TfdsSplit(name=name, split=split)


def load_split(split: TfdsSplit) -> tuple[tf.data.Dataset | IndexedSource, int]:
    """Prepares and opens a split.

    Returns:
        The dataset of examples; of files in the `array_record` format, a source that reads any of them at once.
        And the number of its files.

    Raises:
        ConfigError: If there is no such dataset, split or feature.
    """
    # Here: importing TFDS takes a second that runs on arrays should not pay.
    import tensorflow_datasets as tfds

    if split.name == "digits":
        # Three bars for a second's work tell nobody anything.
        tfds.disable_progress_bar()
    builder = _prepare(split, tfds)
    try:
        num_files = len(builder.info.splits[split.split].file_instructions)
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            return _open_array_record(builder, split), num_files
        dataset = builder.as_dataset(
            split=split.split,
            shuffle_files=False,
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
            as_supervised=split.keys is None,
        )
    except (ValueError, KeyError) as error:
        raise ConfigError(f"TFDS cannot read split {split.split!r} of {builder.name!r}: {error}") from None
    if split.keys is not None:
        keys = split.keys
        dataset = dataset.map(lambda example: tuple(example[key] for key in keys))
    if split.map_example is not None:
        dataset = dataset.map(split.map_example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return dataset, num_files


def _open_array_record(builder: Any, split: TfdsSplit) -> IndexedSource:
    source = build_indexed(builder.as_data_source(split=split.split), keys=split.keys)
    # Its readers are made for several threads.
    source = dataclasses.replace(source, num_parallel_reads=_NUM_PARALLEL_READS)
    map_example = split.map_example
    if map_example is None:
        return source

    def map_batch(*batch: Any) -> Any:
        # Traced once on one example, to know what it returns.
        spec = tf.function(map_example).get_concrete_function(*source.spec).structured_outputs
        outputs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), spec)
        return tf.map_fn(lambda example: map_example(*example), batch, fn_output_signature=outputs)

    return dataclasses.replace(source, map_batch=map_batch)


def _prepare(split: TfdsSplit, tfds: Any) -> Any:
    builder = _make_builder(split, tfds)
    with _one_at_a_time(Path(builder.data_dir)):
        if not isinstance(split.name, tfds.core.DatasetBuilder):
            # Anew: another process may have prepared it since, and a builder reads what is there only when made.
            builder = _make_builder(split, tfds)
        builder.download_and_prepare()
    return builder


def _make_builder(split: TfdsSplit, tfds: Any) -> Any:
    if isinstance(split.name, tfds.core.DatasetBuilder):
        return split.name
    if split.name == "digits":
        # Here, since the class derives from TFDS's.
        from tfdist.data.sources.digits import Digits

        return Digits(data_dir=split.data_dir or os.environ.get("TFDS_DATA_DIR") or _cache_dir())
    try:
        return tfds.builder(split.name, data_dir=split.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ConfigError(f"TFDS knows no dataset {split.name!r}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def _one_at_a_time(data_dir: Path) -> Iterator[None]:
    """Keeps processes of one machine from preparing the same dataset at once."""
    path = data_dir.parent / f".{data_dir.name}.lock"
    with contextlib.ExitStack() as opened:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(open(path, "w", encoding="utf-8"))
        except OSError:
            pass  # A read-only folder holds data that is prepared already.
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cache_dir() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = os.path.join(home, "tfdist")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError:
        return os.path.join(tempfile.gettempdir(), f"tfdist-{os.getuid()}")


def load_arrays(dataset: tf.data.Dataset) -> Any | None:
    """Returns a whole dataset as arrays where it fits into `IN_MEMORY_BYTES`, else None."""
    count = int(dataset.cardinality())
    specs = tf.nest.flatten(dataset.element_spec)
    if count <= 0 or not all(isinstance(s, tf.TensorSpec) and s.shape.is_fully_defined() for s in specs):
        return None
    total = sum(count * s.shape.num_elements() * max(s.dtype.size, 1) for s in specs)
    if total > IN_MEMORY_BYTES:
        return None
    return tf.nest.map_structure(np.asarray, next(dataset.batch(count).as_numpy_iterator()))
