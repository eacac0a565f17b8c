"""A run's state as flat name → array, written whole or not at all, restored under any strategy.

`tf.train.Checkpoint` leaves out seed generators silently and binds a file to a strategy's variables; plain
arrays in the model's own order do neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import keras
import numpy as np

from tfdist.config.run_dir import open_atomically
from tfdist.errors import ConfigError
from tfdist.training.checkpoint.state import Blocks, StateArray, named_state, runs_of
from tfdist.training.plan import Place

# A state of up to so many bytes is held until it is written, while training goes on. A larger one might find no room:
# it is read from the variables, and assigned to them, in blocks of rows, while training waits.
COPY_BYTES = 1 << 29
_META, _METRIC, _INPUT, _ARRAY = "__meta__", "__metric__", "__input__", "__array__"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        epoch: Epochs finished.
        step: Steps finished of the epoch after them.
        variables: Weights, optimizer slots, counters and seed generators by name: arrays, or what reads them.
        metrics: State of the metrics over those steps, in the order of `model.metrics_variables`.
        extra: What else is to be known, as JSON holds it: callbacks, history, the run's config.
        arrays: What callbacks keep that is too large for JSON, by name.
        input_state: Where a stream of examples stands, for the loop that reads it; empty if that is not known.
    """

    epoch: int
    step: int
    variables: dict[str, Any]
    metrics: list[np.ndarray]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    input_state: bytes = b""

    @property
    def place(self) -> Place:
        """Where in the data the epoch begins that is to go on, or the next one."""
        # Files of earlier versions do not tell: each of their epochs began with the data.
        return Place(*self.extra.get("place", [self.epoch]))

    @property
    def file_name(self) -> str:
        """Where it belongs in a folder of checkpoints; names sort by position."""
        return f"epoch-{self.epoch:05d}-step-{self.step:08d}.npz"

    @property
    def is_copy(self) -> bool:
        """Whether it stays as it is when training goes on."""
        return all(isinstance(array, np.ndarray) for array in self.variables.values())

    @property
    def is_finite(self) -> bool:
        """Whether no number in it is NaN or infinite: from ruins there is nothing to go on with."""
        return all(_is_finite(array) for array in (*self.variables.values(), *self.metrics))


