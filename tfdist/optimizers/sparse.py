"""Row-sparse optimizers that give exactly the dense result: a row without a gradient does not move anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.optimizers.rows import RowOptimizer

_register = keras.saving.register_keras_serializable(package="tfdist")


class _Sparse(RowOptimizer):
    """Takes the dense way where rows alone would give another result."""

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        if self._needs_dense():
            grads = [_densify(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
        super().apply(grads, trainable_variables)

    def _needs_dense(self: Any) -> bool:
        # Keras adds to its accumulators, and divides by the factor, only what is dense.
        return bool(self.gradient_accumulation_steps or self.loss_scale_factor)


@_register
class SparseSGD(_Sparse, keras.optimizers.SGD):
    """`keras.optimizers.SGD` that reads and writes only the rows of a row-sparse gradient.

    The weights are those of Keras's SGD on the same gradient made dense. With momentum, loss scaling by a factor or
    gradient accumulation the gradient *is* made dense, and `weight_decay` and `use_ema` move the whole table as in
    Keras: right, at a price that grows with the table. `LazySGD` has a momentum that does not.

    `clipnorm` looks at each shard of a sharded table by itself, as at every variable; `global_clipnorm` at all.

    Args: as `keras.optimizers.SGD`.

    Examples:
        >>> import keras, numpy, tfdist
        >>> model = keras.Sequential([tfdist.layers.Embedding(100, 1), keras.layers.Flatten()])
        >>> model.compile(tfdist.optimizers.SparseSGD(0.1), "mse")
        >>> ids = numpy.array([[3], [7]])
        >>> before = model.predict(numpy.arange(100)[:, None], verbose=0)
        >>> loss = model.train_on_batch(ids, numpy.ones((2, 1)))
        >>> after = model.predict(numpy.arange(100)[:, None], verbose=0)
        >>> numpy.flatnonzero(before != after)  # the rows of the step alone
        array([3, 7])
    """

    def _needs_dense(self) -> bool:
        return super()._needs_dense() or self.momentum != 0


@_register
class SparseAdagrad(_Sparse, keras.optimizers.Adagrad):
    """`keras.optimizers.Adagrad` that reads and writes only the rows of a row-sparse gradient, and their accumulators.

    The weights are those of Keras's Adagrad on the same gradient made dense: a row that occurs several times in a batch
    counts once, with the square of its summed gradient. (Keras's own class, given slices, adds up the squares of the
    parts, so that its result depends on how a batch is divided among replicas.) With loss scaling by a factor or
    gradient accumulation the gradient *is* made dense, and `weight_decay` and `use_ema` move the whole table as in
    Keras: right, at a price that grows with the table.

    `clipnorm` looks at each shard of a sharded table by itself, as at every variable; `global_clipnorm` at all.

    Args: as `keras.optimizers.Adagrad`.

    Source: Duchi et al. 2011.

    Examples:
        >>> import tfdist
        >>> tfdist.optimizers.SparseAdagrad(0.1).get_config()["initial_accumulator_value"]
        0.1
    """


# To be asked for: the result is another.
_LAZY: dict[type, str] = {
    keras.optimizers.SGD: "LazySGD",
    keras.optimizers.RMSprop: "LazyRMSprop",
    keras.optimizers.Ftrl: "LazyFtrl",
}
_SPARSE: dict[type, type] = {keras.optimizers.SGD: SparseSGD, keras.optimizers.Adagrad: SparseAdagrad}


def with_sparse_rows(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Makes one of Keras's optimizers row-sparse where that gives the dense result.

    Args:
        optimizer: Built or not.

    Returns:
        The same object, with the same settings and state: of class `SparseSGD` or `SparseAdagrad` from now on, or as it
        was if it is no plain SGD or Adagrad of Keras, or has momentum.

    Examples:
        >>> import keras, tfdist
        >>> type(tfdist.optimizers.with_sparse_rows(keras.optimizers.Adagrad(0.1))).__name__
        'SparseAdagrad'
    """
    sparse = _SPARSE.get(type(optimizer))
    if sparse is not None and not getattr(optimizer, "momentum", 0):
        # Not a copy from its config: that would lose what lies beside it (variables excluded from weight decay).
        optimizer.__class__ = sparse
    return optimizer


def with_summed_rows(
    optimizer: keras.optimizers.Optimizer, apply: Callable[..., Any], tables: Set[int]
) -> Callable[[Sequence[Any], Any], Any]:
    """Returns an optimizer's `apply` that sees each row of a table once, whatever the replicas' parts of a batch.

    One replica's gradient of a `tfdist.layers.Embedding` has each row once; gathered from several it has a row as often
    as replicas have met it, and Keras's classes square such parts one by one. Row-sparse ones sum them by themselves;
    the others go over the whole table anyway.

    Args:
        optimizer: That of the gradients.
        apply: Its own, or one that ends in it.
        tables: Ids of the Keras variables that are tables' shards.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    if not tables or isinstance(inner, RowOptimizer):
        return apply

    def apply_summed(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        variables = trainable_variables or keras_internals.trainable_variables_of(optimizer)
        grads = [
            _densify(g) if isinstance(g, tf.IndexedSlices) and id(v) in tables else g
            for g, v in zip(grads, variables, strict=True)
        ]
        return apply(grads, trainable_variables)

    return apply_summed


def describe_dense_rows(optimizer: keras.optimizers.Optimizer) -> str | None:
    """Says what an optimizer does to a large table, if that is more than a step's rows ask for.

    Args:
        optimizer: As `with_sparse_rows` has returned it.

    Returns:
        What it does to every row, and what to take instead; None of one that is row-sparse.

    Examples:
        >>> import keras, tfdist
        >>> print(tfdist.optimizers.describe_dense_rows(keras.optimizers.Adam()))
        Adam reads and writes every row at every step. tfdist.optimizers.LazyAdam touches only ...
        >>> tfdist.optimizers.describe_dense_rows(tfdist.optimizers.LazyAdam()) is None
        True
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    needs_dense = isinstance(inner, _Sparse) and inner._needs_dense()
    if isinstance(inner, RowOptimizer) and not needs_dense:
        return None
    lazy = next((name for kind, name in _LAZY.items() if isinstance(inner, kind)), "LazyAdam")
    return (
        f"{type(inner).__name__} reads and writes every row at every step. tfdist.optimizers.{lazy} touches only those "
        "of the step; its docstring says what that changes."
    )


def _densify(slices: tf.IndexedSlices) -> tf.Tensor:
    if slices.dense_shape is None:
        raise ConfigError(
            "a tf.IndexedSlices without dense_shape cannot be made dense; pass tf.IndexedSlices(values, indices, "
            "dense_shape), as tf.GradientTape does."
        )
    return tf.math.unsorted_segment_sum(slices.values, slices.indices, slices.dense_shape[0])
