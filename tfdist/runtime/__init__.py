"""What TensorFlow is told before a task builds a model: its devices, its server, its strategy."""