class _Stored:
    """An array in a checkpoint's file, read as far as it is needed."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        with self._open() as (shape, dtype, _):
            self.shape, self.dtype = shape, dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields runs of rows, in order."""
        with self._open() as (shape, dtype, file):
            for start, stop in runs_of(shape, dtype):
                own = (stop - start, *shape[1:]) if shape else ()
                yield np.frombuffer(file.read(math.prod(own) * dtype.itemsize), dtype).reshape(own)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[tuple[int, ...], np.dtype[Any], IO[bytes]]]:
        with zipfile.ZipFile(self._path) as archive, archive.open(f"{self._name}.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            yield shape, dtype, file


def take_snapshot(
    model: keras.Model,
    *,
    metrics: list[Any],
    arrays: dict[str, Any] | None = None,
    copy_bytes: float = COPY_BYTES,
    outlives_variables: bool = False,
    **rest: Any,
) -> Snapshot:
    """Takes a built model's state. Reading it is no collective, so the chief may do it alone.

    Args:
        model: Built.
        metrics: See `Snapshot`.
        arrays: See there.
        copy_bytes: A state of more is not kept: the snapshot must be written before training goes on.
        outlives_variables: The snapshot is used when TensorFlow's variables are gone, and always copied.
        **rest: What else a `Snapshot` has, as it is.
    """
    state = named_state(model)
    variables: dict[str, Any] = state
    if outlives_variables:
        variables = {name: np.array(array.read()) for name, array in state.items()}
    elif sum(array.num_bytes for array in state.values()) <= copy_bytes:
        variables = {name: array.read() for name, array in state.items()}
    return Snapshot(
        variables=variables,
        metrics=[np.array(m) for m in metrics],
        arrays={name: _plain(np.array(array)) for name, array in (arrays or {}).items()},
        **rest,
    )


def apply_snapshot(snapshot: Snapshot, model: keras.Model, *, with_optimizers: bool = True) -> None:
    """Assigns a snapshot's variables to a built model of the same architecture, whatever strategy holds it.

    Without optimizers it assigns the weights alone, and the model's optimizer may be another.

    Raises:
        ConfigError: If the snapshot is of another model; nothing is assigned then.
    """
    state, arrays = named_state(model, with_optimizers=with_optimizers), snapshot.variables
    for name in sorted(set(arrays) ^ set(state) if with_optimizers else set(state) - set(arrays)):
        where = "the checkpoint" if name in arrays else "the model"
        raise ConfigError(
            f"the checkpoint is of another model: {name!r} is only in {where}; "
            "take the recipe and settings that wrote it, or start anew in another run_dir."
        )
    for name, array in state.items():
        if array.shape != arrays[name].shape:
            raise ConfigError(
                f"the checkpoint is of another model: {name!r} has shape {arrays[name].shape} there, "
                f"{array.shape} here; take the settings that wrote it."
            )
    for name, array in state.items():
        array.assign(arrays[name])


def write_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Writes a snapshot; a file that is there is replaced atomically.

    Raises:
        OSError: If the disk or the folder refuses; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        _write(file, snapshot)


def render_checkpoint(snapshot: Snapshot) -> bytes:
    """Renders a snapshot as the bytes of an `.npz` file; `parse_checkpoint` undoes it."""
    buffer = io.BytesIO()
    _write(buffer, snapshot)
    return buffer.getvalue()


def parse_checkpoint(content: bytes, *, name: str) -> Snapshot:
    """Parses what `render_checkpoint` rendered; every array's checksum is compared. Messages have the name.

    Raises:
        ConfigError: If the content is no whole checkpoint.
    """
    with _refusing_parts(name):
        return _parse(io.BytesIO(content), None)


def read_checkpoint(path: Path) -> Snapshot:
    """Reads a checkpoint's file; every array's checksum is compared.

    If its state is too large to be copied the file must stay there.

    Raises:
        ConfigError: If the file is no whole checkpoint.
        OSError: If it cannot be read at all.
    """
    is_large = path.stat().st_size > COPY_BYTES
    with _refusing_parts(str(path)), open(path, "rb") as file:
        return _parse(file, path if is_large else None)


def _write(file: IO[bytes], snapshot: Snapshot) -> None:
    meta = json.dumps({"epoch": snapshot.epoch, "step": snapshot.step, "extra": snapshot.extra})
    metrics = {f"{_METRIC}{i:05d}": value for i, value in enumerate(snapshot.metrics)}
    stored: Any = {_META: np.array(meta), **metrics, **snapshot.variables}
    stored |= {f"{_ARRAY}{name}": array for name, array in snapshot.arrays.items()}
    if snapshot.input_state:
        stored[_INPUT] = np.frombuffer(snapshot.input_state, np.uint8)
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in stored.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                _write_array(entry, array)


def _write_array(file: IO[bytes], array: np.ndarray | Blocks) -> None:
    if array.dtype.kind in "OU":
        np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
        return
    descr = np.lib.format.dtype_to_descr(array.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in [array] if isinstance(array, np.ndarray) else array.blocks():
        # As it lies in memory: neither a checksum nor the disk needs the copy that NumPy would make, and neither holds
        # up the other threads, which train.
        file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def _refusing_parts(name: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"checkpoint {name!r} cannot be read ({type(error).__name__}): it must be a whole file that a run "
            "wrote; put back a copy of it, or start anew in another run_dir."
        ) from error


def _parse(file: IO[bytes], path: Path | None) -> Snapshot:
    """Reads a file, but for the variables if it has a path: these are left there."""
    with np.load(file, allow_pickle=False) as stored:
        if path is not None and stored.zip.testzip() is not None:
            raise zipfile.BadZipFile
        meta = json.loads(str(stored[_META]))
        own = (_META, _METRIC, _INPUT, _ARRAY)
        return Snapshot(
            epoch=int(meta["epoch"]),
            step=int(meta["step"]),
            variables={
                key: stored[key] if path is None else _Stored(path, key)
                for key in stored.files
                if not key.startswith(own)
            },
            metrics=[stored[key] for key in sorted(stored.files) if key.startswith(_METRIC)],
            extra=dict(meta["extra"]),
            arrays={key.removeprefix(_ARRAY): stored[key] for key in stored.files if key.startswith(_ARRAY)},
            input_state=stored[_INPUT].tobytes() if _INPUT in stored.files else b"",
        )


def _is_finite(array: Any) -> bool:
    return array.is_finite if isinstance(array, StateArray) else bool(np.isfinite(array).all())


def _plain(array: np.ndarray) -> np.ndarray:
    # NumPy's files know no bfloat16; float32 holds each of its values, and `assign` casts them back.
    return array.astype("float32") if array.dtype.name == "bfloat16" else array
