"""Memory that was freed between blocks in use goes back to the system."""

import ctypes
import os
import platform

import pytest

from tfdist.runtime import memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the GNU C library alone keeps such pages"
)


def held_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_pages_between_blocks_in_use_go_back_but_not_each_time():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 60_000, 2000
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    kept = blocks[::10]
    for block in set(blocks) - set(kept):
        libc.free(block)
    full = held_mb()
    memory.give_back(every_secs=3600)
    assert held_mb() > full - 20
    memory.give_back(every_secs=0)
    assert held_mb() < full - 80  # of 108
    for block in kept:
        libc.free(block)
