"""Logits of a vocabulary of which each process has those of its own words."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfdist.data.order import part_slice
from tfdist.training.tensor_parallel.group import ProcessGroup

# exp of less is no number in float32.
_TINY = 1e-37


class View(NamedTuple):
    """What a loss and an accuracy see in place of a label and all logits: the label's word, and one for all others.

    Attributes:
        labels: int32, 0 where there is a label; what is ignored, or no word at all, is so in the view, too.
        loss_logits: `[..., 2]`, of which the cross-entropy is that of all logits.
        metric_logits: `[..., 2]`, whose greatest is the label's if it is of all.
    """

    labels: Any
    loss_logits: Any
    metric_logits: Any


class DividedVocabulary:
    """One process's part of the logits.

    Args:
        size: Words of the vocabulary.
        group: The processes that have the others.
        block: Which this is.
        ignored: The label that the loss passes over, if any.
    """

    def __init__(self, size: int, group: ProcessGroup, block: int, ignored: int | None = None) -> None:
        self._size = size
        self._group = group
        self._start, self._stop = part_slice(size, block, group.size)
        self._ignored = ignored

    def view(self, labels: Any, logits: Any) -> View:
        """Returns what the loss and the accuracy are computed of (vocabulary-parallel cross-entropy, Shoeybi et al.).

        `labels` are `[...]` or `[..., 1]`, `logits` `[..., own words]`, of which gradients are wanted.
        """
        logits = tf.cast(logits, tf.float32)
        labels = tf.cast(labels, tf.int32)
        if labels.shape.rank == logits.shape.rank and labels.shape[-1] == 1:
            labels = tf.squeeze(labels, -1)
        most, winner = self._find_winner(logits)
        logits -= most[..., None]
        place = tf.clip_by_value(labels - self._start, 0, self._stop - self._start - 1)
        is_own = tf.cast((labels >= self._start) & (labels < self._stop), tf.float32)
        wanted = is_own * tf.gather(logits, place, batch_dims=labels.shape.rank, axis=-1)
        others = tf.reduce_sum(tf.exp(logits), -1) - is_own * tf.exp(wanted)
        wanted, others = tf.unstack(self._group.sum(tf.stack([wanted, others], -1)), axis=-1)
        is_word = (labels >= 0) & (labels < self._size)
        seen = tf.where(is_word, 0, 2)  # which is none of the two, as the label was none of the words
        if self._ignored is not None:
            seen = tf.where(labels == self._ignored, self._ignored, seen)
        wins = tf.cast(winner == labels, tf.float32)
        return View(
            labels=seen,
            loss_logits=tf.stack([wanted, tf.math.log(tf.maximum(others, _TINY))], -1),
            metric_logits=tf.stack([wins, 1 - wins], -1),
        )

    def whole(self, logits: Any) -> Any:
        """Returns all logits."""
        before, after = self._start, self._size - self._stop
        ends = [*((logits.shape.rank - 1) * [[0, 0]]), [before, after]]
        return self._group.sum(tf.pad(logits, ends))

    def _find_winner(self, logits: Any) -> tuple[Any, Any]:
        """Returns the greatest logit of all, and the first word that has it."""
        most = self._group.max(tf.reduce_max(logits, -1))
        own = tf.where(
            tf.reduce_max(logits, -1) == most,
            self._start + keras.ops.cast(keras.ops.argmax(logits, -1), "int32"),
            self._size,
        )
        return most, -self._group.max(-own)
