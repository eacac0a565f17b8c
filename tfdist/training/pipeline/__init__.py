"""A model's layers in stages, each in a process of its own, through which micro-batches go one after the other."""
