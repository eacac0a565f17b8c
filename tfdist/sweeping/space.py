"""Which settings a sweep tries: a file of their names and ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfdist.config.config_file import read_yaml, render_flags
from tfdist.errors import ConfigError

_KEYS = {"low", "high", "step", "log", "choices"}
_HOW = "write a list of choices, or {low: 1e-4, high: 0.1, log: true}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """What a setting may be.

    Attributes:
        choices: One of these; empty: a number of the range.
        low: The smallest number.
        high: The largest.
        step: Between two numbers; None: any, of whole numbers 1.
        log: Whether small numbers are tried as often as large ones.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are whole ones."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    def suggest(self, trial: Any, name: str) -> Any:
        """Lets an Optuna trial choose a value."""
        if self.choices:
            return trial.suggest_categorical(name, list(self.choices))
        if self.is_whole:
            return trial.suggest_int(
                name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log
            )
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


def read_space(path: str) -> dict[str, Range]:
    """Reads a space.

    Args:
        path: YAML of name → list of choices, or `low` and `high` with or without `step` and `log`. A name is a flag of
            `tfdist.train`, or `set.NAME` for a recipe's own setting.

    Raises:
        ConfigError: If the file cannot be read, or a range is none.
    """
    values = read_yaml(Path(path).expanduser(), "space")
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"space={path!r} names no setting: {_HOW}.")
    return {_canonical(str(name)): _read_range(path, name, value) for name, value in values.items()}


def render_choice(chosen: Mapping[str, Any]) -> list[str]:
    """Renders what a trial has chosen as flags of `tfdist.train`."""
    own = {name: value for name, value in chosen.items() if not name.startswith("set.")}
    recipes = {name.removeprefix("set."): value for name, value in chosen.items() if name.startswith("set.")}
    return render_flags({**own, **({"set": recipes} if recipes else {})})


def _canonical(name: str) -> str:
    prefix, dot, rest = name.partition(".")
    return f"set.{rest}" if dot and prefix == "set" else name.replace("-", "_")


def _read_range(path: str, name: Any, value: Any) -> Range:
    if isinstance(value, list) and value:
        value = {"choices": value}
    if not isinstance(value, dict) or value.keys() - _KEYS:
        raise ConfigError(f"space={path!r}: {name} is {value!r}; {_HOW}.")
    if "choices" in value:
        # A list, as of widths, is one choice; Optuna keeps texts and numbers.
        choices = tuple(",".join(map(str, c)) if isinstance(c, list) else c for c in value["choices"] or ())
        if not choices or len(value) > 1:
            raise ConfigError(f"space={path!r}: {name} is {value!r}; {_HOW}.")
        return Range(choices=choices)
    numbers = {key: _as_number(value[key]) for key in ("low", "high", "step") if key in value}
    low, high, step = (numbers.get(key) for key in ("low", "high", "step"))
    if low is None or high is None or not low < high:
        raise ConfigError(
            f"space={path!r}: {name} is {value!r}; low and high must be numbers, low the smaller."
        )
    if "step" in value and (step is None or step <= 0 or value.get("log")):
        raise ConfigError(
            f"space={path!r}: {name} is {value!r}; a step must be a number above 0, and without log."
        )
    if value.get("log") and low <= 0:
        raise ConfigError(f"space={path!r}: {name} is {value!r}; with log, low must be more than 0.")
    return Range(low=low, high=high, step=step, log=bool(value.get("log")))


def _as_number(value: Any) -> Any:
    """Returns a number; YAML takes 1e-4 for a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
