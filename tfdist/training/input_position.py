"""Where a stream of examples stands, as bytes that a checkpoint can hold.

An addressed source needs none: its position is the step's number. A stream would have to be read again up to the
step; `tf.data` can save most pipelines instead, with what their shuffle buffers hold. All workers read the same whole
stream in the same order, so one worker's bytes are everybody's.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from tfdist import keras_internals
from tfdist.data.iterators import open_iterator
from tfdist.data.segment import Segment
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import Source, StreamSource
from tfdist.errors import ConfigError
from tfdist.training.plan import BatchPlan

_log = logging.getLogger("tfdist")
# Larger ones would hold up every checkpoint; reading again is then the better way.
_MAX_BYTES = 256 * 2**20


class KeptIterators:
    """Iterators that have read a segment to its end, and stand where the next epoch's begins."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[int, Iterator[Any]]] = {}

    def forget(self) -> None:
        """Lets go of all."""
        self._kept.clear()

    def keep(self, segment: Segment, iterator: Iterator[Any]) -> None:
        """Keeps the one of a segment, if the next epoch's elements follow."""
        place = segment.start + (segment.num_steps or 0)
        if segment.run is not None and (segment.stop is None or place < segment.stop):
            self._kept[segment.run] = place, iterator

    def take(self, segment: Segment) -> Iterator[Any] | None:
        """Returns one that stands where a segment begins, if there is one."""
        place, kept = self._kept.pop(segment.run, (None, None))
        if kept is not None and place == segment.start:
            return kept
        if segment.stop is None:
            self._kept.clear()  # what is left of the pass before
        return None


class InputPosition:
    """Opens data where they are to go on, and saves where the stream stands that is trained on."""

    def __init__(self) -> None:
        self._iterator: Any = None
        self._label = b""
        self._unsavable: Source | None = None
        self._kept = KeptIterators()
        self._between_tests = KeptIterators()

    def forget(self) -> None:
        """Lets go of what was kept."""
        self._iterator = None
        self._kept.forget()
        self._between_tests.forget()

    def keep(self, segment: Segment, iterator: Iterator[Any], *, kind: str = "train") -> None:
        """Keeps the iterator of a segment that was read to its end, if the next epoch's elements follow."""
        (self._kept if kind == "train" else self._between_tests).keep(segment, iterator)

    def open(
        self, segment: Segment, source: Source, plan: BatchPlan, *, kind: str = "train"
    ) -> Iterator[Any]:
        """Returns an iterator over a segment's elements, from the plan's first step on.

        Of what is opened for another `kind` than "train" a checkpoint knows nothing.
        """
        if kind != "train":
            return self._between_tests.take(segment) or segment.open()
        kept = self._kept.take(segment)
        if kept is not None:
            return kept
        self._iterator = None
        if not isinstance(source, (StreamSource, BatchedSource)):
            return segment.open()
        dataset = segment.build_in_budget()
        self._label = _label(dataset, plan)
        if segment.num_skipped and not plan.input_state.startswith(self._label):
            # Nothing is saved in such an epoch: the skipping is part of its pipeline, which no other run would build.
            return segment.open()
        iterator = open_iterator(dataset)
        if segment.num_skipped:
            try:
                keras_internals.restore_iterator(iterator, plan.input_state[len(self._label) :])
            except tf.errors.OpError:
                return segment.open()
        if source is not self._unsavable and _is_small(segment, source):
            self._iterator = iterator
        return iterator

    def save(self) -> bytes:
        """Returns where the stream stands; empty where that is not to be saved."""
        if self._iterator is None:
            return b""
        try:
            state = keras_internals.save_iterator(self._iterator)
        except tf.errors.OpError:
            # A generator, Python code, or random operations: TensorFlow cannot say where they stand.
            state = b""
        if not 0 < len(state) <= _MAX_BYTES:
            self._iterator = None
            return b""
        return self._label + state


def check_order(before: Mapping[str, Any], now: Mapping[str, Any], *, step: int) -> None:
    """Makes sure that a checkpoint's place in the data is the same place now.

    Args:
        before: What the order of an epoch's examples followed from when it was made, by name, as `fit` takes it;
            `num_parts` are those in which workers read a stream.
        now: The same of this run.
        step: Steps finished inside a pass over the data; 0: the next one may have another order.

    Raises:
        ConfigError: If inside the pass the order is another, or there are fewer examples than there were.
    """
    for name, new in now.items():
        old = before.get(name, new)  # Files of earlier versions do not tell.
        shrinks = name == "num_examples" and None not in (old, new) and new < old
        if old == new or not (step or shrinks):
            continue
        if name == "num_parts":
            # As when an elastic run goes on with fewer workers: better than not at all.
            _log.warning(
                "workers shared the stream in %s parts, and now in %s: of the epoch that the run goes on inside, some "
                "examples come twice or not at all",
                old,
                new,
            )
            continue
        where = f"{step} steps inside a pass over the data" if step else "after a pass over the data"
        remedy = f"resume with {'the data it began with' if name == 'num_examples' else f'{name}={old!r}'}"
        raise ConfigError(
            f"the checkpoint stands {where} with {name}={old!r}, and this run has {name}={new!r}: examples would be "
            f"lost or come twice; {remedy}, or start anew in another folder."
        )


def _label(dataset: tf.data.Dataset, plan: BatchPlan) -> bytes:
    """Names the pipeline: another one, or another TensorFlow's, is not brought to this state."""
    parts = (
        tf.__version__,
        plan.place.lap,
        plan.seed,
        plan.shuffle,
        plan.global_batch_size,
        plan.drop_remainder,
        dataset.element_spec,
    )
    return hashlib.sha256(repr(parts).encode()).digest()


def _is_small(segment: Segment, source: StreamSource | BatchedSource) -> bool:
    """Tells whether the examples that are held back for shuffling are few enough, as far as their size is known."""
    sizes = [
        math.prod(d or 1 for d in spec.shape) * max(spec.dtype.size, 1)
        for spec in tf.nest.flatten(source.dataset.element_spec)
        if isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None
    ]
    return sum(sizes) * segment.num_buffered <= _MAX_BYTES
