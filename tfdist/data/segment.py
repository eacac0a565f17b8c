"""A run of batches, and which part of an epoch a process asks for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfdist.data.iterators import open_iterator
from tfdist.data.order import part_slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of batches of one shape.

    Attributes:
        build: Returns a dataset of what `split` divides, a fresh one each time: a second iterator over the same one
            would be shuffled otherwise.
        num_steps: Its length, None where only the data's end will tell.
        split: Makes of an element `(parts, global_size)`: one nest for each of this process's replicas, and the
            examples in the whole batch (int32 scalar; -1 where only the replicas together know). Of a worker's own
            part of a stream `(parts, has_more)`, bool: whether the next element holds examples; its elements go on
            for ever, empty, after one without examples at the start. Every segment of a kind of source splits alike.
        num_skipped: Elements to leave out at the start; they are not part of `num_steps`.
        num_buffered: Examples that are held back for shuffling.
        never_empty: Whether each replica is sure to get an example of each batch.
        is_short: Whether its batches are shorter than the pass's others, which has but one of them.
        run: Names what goes on after the segment's last element, maybe with another epoch's; None: nothing does.
        start: Place of the first element in the run.
        stop: Place in the run at which the dataset ends; None: where the data do.
    """

    build: Callable[[], tf.data.Dataset]
    num_steps: int | None
    split: Callable[[Any], tuple[tuple[Any, ...], Any]] = lambda element: element
    num_skipped: int = 0
    num_buffered: int = 0
    never_empty: bool = False
    is_short: bool = False
    run: Hashable = None
    start: int = 0
    stop: int | None = None

    def build_in_budget(self) -> tf.data.Dataset:
        """Returns a fresh dataset of all elements that plans with this task's share of the machine."""
        return self.build().with_options(build_budget(os.environ))

    def open(self) -> Iterator[Any]:
        """Returns an iterator over the elements, from where they are not left out."""
        dataset = self.build_in_budget()
        return open_iterator(dataset.skip(self.num_skipped) if self.num_skipped else dataset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """A process's part of an epoch.

    Every process must name the same seed: the global batches are then the same on all, and replica k of R
    takes examples `k·n//R … (k+1)·n//R - 1` of the n in a batch.

    Attributes:
        lap: Passes through the data before this one.
        seed: Of the order.
        shuffle: False keeps the data's own order.
        global_batch_size: Examples per step over all replicas.
        num_replicas: R.
        replica_ids: This process's k.
        first_step: Steps of the pass to leave out at its start.
        num_steps: Where the epoch ends, counted from the pass's start; None: with the data, as at the latest.
        drop_remainder: Leave out a pass's last batch if it is short.
        num_epochs_after: Epochs that may be asked for next, in their order: a segment's elements may go on with theirs.
        fixed_sizes: Whether the sizes of several replicas' parts must be static, where the number of examples is known:
            a whole batch and the short one at the end then need a graph each.
    """

    lap: int
    seed: int
    shuffle: bool
    global_batch_size: int
    num_replicas: int
    replica_ids: Sequence[int]
    first_step: int = 0
    num_steps: int | None = None
    drop_remainder: bool = False
    num_epochs_after: int = 0
    fixed_sizes: bool = True

    @property
    def num_left(self) -> int | None:
        """Steps from the first one on, None where only the data's end will tell."""
        return None if self.num_steps is None else self.num_steps - self.first_step

    @property
    def own_batch_size(self) -> int:
        """Examples of a whole batch that this process's replicas take together."""
        low = part_slice(self.global_batch_size, self.replica_ids[0], self.num_replicas)[0]
        return part_slice(self.global_batch_size, self.replica_ids[-1], self.num_replicas)[1] - low

    def shuffle_seed(self, *keys: int) -> int:
        """Returns the seed of a shuffle buffer, another one in each pass and for other keys."""
        return hash((self.seed, self.lap, *keys)) % 2**31

    def split(self, batch: Any) -> tuple[tuple[Any, ...], Any]:
        """Divides a whole batch: this process's parts, and its examples (int32 scalar)."""
        return split_batch(batch, self.num_replicas, self.replica_ids)

    def split_own(self, element: Any) -> tuple[tuple[Any, ...], Any]:
        """Divides `(batch, has_more)`, a batch of this process alone, among its replicas."""
        num_local = len(self.replica_ids)
        return split_batch(element[0], num_local, range(num_local))[0], element[1]


def build_budget(environ: Mapping[str, str]) -> tf.data.Options:
    """Returns the share of this machine that `tf.data` may plan with: by default each task would take it whole.

    Args:
        environ: Where the launcher has left the threads of this task, as TF_NUM_INTRAOP_THREADS.
    """
    options = tf.data.Options()
    threads, cores = environ.get("TF_NUM_INTRAOP_THREADS", ""), os.cpu_count() or 1
    if threads.isdecimal() and 0 < int(threads) < cores:
        options.autotune.cpu_budget = int(threads)
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Half of the memory is what it takes by itself.
        options.autotune.ram_budget = memory_bytes // 2 * int(threads) // cores
    return options


def split_batch(batch: Any, num_replicas: int, replica_ids: Sequence[int]) -> tuple[tuple[Any, ...], Any]:
    """Returns the parts of some replicas, and the examples of the batch (int32 scalar)."""
    first = tf.nest.flatten(batch)[0]
    size = tf.shape(first)[0] if first.shape[0] is None else first.shape[0]
    if num_replicas == 1:
        return (batch,), tf.convert_to_tensor(size)
    slices = [part_slice(size, k, num_replicas) for k in replica_ids]
    parts = tuple(
        tf.nest.map_structure(lambda t, low=low, high=high: t[low:high], batch) for low, high in slices
    )
    return parts, tf.convert_to_tensor(size)
