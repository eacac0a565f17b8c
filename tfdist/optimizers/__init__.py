"""Optimizers and learning-rate schedules by name; importing this loads neither Keras nor TensorFlow."""

from tfdist.optimizers.by_name import OPTIMIZERS, build_optimizer
from tfdist.optimizers.schedules import SCHEDULES, build_schedule

__all__ = ["OPTIMIZERS", "SCHEDULES", "build_optimizer", "build_schedule"]
