"""A run's state: taken between two steps, written whole, brought back under any strategy."""
