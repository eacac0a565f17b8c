"""An embedding whose table lies in shards, and of which a step moves only the rows that it needs."""

from __future__ import annotations

import functools
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.layers.bags import embed, ids_form
from tfdist.layers.partition import Partition, draw_rows, look_up_rows, rows_of_shard

Combiner = Literal["sum", "mean", "sqrtn"]

_regularizers, _constraints = keras.regularizers, keras.constraints
# Of all numbers of a table alike, so that the shards' parts come to the same.
_SHARDED_REGULARIZERS = (_regularizers.L1, _regularizers.L2, _regularizers.L1L2)
_SHARDED_CONSTRAINTS = (_constraints.NonNeg,)


# Wide: the arguments of Keras's layer, and ours.
@keras.saving.register_keras_serializable(package="tfdist")
class Embedding(keras.layers.Layer):
    """Turns ids into rows of a table, as `keras.layers.Embedding`, for tables that fit no single machine.

    The table is stored as shards, one Keras weight each; under `ParameterServerStrategy` they lie on the ps tasks in
    turn. A lookup makes the ids unique and gathers their rows where the shards are; the gradient is these rows' alone.
    Train it with a row-sparse optimizer (`tfdist.optimizers`), or the optimizer will touch the whole table: `run.fit`
    makes Keras's SGD and Adagrad row-sparse by itself where a model has such a layer.

    The initial table does not depend on the shards: see `tfdist.layers.partition.draw_rows`. With up to 262,144 rows it
    is the one that `keras.layers.Embedding` draws from the same seed.

    Args:
        input_dim: Rows: largest id + 1.
        output_dim: Features of a row.
        embeddings_initializer: As in Keras.
        embeddings_regularizer: As in Keras; it reads the whole table at each step. In several shards L1, L2 or L1L2.
        embeddings_constraint: As in Keras; it rewrites the whole table at each step. In several shards NonNeg.
        mask_zero: Whether id 0 is padding. It makes Keras's mask, and counts for nothing in a bag.
        weights: The initial table, `[input_dim, output_dim]`.
        combiner: None gives each id's row. "sum", "mean" and "sqrtn" make one row of each bag, that is, of the ids
            along the last axis: the weighted sum, divided by the sum of weights, or by the root of their squares' sum.
            An empty bag gives zeros.
        num_shards: None makes one for each ps task under `ParameterServerStrategy`, else one. A layer that was built
            keeps its number in its config, so that a saved model loads anywhere with the shards it has.
        partition: "mod" deals the rows out in turn, which spreads frequent ids that stand together; "div" cuts the
            table into runs of rows.
        **kwargs: Of `keras.layers.Layer`.

    Call arguments:
        inputs: Ids: a tensor `[batch, …]`, a `tf.RaggedTensor`, or with a combiner a `tf.SparseTensor` `[batch, bag]`.
        weights: With a combiner, one number for each id, in the ids' form; None counts each as 1.

    Call returns:
        `[batch, …, output_dim]`, ragged where the ids are; with a combiner without the ids' last axis.

    Raises:
        ConfigError: If an argument does not fit, `num_shards` is larger than the table, or ids come in another form.
        tf.errors.InvalidArgumentError: At a step with an id beyond the table; it names the layer and the id.

    Examples:
        >>> import numpy, tfdist
        >>> table = tfdist.layers.Embedding(1000, 8, num_shards=2)
        >>> table(numpy.array([[3, 7, 7]])).shape
        TensorShape([1, 3, 8])
        >>> tfdist.layers.Embedding(1000, 8, combiner="mean")(numpy.array([[3, 7, 7]])).shape
        TensorShape([1, 8])
    """

    built: bool

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        embeddings_constraint: Any = None,
        mask_zero: bool = False,
        weights: Any = None,
        *,
        combiner: Combiner | None = None,
        num_shards: int | None = None,
        partition: Partition = "mod",
        **kwargs: Any,
    ) -> None:
        _check(input_dim, output_dim, combiner, num_shards, partition)
        super().__init__(**kwargs)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        self.embeddings_regularizer = _regularizers.get(embeddings_regularizer)
        self.embeddings_constraint = _constraints.get(embeddings_constraint)
        self.mask_zero = mask_zero
        self.combiner = combiner
        self.num_shards = num_shards
        self.partition: Partition = partition
        self.supports_masking = mask_zero
        self.supports_jit = False  # the number of unique ids is not known beforehand
        self.autocast = False  # ids are numbers to be kept
        if weights is not None:
            self.build()
            self.set_table(weights)

    def build(self, input_shape: Any = None) -> None:
        """Makes the shards.

        Args:
            input_shape: Ignored.
        """
        del input_shape
        if self.built:
            return
        if self.num_shards is None:
            self.num_shards = min(keras_internals.num_ps(tf.distribute.get_strategy()) or 1, self.input_dim)
        self._check_sharded("embeddings_regularizer", _SHARDED_REGULARIZERS)
        self._check_sharded("embeddings_constraint", _SHARDED_CONSTRAINTS)
        shape = (self.input_dim, self.output_dim)
        self.shards = [
            self.add_weight(
                shape=(len(range(self.input_dim)[rows]), self.output_dim),
                initializer=functools.partial(_draw, self.embeddings_initializer, table=shape, rows=rows),
                name="embeddings" if self.num_shards == 1 else f"embeddings_{shard}",
                regularizer=self.embeddings_regularizer,
                constraint=self.embeddings_constraint,
                autocast=False,  # or a lookup in bfloat16 would cast the whole table
            )
            for shard, rows in enumerate(self.rows_of_shards())
        ]
        self.built = True

    def call(self, inputs: Any, weights: Any = None) -> Any:
        """Looks ids up; see the class."""
        self._check_form(inputs, weights)
        look_up = functools.partial(
            look_up_rows,
            [shard.value for shard in self.shards],
            num_rows=self.input_dim,
            partition=self.partition,
            table=self.name,
        )
        rows = embed(inputs, weights, look_up=look_up, combiner=self.combiner, skip_zero=bool(self.mask_zero))
        return rows if rows.dtype == self.compute_dtype else tf.cast(rows, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any, weights_shape: Any = None) -> tuple[int | None, ...]:
        """Returns the shape of the rows."""
        del weights_shape
        kept = input_shape if self.combiner is None else input_shape[:-1]
        return (*kept, self.output_dim)

    def compute_output_spec(self, inputs: Any, weights: Any = None) -> keras.KerasTensor:
        """Returns the form of the output."""
        self._check_form(inputs, weights)
        shape = self.compute_output_shape(inputs.shape)
        ragged = bool(getattr(inputs, "ragged", False)) and (self.combiner is None or len(inputs.shape) > 2)
        return keras.KerasTensor(shape, dtype=self.compute_dtype, ragged=ragged)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Returns where ids are no padding, if `mask_zero` and there are no bags."""
        del mask
        if not self.mask_zero or self.combiner is not None or ids_form(inputs) != "dense":
            return None
        return keras.ops.not_equal(inputs, 0)

    def get_table(self) -> NDArray[Any]:
        """Returns the whole table in the order of ids, `[input_dim, output_dim]`."""
        table = np.empty((self.input_dim, self.output_dim), self.variable_dtype)
        for rows, shard in zip(self.rows_of_shards(), self.shards, strict=True):
            table[rows] = shard.numpy()
        return table

    def set_table(self, table: ArrayLike) -> None:
        """Sets every row.

        Args:
            table: `[input_dim, output_dim]`.

        Raises:
            ConfigError: If it has another shape.
        """
        values = np.asarray(table)
        if values.shape != (self.input_dim, self.output_dim):
            raise ConfigError(
                f"a table of shape {values.shape} for {self.name!r}: it must be {(self.input_dim, self.output_dim)}, "
                "that is (input_dim, output_dim)."
            )
        for rows, shard in zip(self.rows_of_shards(), self.shards, strict=True):
            shard.assign(values[rows])

    def load_own_variables(self, store: Any) -> None:
        """Takes a saved table, also one of another number of shards.

        Args:
            store: Shard → rows, as Keras saved them.
        """
        num_saved = len(store.keys())
        if num_saved == self.num_shards:
            super().load_own_variables(store)
            return
        table = np.empty((self.input_dim, self.output_dim), self.variable_dtype)
        for shard in range(num_saved):
            rows = rows_of_shard(
                shard, num_rows=self.input_dim, num_shards=num_saved, partition=self.partition
            )
            table[rows] = store[f"{shard}"]
        self.set_table(table)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, the number of shards as it has become."""
        return super().get_config() | {
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
            "embeddings_regularizer": _regularizers.serialize(self.embeddings_regularizer),
            "embeddings_constraint": _constraints.serialize(self.embeddings_constraint),
            "mask_zero": self.mask_zero,
            "combiner": self.combiner,
            "num_shards": self.num_shards,
            "partition": self.partition,
        }

    def rows_of_shards(self) -> list[slice]:
        """Returns which rows of the table each of `shards` holds."""
        num_shards = self.num_shards or 1
        return [
            rows_of_shard(s, num_rows=self.input_dim, num_shards=num_shards, partition=self.partition)
            for s in range(num_shards)
        ]

    def _check_form(self, inputs: Any, weights: Any) -> None:
        form = ids_form(inputs)
        if weights is not None and self.combiner is None:
            raise ConfigError(
                f"weights for {self.name!r} without a combiner; choose one of sum, mean, sqrtn."
            )
        if weights is not None and ids_form(weights) != form:
            raise ConfigError(
                f"{form} ids with {ids_form(weights)} weights for {self.name!r}; give both in one form."
            )
        if form == "sparse" and (self.combiner is None or len(inputs.shape) != 2):
            raise ConfigError(
                f"sparse ids of rank {len(inputs.shape)} with combiner={self.combiner!r} for {self.name!r}: a sparse "
                "tensor's rows are bags; give [batch, bag] and a combiner of sum, mean, sqrtn, or pass ragged ids."
            )

    def _check_sharded(self, name: str, known: tuple[type, ...]) -> None:
        value = getattr(self, name)
        if self.num_shards != 1 and value is not None and not isinstance(value, known):
            raise ConfigError(
                f"{name}={value!r} for {self.name!r} in {self.num_shards} shards: a shard's result would not be the "
                f"table's; choose one of {', '.join(k.__name__ for k in known)}, or num_shards=1."
            )


