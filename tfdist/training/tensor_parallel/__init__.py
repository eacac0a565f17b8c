"""Layers in blocks: each of several processes has a part of a kernel, and they add up what they make."""
