"""Starts and supervises the processes of a cluster; loads no TensorFlow."""
