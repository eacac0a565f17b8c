"""The sum of arrays over the processes of one machine, through memory that all of them see.

Messages between two processes are copied in and out for each pair that exchanges some. Here each process copies in
once what others add up, adds one share of the numbers up over all, and copies the others' sums out, however many
processes there are. They meet twice for it, which is left to MPI; the memory is not, since its shared windows lie in
`/dev/shm`, of which a container has 64 MB.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# A tensor takes memory that begins at a multiple of it as its own, without a copy.
ALIGNMENT = 64
# Numbers that are added up at once: those of two processes and their sum stay in a core's cache.
_BLOCK = 1 << 14


class SharedMemory:
    """Memory of each process that all of them see.

    The kernel frees it with the last of them, however that ends: it has no name, in `/dev/shm` or elsewhere, and no
    limit but the machine's. The others find it by its owner's id and descriptor.

    Args:
        comm: An `mpi4py.MPI.Comm` of processes on one machine; all of them make one.

    Raises:
        OSError: On every process, if one cannot see another's.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._rank: int = comm.rank
        self._kept: list[_Kept] = []
        self._grow(ALIGNMENT)

    def add_up(self, arrays: Sequence[np.ndarray], places: Sequence[int], out: np.ndarray) -> None:
        """Adds arrays up over all processes, in the order of their ranks; all must call it with the same sizes.

        Args:
            arrays: Of the type of `out`, in which they may lie.
            places: Where each one's numbers belong in `out`.
            out: `[n]`, which takes the sums; where no array belongs, anything.
        """
        if out.nbytes > self._num_bytes:
            self._grow(out.nbytes)
        parts = [memory[: out.nbytes].view(out.dtype) for memory in self._parts]
        bounds = [out.size * rank // len(parts) for rank in range(len(parts) + 1)]
        shares = list(zip(self._sums, bounds[:-1], bounds[1:], strict=True))
        sums = [memory[: (end - start) * out.itemsize].view(out.dtype) for memory, start, end in shares]
        own, (first, end) = parts[self._rank], bounds[self._rank : self._rank + 2]
        if out.size < len(arrays) * _BLOCK:
            for array, place in zip(arrays, places, strict=True):
                own[place : place + array.size] = array.reshape(-1)
            # To add many small ones up one by one would cost more than their copies.
            arrays, places = [own], [0]
        else:
            for array, place in zip(arrays, places, strict=True):
                flat, stop = array.reshape(-1), place + array.size
                # The share that this process adds up nobody else reads.
                own[place : min(stop, first)] = flat[: max(first - place, 0)]
                own[max(place, end) : stop] = flat[max(end - place, 0) :]
        # Whoever has come here has read the sums before.
        self._comm.Barrier()
        for array, place in zip(arrays, places, strict=True):
            flat, stop = array.reshape(-1), min(place + array.size, end)
            for start in range(max(place, first), stop, _BLOCK):
                block = slice(start, min(start + _BLOCK, stop))
                terms = [part[block] for part in parts]
                terms[self._rank] = flat[start - place : block.stop - place]
                total = sums[self._rank][start - first : block.stop - first]
                np.add(terms[0], terms[1], out=total)
                for term in terms[2:]:
                    np.add(total, term, out=total)
                out[block] = total
        # Whoever has come here has read the arrays: the next may take their places.
        self._comm.Barrier()
        for rank, (share, start, stop) in enumerate(zip(sums, bounds[:-1], bounds[1:], strict=True)):
            if rank != self._rank:
                out[start:stop] = share

    def take_out(self, size: int, dtype: np.dtype) -> np.ndarray:
        """Returns an array `[size]`, aligned, that nobody else has: the last one's memory once nobody reads it.

        New memory would cost more than the sum that it takes: the kernel clears each page.
        """
        for kept in self._kept:
            if kept.array.size == size and kept.array.dtype == dtype and kept.is_free:
                return kept.array
        self._kept.append(_Kept(size, dtype))
        return self._kept[-1].array

    def _grow(self, num_bytes: int) -> None:
        """Replaces the memory by some of that size; every process must call it."""
        num_processes = self._comm.size
        share_bytes = -(-num_bytes // num_processes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        part_bytes = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        own, error = -1, ""
        try:
            own = os.memfd_create("tfdist-exchange")
            os.truncate(own, part_bytes + share_bytes)
        except OSError as failure:
            error = str(failure)
        memories = []
        for place in self._comm.allgather((os.getpid(), own, _identify(own))):
            try:
                memories.append(_map(*place, num_bytes=part_bytes + share_bytes))
            except OSError as failure:
                error = error or str(failure)
        errors = [found for found in self._comm.allgather(error) if found]
        if own >= 0:
            os.close(own)  # The memory stays with those who have mapped it.
        if errors:
            raise OSError(errors[0])
        self._parts = [memory[:part_bytes] for memory in memories]
        self._sums = [memory[part_bytes:] for memory in memories]
        self._num_bytes = part_bytes


def open_shared_memory(comm: Any) -> SharedMemory | None:
    """Returns the memory of an `mpi4py.MPI.Comm`'s processes; None on all if they do not all see each other's."""
    from mpi4py import MPI  # here: who has a communicator has it, and nobody else needs it

    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    is_one_machine = local.size == comm.size
    local.Free()  # MPI has room for some thousands, and each model that is trained asks.
    if not is_one_machine or sys.platform != "linux":
        return None
    try:
        return SharedMemory(comm)
    except OSError:
        return None


def _identify(fd: int) -> tuple[int, int]:
    """Returns what tells a file from every other of this kernel."""
    if fd < 0:
        return -1, -1
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _map(pid: int, number: int, identity: tuple[int, int], *, num_bytes: int) -> np.ndarray:
    """Returns the memory behind a process's descriptor."""
    fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    try:
        # In a container of its own that id may be somebody else's.
        if _identify(fd) != identity:
            raise OSError(f"process {pid} is another here")
        memory = mmap.mmap(fd, num_bytes)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, np.uint8)
    finally:
        os.close(fd)


class _Kept:
    """An aligned array, which knows whether anybody else has it or a part of it."""

    def __init__(self, size: int, dtype: np.dtype) -> None:
        self._memory = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -self._memory.ctypes.data % ALIGNMENT
        # NumPy lets every view hold on to this memory itself, and to no view in between.
        self.array = self._memory[start : start + size * dtype.itemsize].view(dtype)
        self._num_holders = self._count()

    @property
    def is_free(self) -> bool:
        return self._count() == self._num_holders

    def _count(self) -> int:
        return sys.getrefcount(self._memory) + sys.getrefcount(self.array)
