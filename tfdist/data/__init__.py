"""Examples → this replica's batches: order, shards and sources."""

from tfdist.data.batches import Segment, local_batches
from tfdist.data.order import epoch_indices, num_steps, part_slice, step_size, step_start
from tfdist.data.source import (
    ArraySource,
    SelfShardedSource,
    Source,
    StreamSource,
    build_source,
    hold_out,
    take,
)
from tfdist.data.tfds import TfdsSplit, tfds_split

__all__ = [
    "ArraySource",
    "Segment",
    "SelfShardedSource",
    "Source",
    "StreamSource",
    "TfdsSplit",
    "build_source",
    "epoch_indices",
    "hold_out",
    "local_batches",
    "num_steps",
    "part_slice",
    "step_size",
    "step_start",
    "take",
    "tfds_split",
]
