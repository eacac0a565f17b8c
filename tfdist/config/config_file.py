"""Settings in a file, in place of a long command line: YAML, or the `config.json` of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfdist.cluster.spec import find_nearest
from tfdist.errors import ConfigError

FLAG = "config"
# A run's own folder is not another's, and whether it was gone on with is its own story.
_OF_ONE_RUN = ("run_dir", "resume")


def take_config(
    words: Sequence[str], known: Collection[str], *, canonical: Callable[[str], str] = str
) -> tuple[dict[str, Any], list[str]]:
    """Takes `--config=FILE` out of a command line's flags, and reads it.

    Args:
        words: The flags.
        known: Names that the file may hold.
        canonical: Returns the name that an alias stands for.

    Returns:
        The file's settings by name, none without a file, and the other words.

    Raises:
        ConfigError: If the file cannot be read, or holds an unknown name.
    """
    path, rest = _split(words)
    if path is None:
        return {}, rest
    values = {canonical(name): value for name, value in read_config_file(path).items()}
    for name in values:
        if name not in known:
            nearest = find_nearest(name, known)
            hint = f"did you mean {nearest!r}?" if nearest else "--help lists them all."
            raise ConfigError(f"{path}: there is no setting {name!r}; {hint}")
    return values, rest


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Reads a file of settings.

    Args:
        path: YAML whose keys are names of flags, `-` and `_` being the same; `set` holds a recipe's own settings, as a
            mapping or a list of name=value. Or a run's `config.json`, of whose run alone some settings are.

    Returns:
        Name → value, without what is null.

    Raises:
        ConfigError: If it cannot be read.
    """
    path = Path(path).expanduser()
    values = read_yaml(path, FLAG)
    if not isinstance(values, dict):
        raise ConfigError(f"config={str(path)!r} holds no settings; write `name: value` lines.")
    named = {str(name).replace("-", "_"): value for name, value in values.items() if value is not None}
    if path.name == "config.json":
        named = {name: value for name, value in named.items() if name not in _OF_ONE_RUN}
    if "overrides" in named:  # a run's name for them
        named["set"] = named.pop("overrides")
    return named


def read_yaml(path: Path, flag: str) -> Any:
    """Reads a YAML file, which a flag has named.

    Raises:
        ConfigError: If it cannot be read, or is none.
    """
    # Here: most commands read no such file.
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"{flag}={str(path)!r} cannot be read ({reason}); correct the path.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(
            f"{flag}={str(path)!r} is no YAML: {what}{where}; write `name: value` lines."
        ) from None


def render_flags(values: Mapping[str, Any]) -> list[str]:
    """Renders settings as flags."""
    words = []
    for name, value in values.items():
        if name == "set":
            pairs = value.items() if isinstance(value, dict) else [str(v).split("=", 1) for v in value or ()]
            words += [f"--set={'='.join([str(part[0]), *map(_render, part[1:])])}" for part in pairs]
        else:
            words.append(f"--{name}={_render(value)}")
    return words


def render_config_file(values: Mapping[str, Any]) -> str:
    """Renders settings as YAML that `read_config_file` reads."""
    # Here: most commands write no such file.
    import yaml

    plain = json.loads(json.dumps(dict(values)))  # tuples are lists there
    return yaml.safe_dump(plain, sort_keys=True, allow_unicode=True)


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the file, if one is named, and the other words."""
    path, rest, left = None, [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name not in (f"--{FLAG}", f"-{FLAG}"):
            rest.append(word)
            continue
        if not equals and not left:
            raise ConfigError(f"--{FLAG} needs a file: write --{FLAG}=FILE.")
        path = value if equals else left.pop(0)
    return path, rest


def _render(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return ",".join(map(_render, value))
    return str(value)
