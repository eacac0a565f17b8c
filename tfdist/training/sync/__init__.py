"""Training in lock step: the loop of `one_device`, `mirrored` and `multiworker`, and what its workers exchange."""
