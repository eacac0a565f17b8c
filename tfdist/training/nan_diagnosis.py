"""Where a number went wrong: the batch run again, on the weights from before its update, and every output looked at."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data.batches import local_batches
from tfdist.data.order import epoch_indices
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.indexed import IndexedSource
from tfdist.data.sources.source import ArraySource, SelfShardedSource, ServedSource, ShardedSource, Source
from tfdist.training.plan import BatchPlan

# How many examples are named, and how often the model runs to find those that are wrong by themselves.
_MAX_NAMED = 5
_MAX_RUNS = 64


def describe_step(model: keras.Model, source: Source, plan: BatchPlan, step: int) -> str:
    """Says where in the model, and with which examples, the numbers of a zero-based step went wrong.

    The model has the weights from before the step. Returned are clauses such as "first in the output of layer 'log';
    example 17 of the training data", or "" where the batch cannot be read again, or this process has not all of the
    model.
    """
    if not all(map(keras_internals.is_whole, model.weights)):
        return ""
    if isinstance(source, (SelfShardedSource, ServedSource, ShardedSource)):
        return ""
    if isinstance(source, BatchedSource) and source.peeked is not None:
        return ""  # a generator, which gives a batch once
    batch = _read_batch(source, plan, step)
    place = find_place(model, batch)
    count = int(tf.nest.flatten(batch)[0].shape[0])
    rows = [] if place is None else _find_rows(model, batch, list(range(count)))
    examples = _render_examples(rows, count, _indices(source, plan, step, count))
    return f"{place or 'run again by itself the batch gives finite numbers' + _own_step(model)}; {examples}"


def find_place(model: keras.Model, batch: Any) -> str | None:
    """Returns the first place where a number is not finite, in words; None if there is none.

    Runs a batch through the model, its loss and its gradients; nothing is changed. Of a model with a `train_step` of
    its own only the forward pass is looked at.
    """
    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    for name, values in (("inputs", x), ("targets", y), ("sample weights", weight)):
        if not _is_finite(values):
            return f"first in the {name}"
    places: list[str] = []

    def look(operation: Any, outputs: Any) -> None:
        if not places and not _is_finite(outputs):
            bad_weights = [w for w in getattr(operation, "weights", []) if not _is_finite(w.numpy())]
            what = "weights" if bad_weights else "output"
            places.append(f"first in the {what} of layer {operation.name!r}")

    variables = keras_internals.all_variables(model, [])
    state = [(v, tf.convert_to_tensor(v.numpy())) for v in variables]
    trained = {id(v) for v in model.trainable_variables}
    weights = [(v, value) for v, value in state if id(v) in trained]
    takes_training = "training" in inspect.signature(model.call).parameters
    scope = keras.StatelessScope(state_mapping=state, collect_losses=True)
    with scope, tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([value for _, value in weights])
        with keras_internals.watching_outputs(model, look):
            outputs = model(x, training=True) if takes_training else model(x)
        if places:
            return places[0]
        if _own_step(model):
            return None
        loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weight)
    if not _is_finite(loss):
        return "first in the loss; the model's outputs are finite"
    grads = tape.gradient(loss, [value for _, value in weights])
    bad = [v.path for (v, _), grad in zip(weights, grads, strict=True) if not _is_finite(grad)]
    if not bad:
        return None
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"in the gradients of {bad[0]!r}{more}; the forward pass is finite"


def _own_step(model: keras.Model) -> str:
    """Says that a model's own step may compute any loss: only its forward pass can be run again."""
    if not keras_internals.has_own_step(model):
        return ""
    return " in the forward pass: look at the loss and the gradients in train_step"


def _read_batch(source: Source, plan: BatchPlan, step: int) -> Any:
    alone = dataclasses.replace(plan, first_step=step, num_steps=step + 1, num_epochs_after=0)
    (segment,) = local_batches(source, alone.share(1, [0]))
    parts, _ = segment.split(next(segment.open()))
    return parts[0]


def _indices(source: Source, plan: BatchPlan, step: int, count: int) -> list[int] | None:
    if not isinstance(source, (ArraySource, IndexedSource)):
        return None
    indices = epoch_indices(
        num_examples=source.num_examples,
        seed=plan.seed,
        epoch=plan.place.lap,
        start=(plan.place.step + step) * plan.global_batch_size,
        size=count,
        shuffle=plan.shuffle,
    )
    return [int(i) for i in indices.numpy()]


def _find_rows(model: keras.Model, batch: Any, rows: list[int]) -> list[int]:
    """Halves the batch again and again, leaving out the halves that are sound, to the single examples."""
    found: list[int] = []
    waiting, num_runs = [rows], 0
    while waiting and num_runs < _MAX_RUNS and len(found) <= _MAX_NAMED:
        part = waiting.pop()
        num_runs += 1
        taken = tf.nest.map_structure(lambda t, part=part: tf.gather(t, part), batch)
        if find_place(model, taken) is None:
            continue
        if len(part) == 1:
            found += part
        else:
            middle = len(part) // 2
            waiting += [part[middle:], part[:middle]]
    return found


def _render_examples(rows: Sequence[int], count: int, indices: list[int] | None) -> str:
    where = "of the training data" if indices is not None else "of the batch, counted from 0"
    names = list(range(count)) if indices is None else indices
    named = [str(names[row]) for row in (rows or range(count))[:_MAX_NAMED]]
    more = " …" if len(rows or range(count)) > _MAX_NAMED else ""
    if rows:
        return f"example{'s' if len(rows) > 1 else ''} {', '.join(named)}{more} {where}"
    return f"the batch's {count} examples are {', '.join(named)}{more} {where}"


def _is_finite(values: Any) -> bool:
    for value in tf.nest.flatten(values):
        dense = value.values if isinstance(value, tf.IndexedSlices) else value
        if dense is None or isinstance(dense, (tf.RaggedTensor, tf.SparseTensor)):
            continue
        tensor = tf.convert_to_tensor(dense)
        if tensor.dtype.is_floating and not np.isfinite(tf.cast(tensor, tf.float32).numpy()).all():
            return False
    return True
