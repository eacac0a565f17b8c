"""What `fit` takes as data, and where it comes from."""
