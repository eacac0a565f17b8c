"""Planning: what a step will take in each way to train, from short trials of the real thing; see `tfdist.plan`."""
