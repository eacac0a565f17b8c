"""Which of a program's cases are asked for: those whose tests run, so that `pytest -k` pays for no other."""

from __future__ import annotations

import os
from collections.abc import Iterable

VARIABLE = "TFDIST_TEST_CASES"


def chosen(names: Iterable[str], prefix: str = "") -> list[str]:
    """Returns those of a program's cases that are asked for: all, unless the environment says which.

    Args:
        names: Of the cases.
        prefix: What stands before them where they are asked for.
    """
    asked = os.environ.get(VARIABLE)
    return [name for name in names if asked is None or prefix + name in asked.split()]
