"""What the command lines that argparse reads have in common."""

import argparse
from typing import NoReturn

from tfdist.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Raises what is wrong with a command line, for its command to say in one line, instead of leaving with usage."""

    def error(self, message: str) -> NoReturn:
        """Raises it.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message} (see --help)")
