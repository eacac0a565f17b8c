"""Examples → this process's parts of each global batch."""

from __future__ import annotations

from collections.abc import Sequence

from tfdist.data.addressed import addressed_batches
from tfdist.data.segment import Segment, Share
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import SelfShardedSource, ServedSource, ShardedSource, Source, StreamSource
from tfdist.data.streams import (
    made_batches,
    self_sharded_batches,
    served_batches,
    sharded_batches,
    streamed_batches,
)


def local_batches(
    source: Source,
    *,
    lap: int,
    seed: int,
    shuffle: bool,
    global_batch_size: int,
    num_replicas: int,
    replica_ids: Sequence[int],
    first_step: int = 0,
    num_steps: int | None = None,
    drop_remainder: bool = False,
    num_epochs_after: int = 0,
    fixed_sizes: bool = True,
) -> list[Segment]:
    """Returns this process's share of an epoch.

    Every process must pass the same seed: the global batches are then the same on all, and replica k of R
    takes examples `k·n//R … (k+1)·n//R - 1` of the n in a batch.

    Args:
        source: The examples.
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

    Returns:
        Runs of batches.
    """
    share = Share(
        lap=lap,
        seed=seed,
        shuffle=shuffle,
        global_batch_size=global_batch_size,
        num_replicas=num_replicas,
        replica_ids=tuple(replica_ids),
        first_step=first_step,
        num_steps=num_steps,
        drop_remainder=drop_remainder,
        num_epochs_after=num_epochs_after,
        fixed_sizes=fixed_sizes,
    )
    if isinstance(source, SelfShardedSource):
        return [self_sharded_batches(source, share)]
    if isinstance(source, ShardedSource):
        return [sharded_batches(source, share)]
    if isinstance(source, ServedSource):
        return [served_batches(source, share)]
    if isinstance(source, BatchedSource):
        return [made_batches(source, share)]
    if isinstance(source, StreamSource):
        return [streamed_batches(source, share)]
    return addressed_batches(source, share)
