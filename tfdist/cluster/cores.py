"""How many cores a process has."""

import os


def count_cores() -> int:
    """Counts the cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
