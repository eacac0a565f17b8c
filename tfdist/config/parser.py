"""What the command lines that argparse reads have in common."""

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from tfdist.config.settings import settings_of, types_of
from tfdist.errors import ConfigError


def canonical_flag(word: str) -> str:
    """Returns a word of a command line, in whose flag's name `-` and `_` are the same; others stay as they are."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def add_settings(parser: Any, options: type[Any], short: Mapping[str, str] | None = None) -> None:
    """Adds a flag for each setting of a dataclass to a parser or a group of one; what is not given is None."""
    kinds = types_of(options)
    for name, (_, rule) in settings_of(options).items():
        (kind,) = kinds[name]
        words = [short[name]] if short and name in short else []
        parser.add_argument(f"--{name}", *words, type=kind, help=rule.help)


class OneLineParser(argparse.ArgumentParser):
    """Raises what is wrong with a command line, for its command to say in one line, instead of leaving with usage."""

    def error(self, message: str) -> NoReturn:
        """Raises it.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message} (see --help)")
