"""The folder of one run: its files' names, who may use it, and writes that a crash cannot tear.

Loads no TensorFlow: the process that starts the others checks the folder before it starts them.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tfdist.config.run_config import RunConfig
from tfdist.errors import ConfigError

# A checkpoint fits the model and the optimizer that these make; everything else may change when a run goes on.
_FIXED_BY_A_CHECKPOINT = ("recipe", "overrides", "optimizer")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Making the value touches no file.

    Args:
        path: The folder; it need not exist.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved `RunConfig`; it marks the folder as a run's."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per epoch and line, by `append_record`."""
        return self.path / "metrics.jsonl"

    @property
    def logs_dir(self) -> Path:
        """What every task printed, one file a task."""
        return self.path / "logs"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard's events, for `tensorboard --logdir`."""
        return self.path / "tensorboard"

    @property
    def checkpoints_dir(self) -> Path:
        """What a resumed run goes on from."""
        return self.path / "checkpoints"

    @property
    def model_file(self) -> Path:
        """The final model, for `keras.models.load_model`."""
        return self.path / "model.keras"

    @property
    def evaluations_file(self) -> Path:
        """One JSON object per checkpoint that an evaluator beside the training has seen."""
        return self.path / "eval.jsonl"

    @property
    def best_model_file(self) -> Path:
        """The model that `--keep_best` keeps."""
        return self.path / "best.keras"

    @property
    def best_file(self) -> Path:
        """Which one that is: `{"metric": name, "value": number, "epoch": zero-based}`."""
        return self.path / "best.json"

    @property
    def results_file(self) -> Path:
        """How the run ended: `{"test": {name: number}, …}`, or `{"error": text}`; one that was killed has none."""
        return self.path / "results.json"

    @property
    def environment_file(self) -> Path:
        """Where the run took place: versions, hosts, devices."""
        return self.path / "environment.json"

    @property
    def samples_file(self) -> Path:
        """Some test images with what was predicted of them, of models that classify images."""
        return self.path / "samples.npz"

    @property
    def export_dir(self) -> Path:
        """The SavedModel that `--export` leaves."""
        return self.path / "export"

    def check(self, config: RunConfig) -> None:
        """Makes the folder if need be, and makes sure that this run may use it.

        Args:
            config: What is about to run. Training wants a folder without a run in it, or, with
                `resume`, one whose run had the same model; every other mode wants a finished run.

        Raises:
            ConfigError: If the folder cannot be written, or is not one that this run may use.
        """
        if config.mode == "train" and not config.resume:
            self._check_writable()
            self._check_unused()
            return
        earlier = self.read_config()
        self._check_writable()
        for name in _FIXED_BY_A_CHECKPOINT if config.mode == "train" else ():
            old, new = getattr(earlier, name), getattr(config, name)
            if old != new:
                raise ConfigError(
                    f"run_dir={str(self.path)!r} holds a run with {name}={old!r}, this one has {new!r}: its checkpoint "
                    f"does not fit; resume with {name}={old!r}, or start anew in another run_dir."
                )

    def create(self, config: RunConfig) -> None:
        """Makes the folder this run's own; for the chief alone, once, before anything is written into it.

        A run that is gone on with keeps its config until its checkpoint has been found to fit; see `write_config`.

        Raises:
            ConfigError: As for `check`.
        """
        self.check(config)
        if config.mode == "train" and not config.resume:
            self.write_config(config)

    def write_config(self, config: RunConfig, environment: Mapping[str, Any] | None = None) -> None:
        """Replaces `config_file`; what an earlier end of the run has left is no longer true.

        Args:
            config: What it shall hold.
            environment: What `environment_file` shall hold; None leaves it as it is.
        """
        write_atomically(self.config_file, config.to_json())
        if environment is not None:
            write_atomically(self.environment_file, json.dumps(environment, indent=2) + "\n")
        self.results_file.unlink(missing_ok=True)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes `results_file`.

        Args:
            results: Numbers by name, NumPy's and TensorFlow's too.
        """
        write_atomically(self.results_file, json.dumps(_to_json_value(results), indent=2) + "\n")

    def read_config(self) -> RunConfig:
        """Reads what `create` wrote.

        Raises:
            ConfigError: If there is no run here, or its config cannot be read.
        """
        try:
            return RunConfig.from_json(self.config_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"run_dir={str(self.path)!r} holds no run (no config.json in it); check the path, or leave out "
                "--resume and --mode to start a run there."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The config of run_dir={str(self.path)!r} cannot be read: {error}.") from None

    def drop_metrics_from(self, epoch: int) -> list[dict[str, Any]]:
        """Forgets the lines from a zero-based epoch on, which is about to be trained again; returns the others."""
        kept = [record for record in read_records(self.metrics_file) if record.get("epoch", -1) < epoch]
        if self.metrics_file.exists():
            write_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def _check_writable(self) -> None:
        probe = self.path / f".writable-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # os.access asks about permissions only; a full or read-only disk shows when something is written.
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                f"run_dir={str(self.path)!r} cannot be written ({reason}); choose a folder that you own."
            ) from None

    def _check_unused(self) -> None:
        remedy = "choose another run_dir"
        if self.config_file.exists():
            earlier = self.read_config()
            raise ConfigError(
                f"run_dir={str(self.path)!r} already holds a run of {earlier.recipe!r} under {earlier.strategy!r}; add "
                f"--resume to go on with it, or {remedy}."
            )
        # The launcher has opened its logs by the time the chief looks.
        strangers = sorted(item.name for item in self.path.iterdir() if item != self.logs_dir)
        if strangers:
            listed = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
            raise ConfigError(
                f"run_dir={str(self.path)!r} is not empty ({listed}) and holds no run; {remedy}."
            )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file, or, if anything stops it, nothing.

    Args:
        path: The file; one that exists is replaced.
        content: Text is written as UTF-8.

    Raises:
        OSError: If the disk or the folder refuses; `path` is then as it was.
    """
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that is there once the context ends, or, if anything stops it, is not.

    Raises:
        OSError: If the disk or the folder refuses; `path` is then as it was.
    """
    # In the same folder, since a rename is atomic only inside one file system.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_named(path: Path, content: str, *, flag: str) -> None:
    """Writes a whole file that a flag names.

    Raises:
        ConfigError: If the disk or the folder refuses.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(
            f"{flag}={str(path)!r} cannot be written ({error.strerror}); choose another."
        ) from None


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to a file.

    Args:
        path: The file; it need not exist.
        record: Numbers by name; NumPy's and TensorFlow's scalars too. NaN and the infinities are
            written as the strings "NaN", "Infinity" and "-Infinity", which `float` reads back.
    """
    line = json.dumps({name: _to_json_value(value) for name, value in record.items()}, allow_nan=False)
    # One write of a whole line: a reader that follows the file never sees half of one.
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode() + b"\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns a file's records, one a line, without a last one that a crash cut short; none if there is no file."""
    return list(_whole_records(path.read_text(encoding="utf-8"))) if path.exists() else []


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds; an empty one where it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _whole_records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _to_json_value(value: Any) -> Any:
    if hasattr(value, "numpy"):
        value = value.numpy()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _to_json_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_to_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
