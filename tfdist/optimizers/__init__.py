"""Optimizers and learning-rate schedules by name, and row-sparse optimizers.

Importing this loads neither Keras nor TensorFlow; the classes are handed on lazily.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tfdist.optimizers.by_name import OPTIMIZERS, build_optimizer
from tfdist.optimizers.schedules import LR_SCALINGS, SCHEDULES, build_schedule, rate_factor

if TYPE_CHECKING:
    from tfdist.optimizers.lars import LARS
    from tfdist.optimizers.lazy import LazyAdam, LazyFtrl, LazyRMSprop, LazySGD
    from tfdist.optimizers.sparse import SparseAdagrad, SparseSGD, describe_dense_rows, with_sparse_rows

_HOMES = {
    "LARS": "lars",
    "LazyAdam": "lazy",
    "LazyFtrl": "lazy",
    "LazyRMSprop": "lazy",
    "LazySGD": "lazy",
    "SparseAdagrad": "sparse",
    "SparseSGD": "sparse",
    "describe_dense_rows": "sparse",
    "with_sparse_rows": "sparse",
}

__all__ = [
    "LARS",
    "LR_SCALINGS",
    "OPTIMIZERS",
    "SCHEDULES",
    "LazyAdam",
    "LazyFtrl",
    "LazyRMSprop",
    "LazySGD",
    "SparseAdagrad",
    "SparseSGD",
    "build_optimizer",
    "build_schedule",
    "describe_dense_rows",
    "rate_factor",
    "with_sparse_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tfdist.optimizers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tfdist.optimizers.{_HOMES[name]}"), name)
