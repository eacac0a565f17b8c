"""A run's state as flat name → array, written whole or not at all, restored under any strategy.

`tf.train.Checkpoint` leaves out seed generators silently and binds a file to a strategy's variables; plain
arrays in the model's own order do neither.
"""

from __future__ import annotations

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


def save_checkpoint(path: Path, *, model: keras.Model, epoch: int) -> None:
    """Writes weights, optimizer slots, iterations and seed generators.

    Args:
        path: The file; replaced atomically.
        model: A built model. Reading it is no collective, so the chief may do it alone.
        epoch: Epochs finished.
    """
    arrays = {name: _plain(np.asarray(v.numpy())) for name, v in _named_variables(model).items()}
    buffer = io.BytesIO()
    meta = json.dumps({"epoch": epoch})
    stored: Any = {"__meta__": np.array(meta), **arrays}
    np.savez(buffer, **stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, *, model: keras.Model) -> int:
    """Assigns what `save_checkpoint` wrote to a built model, whatever strategy holds it.

    Args:
        path: The file.
        model: A built model of the same architecture and optimizer.

    Returns:
        Epochs finished when it was written.

    Raises:
        ConfigError: If the file cannot be read or is of another model; nothing is assigned then.
    """
    variables = _named_variables(model)
    try:
        # Opened here: np.load leaves a file that is no archive open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if name != "__meta__"}
            epoch = int(json.loads(str(stored["__meta__"]))["epoch"])
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}): it must be a whole file that a run "
            "wrote; put back a copy of it, or start anew in another run_dir."
        ) from error
    for name in sorted(set(arrays) ^ set(variables)):
        where = "the checkpoint" if name in arrays else "the model"
        raise ConfigError(
            f"checkpoint {str(path)!r} is of another model: {name!r} is only in {where}; "
            "resume with the recipe and settings that wrote it, or start anew in another run_dir."
        )
    for name, variable in variables.items():
        if tuple(variable.shape) != arrays[name].shape:
            raise ConfigError(
                f"checkpoint {str(path)!r} is of another model: {name!r} has shape {arrays[name].shape} there, "
                f"{tuple(variable.shape)} here; resume with the settings that wrote it."
            )
    for name, variable in variables.items():
        variable.assign(arrays[name])
    return epoch


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
