"""The gradients of single examples, each cut to a norm, and their sum."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError

# Of gradients of single examples, in bytes.
_MEMORY = 256 * 2**20


class ClippedGradients:
    """Computes an example's gradient as Keras's own step would of a batch of this one alone.

    Args:
        model: Built.
        clip_norm: Largest norm, over all weights together.
        micro_batch_size: Examples at a time; None: as many as `_MEMORY` holds.

    Raises:
        ConfigError: If the model's examples have no gradients of their own.
    """

    def __init__(self, model: keras.Model, *, clip_norm: float, micro_batch_size: int | None) -> None:
        self._model = model
        self._clip_norm = clip_norm
        self._variables = list(model.trainable_variables)
        self._seeds = keras_internals.seed_states(model)
        num_bytes = sum(
            v.shape.num_elements() * v.dtype.size for v in map(keras_internals.native, self._variables)
        )
        # Data whose shape nobody knows beforehand, such as the ids of a table, have no place among others.
        self._vectorizes = keras_internals.supports_xla(model)
        self._block = micro_batch_size or max(1, _MEMORY // max(1, num_bytes))
        _check(model)

    def sum(
        self, part: Any, num_examples: Any, local: Sequence[tuple[keras.Variable, tf.Variable]]
    ) -> list[Any]:
        """Returns the sum over the examples of their gradients, each cut to the norm; None where there is none.

        An example whose gradient is not finite adds nothing.

        Args:
            part: Nest as `train_step` takes it, `[n, …]`, of one example at least.
            num_examples: How many of them count, from the first on.
            local: Keras variables and the TensorFlow variables in their place, where the step has such.
        """
        own = {id(variable): value for variable, value in local}
        weights = [tf.convert_to_tensor(own.get(id(v), keras_internals.native(v))) for v in self._variables]
        total = num_rows(part)
        # Each example draws its own masks and noise, as the examples of a batch do.
        seeds = [
            tf.random.stateless_uniform(
                [total, 2],
                tf.cast(tf.convert_to_tensor(own.get(id(s), keras_internals.native(s))), tf.int64),
                minval=None,
                maxval=None,
                dtype=tf.int64,
            )
            for s in self._seeds
        ]
        if isinstance(total, int) and total <= self._block:
            return self._sum_block((part, seeds), tf.range(total) < num_examples, weights)
        return self._sum_blocks((part, seeds), total, num_examples, weights)

    def _sum_blocks(self, examples: Any, total: Any, num_examples: Any, weights: Sequence[Any]) -> list[Any]:
        block = tf.minimum(self._block, total)
        present: list[int] = []

        def add(start: Any, sums: list[Any]) -> tuple[Any, list[Any]]:
            places = start + tf.range(block)
            # Beyond the last one that one again: it has numbers that a model can take.
            rows = tf.minimum(places, total - 1)
            own = tf.nest.map_structure(lambda t: tf.gather(t, rows), examples)
            found = self._sum_block(own, places < num_examples, weights)
            present[:] = [i for i, value in enumerate(found) if value is not None]
            added = [s if f is None else s + f for s, f in zip(sums, found, strict=True)]
            return start + block, added

        _, sums = tf.while_loop(
            lambda start, _: start < num_examples,
            add,
            (tf.constant(0), [tf.zeros_like(w) for w in weights]),
            parallel_iterations=1,  # more would be in memory together
        )
        return [value if i in present else None for i, value in enumerate(sums)]

    def _sum_block(self, examples: Any, counts: Any, weights: Sequence[Any]) -> list[Any]:
        found = self._stack(examples, weights)
        present = [g for g in found if g is not None]
        squares = [tf.reduce_sum(tf.square(tf.cast(g, tf.float32)), range(1, len(g.shape))) for g in present]
        norms = tf.sqrt(tf.add_n(squares))
        is_finite = tf.math.is_finite(norms)
        factors = tf.minimum(1.0, tf.math.divide_no_nan(self._clip_norm, norms))
        if math.isinf(self._clip_norm):
            factors = tf.ones_like(norms)
        factors = tf.where(counts & is_finite, factors, 0.0)

        def add_up(grads: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
            rows = tf.reshape(grads, [tf.shape(norms)[0], -1])
            rows = tf.where(is_finite[:, None], rows, 0)  # 0 times infinity is no number
            return tf.reshape(tf.linalg.matvec(rows, tf.cast(factors, rows.dtype), True), shape)

        return [None if g is None else add_up(g, w.shape) for g, w in zip(found, weights, strict=True)]

    def _stack(self, examples: Any, weights: Sequence[Any]) -> list[Any]:
        """Returns the gradients of each example, `[n, …]`: all at once, or one by one where TensorFlow has no way."""
        present: list[int] = []

        def compute(example: Any) -> list[Any]:
            part, seeds = example
            grads = self._of_one(part, seeds, weights)
            present[:] = [i for i, g in enumerate(grads) if g is not None]
            return grads

        if self._vectorizes:
            try:
                with _without_remarks():
                    stacked = tf.vectorized_map(
                        lambda example: [g for g in compute(example) if g is not None], examples, warn=False
                    )
                found = dict(zip(present, stacked, strict=True))
                return [found.get(i) for i in range(len(weights))]
            except ConfigError:
                raise
            except (TypeError, ValueError, NotImplementedError):  # of a recurrent layer's loop, say
                self._vectorizes = False
        zeros = [tf.zeros_like(weight) for weight in weights]
        stacked = tf.map_fn(
            lambda example: [z if g is None else g for z, g in zip(zeros, compute(example), strict=True)],
            examples,
            fn_output_signature=[tf.TensorSpec(w.shape, w.dtype) for w in weights],
        )
        return [value if i in present else None for i, value in enumerate(stacked)]

    def _of_one(self, part: Any, seeds: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
        model = self._model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            tf.nest.map_structure(lambda t: t[None], part)
        )
        with (
            keras_internals.ReplicaBinding(loss_correction=_check_reduction),
            tf.GradientTape(watch_accessed_variables=False) as tape,
        ):
            tape.watch(weights)
            # In the scope nothing is assigned: metrics and random streams move in the step itself.
            state = [*zip(self._variables, weights, strict=True), *zip(self._seeds, seeds, strict=True)]
            with keras.StatelessScope(state, collect_losses=True) as scope:
                y_pred = model(x, training=True)
                # Of the class: the step may listen to the model's own.
                loss = type(model).compute_loss(
                    model, x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
        _check_updates(model, self._seeds, scope)
        return [None if g is None else tf.convert_to_tensor(g) for g in tape.gradient(loss, weights)]


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps TensorFlow from saying, in pages, what it does in a loop, and what it cannot do at all."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def num_rows(part: Any) -> Any:
    """Returns how many examples there are, a number where it is known."""
    first = tf.nest.flatten(part)[0]
    return tf.shape(first)[0] if first.shape[0] is None else first.shape[0]


def _check(model: keras.Model) -> None:
    optimizers = keras_internals.find_optimizers(model)
    if keras_internals.has_own_step(model) or len(optimizers) != 1:
        raise ConfigError(
            f"private training of {type(model).__name__}, which has a train_step of its own or several optimizers: "
            "only of Keras's own step is it known what an example's gradient is."
        )
    if isinstance(optimizers[0], keras.optimizers.LossScaleOptimizer):
        raise ConfigError(
            "private training with mixed precision float16, whose scaled gradients have no norm to cut to; choose "
            "bfloat16."
        )
    if optimizers[0].gradient_accumulation_steps:
        raise ConfigError(
            "private training with gradient_accumulation_steps: noise is added at each step; take a larger batch, "
            "of which dp_micro_batch_size examples are in memory at a time."
        )


def _check_reduction(values: Any, sample_weight: Any, mask: Any, reduction: str | None) -> None:
    del values, sample_weight, mask
    if reduction in ("sum", "mean_with_sample_weight"):
        raise ConfigError(
            f"a loss with reduction={reduction!r} in private training: an example has only its own loss, by which all "
            "others' are divided or not; choose 'sum_over_batch_size'."
        )


def _check_updates(model: keras.Model, seeds: Sequence[keras.Variable], scope: keras.StatelessScope) -> None:
    """Makes sure that no layer has kept anything of an example, which no noise would hide."""
    known = {id(seed) for seed in seeds}
    for variable in model.non_trainable_variables:
        if id(variable) not in known and scope.get_current_value(variable) is not None:
            raise ConfigError(
                f"private training of a model whose {variable.path!r} keeps statistics over the examples, which no "
                "noise hides: choose a layer without (LayerNormalization or GroupNormalization in place of "
                "BatchNormalization), or set trainable=False there."
            )
