"""Names that arguments of `Run`'s methods had before they were Keras's: still taken, and no longer told of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from tfdist.config.ps_options import PS_SHARED, PsOptions
from tfdist.config.settings import settings_of

_Method = TypeVar("_Method", bound=Callable[..., Any])
_RENAMED = {"global_batch_size": "batch_size", "train": "x", "data": "x"}
_PS = [name for name in settings_of(PsOptions) if name not in PS_SHARED]


def takes_former_names(method: _Method) -> _Method:
    """Lets a method be called as before: by old names, and `evaluate`, if so called, with a dict for an answer."""

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if method.__name__ == "evaluate" and "global_batch_size" in options:
            options = {"return_dict": True, "verbose": 0, **options}
        for old, new in _RENAMED.items():
            if old in options and new not in options:
                options[new] = options.pop(old)
        if told := {name: options.pop(name) for name in _PS if name in options}:
            options["ps"] = PsOptions(**told)
        return method(*args, **options)

    return call  # type: ignore[return-value]
