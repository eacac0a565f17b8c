"""Other attributes of an object, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

ABSENT = object()


@contextlib.contextmanager
def holding(owner: Any, **values: Any) -> Iterator[None]:
    """Lets an object, a class or a module have other attributes meanwhile."""
    # Of an object past Keras's own __setattr__, which would track the value.
    put, remove = (setattr, delattr) if isinstance(owner, type) else (object.__setattr__, object.__delattr__)
    saved = {name: vars(owner).get(name, ABSENT) for name in values}
    try:
        for name, value in values.items():
            put(owner, name, value)
        yield
    finally:
        for name, value in saved.items():
            if value is ABSENT:
                remove(owner, name)
            else:
                put(owner, name, value)
