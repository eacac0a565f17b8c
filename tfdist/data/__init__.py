"""Examples → this replica's batches: order, shards and sources."""

from tfdist.data.addressed import forget_readers
from tfdist.data.batches import local_batches
from tfdist.data.iterators import open_iterator, untuned
from tfdist.data.order import epoch_indices, num_steps, part_slice, step_size, step_start
from tfdist.data.poisson import poisson_batches
from tfdist.data.segment import Segment
from tfdist.data.shard import shard_source
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.indexed import IndexedSource
from tfdist.data.sources.source import (
    ArraySource,
    SelfShardedSource,
    ServedSource,
    ShardedSource,
    Source,
    StreamSource,
    are_arrays,
    build_source,
    has_varying_shapes,
    hold_out,
    take,
)
from tfdist.data.sources.tfds import TfdsSplit, tfds_split

__all__ = [
    "ArraySource",
    "IndexedSource",
    "Segment",
    "SelfShardedSource",
    "ServedSource",
    "ShardedSource",
    "Source",
    "StreamSource",
    "BatchedSource",
    "TfdsSplit",
    "are_arrays",
    "build_source",
    "epoch_indices",
    "forget_readers",
    "has_varying_shapes",
    "hold_out",
    "local_batches",
    "num_steps",
    "open_iterator",
    "part_slice",
    "poisson_batches",
    "shard_source",
    "step_size",
    "step_start",
    "take",
    "tfds_split",
    "untuned",
]
