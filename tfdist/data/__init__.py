"""Examples → this replica's batches: order, shards and sources."""

from tfdist.data.sources.indexed import IndexedSource
from tfdist.data.sources.source import ArraySource, build_source
from tfdist.data.sources.tfds import tfds_split

__all__ = ["ArraySource", "IndexedSource", "build_source", "tfds_split"]
