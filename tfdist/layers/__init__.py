"""Layers that a distributed model needs; importing this loads TensorFlow, and makes saved models load that use them."""

# A model saved with a table has one of these optimizers, as a rule: known here, so that one import loads both.
from tfdist.layers.embedding import Embedding
from tfdist.optimizers import lazy as _lazy
from tfdist.optimizers import sparse as _sparse

__all__ = ["Embedding"]

del _lazy, _sparse
