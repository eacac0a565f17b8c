"""A run's state as flat name → array, written whole or not at all, restored under any strategy.

`tf.train.Checkpoint` leaves out seed generators silently and binds a file to a strategy's variables; plain
arrays in the model's own order do neither.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.training.run_dir import write_atomically

_META, _METRIC = "__meta__", "__metric__"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        epoch: Epochs finished.
        step: Steps finished of the epoch after them.
        variables: Weights, optimizer slots, counters and seed generators by name.
        metrics: State of the metrics over those steps, in the order of `model.metrics_variables`.
        extra: What else is to be known, as JSON holds it: callbacks, history.
    """

    epoch: int
    step: int
    variables: dict[str, np.ndarray]
    metrics: list[np.ndarray]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Where it belongs in a folder of checkpoints; names sort by position."""
        return f"epoch-{self.epoch:05d}-step-{self.step:08d}.npz"

    @property
    def is_finite(self) -> bool:
        """Whether no number in it is NaN or infinite: from ruins there is nothing to go on with."""
        return all(np.isfinite(array).all() for array in (*self.variables.values(), *self.metrics))


def take_snapshot(
    model: keras.Model, *, epoch: int, step: int, metrics: list[Any], extra: dict[str, Any]
) -> Snapshot:
    """Copies a built model's state. Reading it is no collective, so the chief may do it alone."""
    variables = {name: _plain(np.array(v.numpy())) for name, v in _named_variables(model).items()}
    return Snapshot(
        epoch=epoch, step=step, variables=variables, metrics=[np.array(m) for m in metrics], extra=extra
    )


def apply_snapshot(snapshot: Snapshot, model: keras.Model) -> None:
    """Assigns a snapshot's variables to a built model, whatever strategy holds it.

    Args:
        snapshot: What `take_snapshot` took.
        model: A built model of the same architecture and optimizer.

    Raises:
        ConfigError: If the snapshot is of another model; nothing is assigned then.
    """
    variables, arrays = _named_variables(model), snapshot.variables
    for name in sorted(set(arrays) ^ set(variables)):
        where = "the checkpoint" if name in arrays else "the model"
        raise ConfigError(
            f"the checkpoint is of another model: {name!r} is only in {where}; "
            "resume with the recipe and settings that wrote it, or start anew in another run_dir."
        )
    for name, variable in variables.items():
        if tuple(variable.shape) != arrays[name].shape:
            raise ConfigError(
                f"the checkpoint is of another model: {name!r} has shape {arrays[name].shape} there, "
                f"{tuple(variable.shape)} here; resume with the settings that wrote it."
            )
    for name, variable in variables.items():
        variable.assign(arrays[name])


def write_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Writes a snapshot.

    Args:
        path: The file; replaced atomically.
        snapshot: What to write.

    Raises:
        OSError: If the disk or the folder refuses; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_checkpoint(snapshot))


def render_checkpoint(snapshot: Snapshot) -> bytes:
    """Renders a snapshot as the bytes of an `.npz` file; `parse_checkpoint` undoes it."""
    meta = json.dumps({"epoch": snapshot.epoch, "step": snapshot.step, "extra": snapshot.extra})
    metrics = {f"{_METRIC}{i:05d}": value for i, value in enumerate(snapshot.metrics)}
    stored: Any = {_META: np.array(meta), **metrics, **snapshot.variables}
    buffer = io.BytesIO()
    np.savez(buffer, **stored)
    return buffer.getvalue()


def parse_checkpoint(content: bytes, *, name: str) -> Snapshot:
    """Parses what `render_checkpoint` rendered; every array's checksum is compared.

    Args:
        content: The file's bytes.
        name: The file's name, for messages.

    Returns:
        The snapshot.

    Raises:
        ConfigError: If the content is no whole checkpoint.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            meta = json.loads(str(stored[_META]))
            metrics = [stored[key] for key in sorted(stored.files) if key.startswith(_METRIC)]
            variables = {key: stored[key] for key in stored.files if not key.startswith((_META, _METRIC))}
            return Snapshot(
                epoch=int(meta["epoch"]),
                step=int(meta["step"]),
                variables=variables,
                metrics=metrics,
                extra=dict(meta["extra"]),
            )
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"checkpoint {name!r} cannot be read ({type(error).__name__}): it must be a whole file that a run "
            "wrote; put back a copy of it, or start anew in another run_dir."
        ) from error


def _plain(array: np.ndarray) -> np.ndarray:
    # NumPy's files know no bfloat16; float32 holds each of its values, and `assign` casts them back.
    return array.astype("float32") if array.dtype.name == "bfloat16" else array


def _named_variables(model: keras.Model) -> dict[str, Any]:
    """Returns the variables by place and path: paths alone need not be unique."""
    optimizers = keras_internals.find_optimizers(model)
    metrics = {id(v) for v in model.metrics_variables}
    kept = [v for v in keras_internals.all_variables(model, optimizers) if id(v) not in metrics]
    # Without the numbers by which Keras tells the `dense_1` of a process's second model from that of its first; in
    # a slot they stand in the middle: "adam/sequential_1_dense_1_kernel_momentum".
    return {f"{place:05d} {re.sub(r'_[0-9]+(?=[_/]|$)', '', v.path)}": v for place, v in enumerate(kept)}
