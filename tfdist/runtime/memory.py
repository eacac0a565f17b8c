"""What a long run holds of memory that it needs no more."""

from __future__ import annotations

import contextlib
import ctypes
import time

EVERY_SECS = 60.0
_given_back_at = time.monotonic()


def give_back(*, every_secs: float = EVERY_SECS) -> None:
    """Gives the system the free pages that the C library keeps between those in use; some 10 ms.

    Batches come and go on many threads, and leave gaps that no thread's next one fits: without this a run whose data in
    use stay the same takes some tens of kB more with every epoch.

    Args:
        every_secs: Does nothing if this process has done so within this time.
    """
    global _given_back_at
    now = time.monotonic()
    if now - _given_back_at < every_secs:
        return
    _given_back_at = now
    # The GNU C library alone has it.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
