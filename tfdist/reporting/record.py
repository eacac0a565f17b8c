"""What a run has left in its folder, read as far as it goes: a run that died has left less."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfdist.config.run_config import RunConfig
from tfdist.config.run_dir import RunDir, read_object, read_records
from tfdist.config.settings import settings_of
from tfdist.diagnostics.log_reader import read_run
from tfdist.errors import ConfigError
from tfdist.launcher.events import Event, read_events

# What each run has of its own.
_ALWAYS_SAID = ("recipe", "strategy", "global_batch_size", "epochs")
_NOT_SAID = ("run_dir", "mode", "resume")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A run, as its folder tells it.

    Attributes:
        path: The folder.
        config: Its settings by name.
        metrics: A dict an epoch, as in `metrics.jsonl`.
        events: What the launcher has noted; empty where there was none.
        environment: Where it ran: versions, hosts, devices.
        results: How it ended: `test` figures, or an `error`; empty where nobody could say.
        death: Who died first and of what, in a sentence or two; "" if nobody did, as far as is known.
    """

    path: Path
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    events: list[Event]
    environment: Mapping[str, Any]
    results: Mapping[str, Any]
    death: str

    @property
    def name(self) -> str:
        """The folder's."""
        return self.path.resolve().name

    @property
    def title(self) -> str:
        """Recipe and strategy."""
        recipe = str(self.config["recipe"])
        return f"{Path(recipe).stem if recipe.endswith('.py') else recipe} under {self.config['strategy']}"

    @property
    def state(self) -> str:
        """`finished`, `failed`, `stopped` or `unfinished`."""
        if "test" in self.results:
            return "finished"
        code = self.events[-1].exit_code if self.events and self.events[-1].kind == "end" else None
        if code == 128 + 15:
            return "stopped"
        return "failed" if self.death or code else "unfinished"

    @property
    def said_settings(self) -> dict[str, Any]:
        """The settings that are not the defaults, and those that each run has of its own."""
        defaults = {name: field.default for name, (field, _) in settings_of(RunConfig).items()}
        defaults |= dict(self.environment.get("recipe_defaults", {}))
        return {
            name: value
            for name, value in self.config.items()
            if name in _ALWAYS_SAID or (name not in _NOT_SAID and value != defaults.get(name))
        }

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the epochs, from 1, that have a number of that name, and the numbers."""
        points = [(int(r["epoch"]) + 1, as_number(r[name])) for r in self.metrics if name in r]
        return [epoch for epoch, value in points if value is not None], [
            value for _, value in points if value is not None
        ]


def read_record(folder: str) -> Record:
    """Reads a run's folder.

    Raises:
        ConfigError: If no run is there.
    """
    run_dir = RunDir(Path(folder))
    config = run_dir.read_config()
    death = ""
    with contextlib.suppress(ConfigError):  # without logs
        findings = [finding for finding in read_run(folder) if finding.severity == "error"]
        death = " ".join(f"{finding.text}. To mend it: {finding.remedy}." for finding in findings)
    results = read_object(run_dir.results_file)
    return Record(
        path=run_dir.path,
        config=config.to_dict(),
        metrics=_with_evaluations(run_dir),
        events=read_events(folder),
        environment=read_object(run_dir.environment_file),
        results=results,
        death="" if "test" in results else death or str(results.get("error", "")),
    )


def as_number(value: Any) -> float | None:
    """Returns what a line of `metrics.jsonl` holds as a number that can be drawn; None if it cannot be."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _with_evaluations(run_dir: RunDir) -> list[dict[str, Any]]:
    """Returns the lines of the epochs, with what an evaluator beside the training has found of each."""
    found: dict[Any, dict[str, Any]] = {}
    for line in read_records(run_dir.evaluations_file):
        found.setdefault(line.get("epoch"), {}).update(
            {name: value for name, value in line.items() if name.startswith("val_")}
        )
    return [line | found.get(line.get("epoch"), {}) for line in read_records(run_dir.metrics_file)]
