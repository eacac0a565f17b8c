"""What the commands share: the flags of `tfdist.train`, and how a `RunConfig` is carried out."""
