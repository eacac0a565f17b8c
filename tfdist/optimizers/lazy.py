"""Row-sparse optimizers whose slots stand still where a step has no gradient: fast, and another result than Keras's.

What all of them have in common: on dense gradients they are Keras's classes, bit for bit. Given `tf.IndexedSlices`, a
row that occurs several times in a batch counts once, with its summed gradient, and no other row of the weight or of its
slots is read or written. What would touch the others (`weight_decay` that is not excluded for the table, `use_ema`,
`gradient_accumulation_steps`, `loss_scale_factor`) is refused by name. `clipnorm` looks at each shard of a sharded
table by itself, as at every variable; `global_clipnorm` at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.optimizers.rows import RowOptimizer

_register = keras.saving.register_keras_serializable(package="tfdist")
_REMEDIES = {
    "use_ema": "its averages move for every row at every step; leave it out",
    "gradient_accumulation_steps": "its sums are as large as the table; make the batch larger instead",
    "loss_scale_factor": "Keras scales dense gradients only; wrap it in keras.optimizers.LossScaleOptimizer",
}


class _Lazy(RowOptimizer):
    """Refuses what would touch the rest of the table."""

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        if any(isinstance(g, tf.IndexedSlices) for g in grads):
            for name, remedy in _REMEDIES.items():
                if value := getattr(self, name):
                    raise ConfigError(
                        f"{name}={value!r} with row-sparse gradients: {type(self).__name__} touches only the rows of a "
                        f"step. {remedy[0].upper()}{remedy[1:]}."
                    )
        super().apply(grads, trainable_variables)

    def update_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if isinstance(gradient, tf.IndexedSlices) and keras_internals.decays(self, variable):
            raise ConfigError(
                f"weight_decay={self.weight_decay!r} with row-sparse gradients of {variable.name!r}: it would shrink "
                f"every row at every step, and {type(self).__name__} touches only the rows of a step; leave it out, or "
                "exclude the table with optimizer.exclude_from_weight_decay(var_names=['embeddings'])."
            )
        super().update_step(gradient, variable, learning_rate)


@_register
class LazySGD(_Lazy, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with a momentum that rests, row by row, while the row has no gradient.

    In Keras a row goes on moving after its last gradient, and its momentum fades at every step. Here both wait for the
    row's next gradient; a rare row's momentum is therefore older and longer than Keras's.

    Args: as `keras.optimizers.SGD`.

    Examples:
        >>> import tfdist
        >>> tfdist.optimizers.LazySGD(0.1, momentum=0.9).get_config()["momentum"]
        0.9
    """


@_register
class LazyRMSprop(_Lazy, keras.optimizers.RMSprop):
    """`keras.optimizers.RMSprop` whose averages of a row count only the steps at which the row has a gradient.

    In Keras the mean square of a row fades at every step without a gradient, so that a rare row takes long steps when
    it comes back. Here it takes steps as long as a frequent row's; the momentum, if any, rests meanwhile.

    Args: as `keras.optimizers.RMSprop`.

    Examples:
        >>> import tfdist
        >>> tfdist.optimizers.LazyRMSprop(0.1).get_config()["rho"]
        0.9
    """


@_register
class LazyAdam(_Lazy, keras.optimizers.Adam):
    """`keras.optimizers.Adam` whose moments of a row count only the steps at which the row has a gradient.

    In Keras both moments of a row fade at every step, and the row goes on moving, long after its last gradient. Here
    they wait for its next one. The bias correction still counts all steps, as in TensorFlow's LazyAdam, so that the
    first steps of a row that is first seen late are shorter.

    Args: as `keras.optimizers.Adam`.

    Source: Kingma and Ba 2014; "lazy" as in TensorFlow Addons' LazyAdam.

    Examples:
        >>> import keras, numpy, tfdist
        >>> model = keras.Sequential([tfdist.layers.Embedding(100, 1), keras.layers.Flatten()])
        >>> model.compile(tfdist.optimizers.LazyAdam(0.1), "mse")
        >>> ids = numpy.array([[3], [7]])
        >>> before = model.predict(numpy.arange(100)[:, None], verbose=0)
        >>> loss = model.train_on_batch(ids, numpy.ones((2, 1)))
        >>> after = model.predict(numpy.arange(100)[:, None], verbose=0)
        >>> numpy.flatnonzero(before != after)  # the rows of the step alone
        array([3, 7])
    """


@_register
class LazyFtrl(_Lazy, keras.optimizers.Ftrl):
    """`keras.optimizers.Ftrl` that recomputes a row only at steps at which the row has a gradient.

    Keras recomputes every row from its slots at every step. That gives the same weights as here if the table starts at
    zero, the learning rate never changes and `l2_shrinkage_regularization_strength` is 0. Otherwise it differs: Keras
    sets rows that have had no gradient yet to zero at the first step, and here they keep their initial values.

    Args: as `keras.optimizers.Ftrl`.

    Source: McMahan et al. 2013.

    Examples:
        >>> import tfdist
        >>> tfdist.optimizers.LazyFtrl(0.1).get_config()["learning_rate_power"]
        -0.5
    """
