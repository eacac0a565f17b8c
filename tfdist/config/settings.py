"""Settings: each is one field of a frozen dataclass, with its default, its rule and its words; flags are made of it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection
from typing import Any

from tfdist.cluster.spec import find_nearest
from tfdist.errors import ConfigError

_KEY = "setting"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field says of itself.

    Attributes:
        help: One sentence, for `--help` and the docs.
        choices: The values that it may have, besides None where its type allows that; empty: any.
        least: The smallest number that it may be.
        above: The number that it must be more than.
    """

    help: str
    choices: tuple[Any, ...] = ()
    least: float | None = None
    above: float | None = None


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[Any, ...] = (),
    least: float | None = None,
    above: float | None = None,
) -> Any:
    """Returns a dataclass's field that is a `Setting`; one without a default must be said."""
    told = Setting(help=help, choices=choices, least=least, above=above)
    return dataclasses.field(default=default, metadata={_KEY: told})


def settings_of(kind: Any) -> dict[str, tuple[dataclasses.Field[Any], Setting]]:
    """Returns a dataclass's own settings and then those that it inherits, by name."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    own = [name for name in vars(kind).get("__annotations__", {}) if name in fields]
    names = [*own, *(name for name in fields if name not in own)]
    return {
        name: (fields[name], fields[name].metadata[_KEY]) for name in names if _KEY in fields[name].metadata
    }


def types_of(kind: Any) -> dict[str, set[type]]:
    """Returns the types that a dataclass's settings may have besides None, by name."""
    hints = typing.get_type_hints(kind)
    return {
        name: set(typing.get_args(hints[name])) - {type(None)} or {hints[name]} for name in settings_of(kind)
    }


def check_settings(values: Any) -> None:
    """Holds every field to its type and its rule.

    Raises:
        ConfigError: If one breaks its rule.
    """
    kinds = typing.get_type_hints(type(values))
    told = settings_of(type(values))
    for name in told:
        value = getattr(values, name)
        if not _has_type(value, kinds[name]):
            raise ConfigError(f"{name}={value!r}: it must be {_describe_type(kinds[name])}.")
    for name, (_, rule) in told.items():
        value = getattr(values, name)
        if (
            rule.choices
            and value not in rule.choices
            and not (value is None and _has_type(None, kinds[name]))
        ):
            known = [str(choice) for choice in rule.choices]
            nearest = find_nearest(str(value), known)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise ConfigError(f"{name}={value!r}: choose one of {', '.join(known)}.{hint}")
    for name, (_, rule) in told.items():
        value = getattr(values, name)
        if value is None:
            continue
        # `not >=` instead of `<`: NaN breaks the rule too.
        if rule.least is not None and not (value >= rule.least and math.isfinite(value)):
            raise ConfigError(f"{name}={value}: it must be {rule.least} or more.")
        if rule.above is not None and not (value > rule.above and math.isfinite(value)):
            raise ConfigError(f"{name}={value}: it must be more than {rule.above}.")


def changed_settings(values: Any, *, besides: Collection[str] = ()) -> list[str]:
    """Returns the names of a dataclass's settings that are not what they are by default, `besides` left out."""
    fields = [field for field in dataclasses.fields(values) if field.name not in besides]
    return [field.name for field in fields if getattr(values, field.name) != field.default]


def check_owner(values: Any, strategy: str, *, owner: str, shared: Collection[str] = ()) -> None:
    """Checks that what only `owner` has, all but `shared`, is asked of no other strategy.

    Raises:
        ConfigError: If it is.
    """
    changed = changed_settings(values, besides=shared)
    if strategy != owner and changed:
        raise ConfigError(
            f"{changed[0]}={getattr(values, changed[0])!r} with strategy={strategy!r}: only {owner!r} has it; leave it "
            f"out, or choose strategy={owner!r}."
        )


def _has_type(value: Any, annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_has_type(value, member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    # bool is an int to Python; `epochs=True` is a mistake to everyone else.
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))


def _describe_type(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(annotation, types.UnionType):
        return " or ".join(_describe_type(member) for member in typing.get_args(annotation))
    return words.get(annotation, "a tuple of texts")
