"""Examples → this process's parts of each global batch."""

from __future__ import annotations

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


def local_batches(source: Source, share: Share) -> list[Segment]:
    """Returns this process's share of an epoch, as runs of batches."""
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
