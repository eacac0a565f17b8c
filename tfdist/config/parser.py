"""What the command lines that argparse reads have in common."""

import argparse
from typing import NoReturn

from tfdist.errors import ConfigError


def canonical_flag(word: str) -> str:
    """Returns a word of a command line, in whose flag's name `-` and `_` are the same; others stay as they are."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


class OneLineParser(argparse.ArgumentParser):
    """Raises what is wrong with a command line, for its command to say in one line, instead of leaving with usage."""

    def error(self, message: str) -> NoReturn:
        """Raises it.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message} (see --help)")
