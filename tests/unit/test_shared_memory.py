"""Memory that several processes add up in: real memory, with threads for processes and for MPI a barrier of theirs."""

import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tfdist.collectives.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create is Linux's")


class Communicator:
    """What `SharedMemory` needs of MPI; whoever leaves a barrier may be late for what comes behind it."""

    def __init__(self, rank, told, barrier, late_secs=0.0):
        self.rank, self.size = rank, len(told)
        self._told, self._barrier = told, barrier
        self._late_secs, self._random = late_secs, random.Random(rank)

    def Barrier(self):  # noqa: N802 - as mpi4py has it
        self._barrier.wait(timeout=30)
        time.sleep(self._random.random() * self._late_secs)

    def allgather(self, value):
        self._told[self.rank] = value
        self._barrier.wait(timeout=30)
        found = list(self._told)
        self._barrier.wait(timeout=30)
        return found


def in_threads(num_processes, work, **kwargs):
    """Returns what `work(memory, rank)` returns for each process."""
    told, barrier = [None] * num_processes, threading.Barrier(num_processes)

    def run(rank):
        return work(SharedMemory(Communicator(rank, told, barrier, **kwargs)), rank)

    with ThreadPoolExecutor(num_processes) as pool:
        return list(pool.map(run, range(num_processes)))


@pytest.mark.parametrize("num_processes", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_sums_are_those_of_all_in_the_order_of_the_ranks(num_processes, dtype):
    """Of sizes that grow and shrink, some too small for each to have a share."""
    sizes = [[1], [3, 70_000], [7], [40, 3, 900, 41], [16, 5, 200_001], [40_000]]
    own = [
        [[draw(rank, i, size, dtype) for i, size in enumerate(each)] for each in sizes]
        for rank in range(num_processes)
    ]

    def work(memory, rank):
        found = []
        for arrays in own[rank]:
            places = [0, *np.cumsum([-(-a.size // 16) * 16 for a in arrays])]
            out = np.empty(places[-1], dtype)
            memory.add_up(arrays, places[:-1], out)
            found.append([out[p : p + a.size] for p, a in zip(places[:-1], arrays, strict=True)])
        return found

    wanted = [
        [sum(parts[1:], parts[0]) for parts in zip(*each, strict=True)] for each in zip(*own, strict=True)
    ]
    for found in in_threads(num_processes, work):
        for arrays, right in zip(found, wanted, strict=True):
            for array, total in zip(arrays, right, strict=True):
                np.testing.assert_array_equal(array, total)


def draw(rank, i, size, dtype):
    return (np.random.default_rng([rank, i, size]).normal(size=size) * 100).astype(dtype)


def test_nobody_is_ahead_of_who_still_reads():
    def work(memory, rank):
        found = []
        for step in range(40):
            out = np.full(5, float(10 * step + rank))
            memory.add_up([out], [0], out)
            found.append(out.tolist())
        return found

    for found in in_threads(3, work, late_secs=0.003):
        assert found == [[30.0 * step + 3.0] * 5 for step in range(40)]


def test_memory_is_taken_again_once_nobody_reads_it():
    def work(memory, rank):
        first = memory.take_out(100, np.dtype("float32"))
        view = first[10:20].reshape(2, 5)
        place = first.ctypes.data
        del first
        other = memory.take_out(100, np.dtype("float32"))
        assert other.ctypes.data != place  # a part of it is still read
        del view
        assert memory.take_out(100, np.dtype("float32")).ctypes.data == place
        assert memory.take_out(100, np.dtype("float64")).ctypes.data % 64 == 0

    in_threads(2, work)


def test_one_that_has_no_memory_leaves_none_to_the_others(monkeypatch):
    """All must know: who believed in it would wait for ever."""
    make, calls = os.memfd_create, iter([True, False, False])

    def fail(name):
        if next(calls):
            raise OSError("none left")
        return make(name)

    monkeypatch.setattr(os, "memfd_create", fail)
    told, barrier = [None] * 3, threading.Barrier(3)

    def work(rank):
        with pytest.raises(OSError, match="none left|No such file"):
            SharedMemory(Communicator(rank, told, barrier))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
