"""Which processes a run consists of, and how they find, reach and trust each other; loads no TensorFlow."""
