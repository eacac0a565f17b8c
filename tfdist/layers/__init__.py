"""Layers that a distributed model needs; importing this loads TensorFlow, and makes saved models load that use them."""

from tfdist.layers.blocks import ColumnDense, MultiHeadAttention, RowDense, VocabularyEmbedding

# A model saved with a table has one of these optimizers, as a rule: known here, so that one import loads both.
from tfdist.layers.embedding import Embedding
from tfdist.optimizers import lazy as _lazy
from tfdist.optimizers import sparse as _sparse

__all__ = ["ColumnDense", "Embedding", "MultiHeadAttention", "RowDense", "VocabularyEmbedding"]

del _lazy, _sparse