def shards_of(model: keras.Model) -> set[int]:
    """Returns the ids of the variables that are shards of a model's tables."""
    tables = keras_internals.find_layers(model, Embedding)
    return {id(shard) for table in tables if table.built for shard in table.shards}


def _check(input_dim: Any, output_dim: Any, combiner: Any, num_shards: Any, partition: Any) -> None:
    for name, value in (("input_dim", input_dim), ("output_dim", output_dim), ("num_shards", num_shards)):
        if name == "num_shards" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r}: it must be a positive integer.")
    if num_shards is not None and num_shards > input_dim:
        raise ConfigError(
            f"num_shards={num_shards} for a table of input_dim={input_dim} rows: a shard holds at least one; take at "
            f"most {input_dim}, or leave num_shards out."
        )
    if combiner not in (None, "sum", "mean", "sqrtn"):
        raise ConfigError(f"combiner={combiner!r}: choose one of None, 'sum', 'mean', 'sqrtn'.")
    if partition not in ("mod", "div"):
        raise ConfigError(f"partition={partition!r}: choose 'mod' or 'div'.")


def _draw(initializer: Any, shape: Any, dtype: Any, *, table: tuple[int, int], rows: slice) -> Any:
    del shape  # of the shard: the rows say as much
    return draw_rows(initializer, shape=table, rows=rows, dtype=dtype)
