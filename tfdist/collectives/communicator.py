"""What carries tensors from worker to worker: TensorFlow's collectives, or MPI. The same sums by either."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.cluster.environments.mpi import find_starter
from tfdist.collectives.shared_memory import ALIGNMENT, open_shared_memory
from tfdist.errors import ConfigError
from tfdist.runtime.devices import has_own_gpus

# Far from the keys that TensorFlow gives its own groups and tensors, which it counts from 1.
_PAIR_KEYS = 1 << 20
_NARROW = (tf.bfloat16, tf.float16)
# With fewer, MPI's own sum is faster: it does not return to Python in between.
_LEAST_SHARED_BYTES = 1 << 19
_NUM_TRIES = 3
_FINALIZE_SECS = 5.0


class CollectiveCommunicator:
    """TensorFlow's collectives: its gRPC ring on CPUs, NCCL on GPUs."""

    name = "collective"

    def __init__(self, *, rank: int, num_workers: int) -> None:
        self.rank = rank
        self.num_workers = num_workers
        self._num_pair_calls: dict[int, int] = {}

    def sum(self, tensor: Any, outer: tf.distribute.ReplicaContext, *, may_overwrite: bool = False) -> Any:
        """Returns the sum of tensors of one shape, in their own type; every replica calls it, in the same order."""
        del may_overwrite
        with outer:
            (total,) = outer.all_reduce(tf.distribute.ReduceOp.SUM, [tensor])
        return total

    def sum_each(self, tensors: Sequence[Any], outer: tf.distribute.ReplicaContext) -> list[Any]:
        """Returns the sums of several tensors of one type; see `sum`."""
        return split(self.sum(join(tensors), outer), tensors)

    def sum_with(self, tensor: Any, peer: int) -> Any:
        """Returns the sum of this worker's tensor and another's, who must call it too, with this one as its peer."""
        low, high = sorted((self.rank, peer))
        group = _PAIR_KEYS + low * self.num_workers + high
        # Both count the calls that they make together alike.
        number = self._num_pair_calls[group] = self._num_pair_calls.get(group, 0) + 1
        return tf.raw_ops.CollectiveReduceV2(
            input=tensor,
            group_size=2,
            group_key=group,
            instance_key=_PAIR_KEYS + number,
            ordering_token=[],
            merge_op="Add",
            final_op="Id",
            communication_hint="RING",
        )


class MpiCommunicator:
    """MPI by `mpi4py`, called from inside the graph: through shared memory on one machine, by the site's network else.

    TensorFlow runs these calls in the order in which they were traced, so all workers make the same ones in turn.

    Args:
        comm: An `mpi4py.MPI.Comm` whose ranks are the workers' in the cluster's order.
    """

    name = "mpi"

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI  # here: who has a communicator has it, and nobody else needs it

        self._comm = comm
        self._shared = open_shared_memory(comm)
        self._in_place = MPI.IN_PLACE
        self.rank: int = comm.rank
        self.num_workers: int = comm.size

    def sum(
        self,
        tensor: Any,
        outer: tf.distribute.ReplicaContext | None = None,
        *,
        may_overwrite: bool = False,
    ) -> Any:
        """Returns the sum of tensors of one shape over all workers; narrow types are added up in float32.

        `may_overwrite`: nobody else reads the tensor, and its memory may take the sum.
        """
        del outer
        if tensor.dtype in _NARROW:
            return self._call(self._sum_narrow, tensor)
        return self._call(self._sum_in_place if may_overwrite else self._sum, tensor)

    def sum_each(
        self, tensors: Sequence[Any], outer: tf.distribute.ReplicaContext | None = None
    ) -> list[Any]:
        """Returns the sums of several tensors of one type; see `sum`."""
        dtype = tensors[0].dtype
        num_bytes = sum(tensor.shape.num_elements() for tensor in tensors) * dtype.size
        shared = self._shared if num_bytes >= _LEAST_SHARED_BYTES else None
        if shared is None or dtype in _NARROW:
            # Joined from several, for this exchange alone.
            return split(self.sum(join(tensors), outer, may_overwrite=len(tensors) > 1), tensors)
        step = ALIGNMENT // dtype.size
        sizes = [tensor.shape.num_elements() for tensor in tensors]
        ends = list(itertools.accumulate(-(-size // step) * step for size in sizes))
        places = [0, *ends[:-1]]

        def add_up(*arrays: np.ndarray) -> list[np.ndarray]:
            out = shared.take_out(ends[-1], np.dtype(dtype.as_numpy_dtype))
            shared.add_up(arrays, places, out)
            return [out[p : p + a.size].reshape(a.shape) for a, p in zip(arrays, places, strict=True)]

        sums = tf.numpy_function(add_up, tensors, [dtype] * len(tensors))
        return [tf.ensure_shape(total, tensor.shape) for total, tensor in zip(sums, tensors, strict=True)]

    def sum_with(self, tensor: Any, peer: int) -> Any:
        """Returns the sum of this worker's tensor and another's, who must call it too, with this one as its peer."""

        def swap(own: np.ndarray) -> np.ndarray:
            other = np.empty_like(own)
            self._comm.Sendrecv(_plain(own), peer, recvbuf=_plain(other), source=peer)
            return own + other

        return self._call(swap, tensor)

    def _call(self, function: Callable[[np.ndarray], np.ndarray], tensor: Any) -> Any:
        result = tf.numpy_function(function, [tensor], tensor.dtype)
        return tf.ensure_shape(result, tensor.shape)

    def _sum(self, own: np.ndarray) -> np.ndarray:
        return self._sum_in_place(np.array(own))  # TensorFlow gives a scalar as one that cannot be written to

    def _sum_in_place(self, own: np.ndarray) -> np.ndarray:
        """TensorFlow lends its own memory, and takes it back: nothing is copied."""
        if self._shared is not None and own.nbytes >= _LEAST_SHARED_BYTES:
            self._shared.add_up([own], [0], own.reshape(-1))
        else:
            self._comm.Allreduce(self._in_place, own)
        return own

    def _sum_narrow(self, own: np.ndarray) -> np.ndarray:
        """Each worker adds one share of the numbers up, and hands it to all: as many bytes as a ring moves."""
        size = -(-own.size // self.num_workers)
        sent = np.zeros((self.num_workers, size), own.dtype)
        sent.reshape(-1)[: own.size] = own.reshape(-1)
        parts = np.empty_like(sent)
        self._comm.Alltoall(_plain(sent), _plain(parts))
        share = parts.astype(np.float32).sum(axis=0).astype(own.dtype)
        whole = np.empty_like(sent)
        self._comm.Allgather(_plain(share), _plain(whole))
        return whole.reshape(-1)[: own.size].reshape(own.shape)


Communicator = CollectiveCommunicator | MpiCommunicator


def join(tensors: Sequence[Any]) -> Any:
    """Returns the numbers of tensors of one type, one behind the other."""
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def split(flat: Any, tensors: Sequence[Any]) -> list[Any]:
    """Returns a tensor like each of those that were joined."""
    pieces = tf.split(flat, [tensor.shape.num_elements() for tensor in tensors])
    return [tf.reshape(piece, tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def choose_communicator(
    exchange: str,
    *,
    rank: int,
    num_workers: int,
    num_local: int,
    num_bytes: int,
    build: Callable[[Callable[[tf.distribute.ReplicaContext], Any]], Callable[[], Any]],
) -> tuple[Communicator, str]:
    """Chooses what carries the gradients; every worker calls it, and gets the same answer.

    Args:
        exchange: `collective`, `mpi`, or `auto`: whichever is measured to be faster.
        rank: This worker's place.
        num_workers: That take part.
        num_local: Replicas on each.
        num_bytes: Of a step's gradients.
        build: Makes of a function of the outer replica context one that runs it on this worker's replica, compiled.

    Returns:
        The communicator, and a line that says why.

    Raises:
        ConfigError: If `mpi` is asked for and there is none.
    """
    collective = CollectiveCommunicator(rank=rank, num_workers=num_workers)
    if tf.config.list_logical_devices("GPU") and exchange != "mpi":
        how = "NCCL" if has_own_gpus() else "TensorFlow's ring, since NCCL refuses workers that share a GPU"
        return collective, f"gradients by {how}"
    if exchange == "collective" or num_workers == 1:
        return collective, "exchange by TensorFlow's collectives"
    obstacle = ""
    if num_local > 1:
        obstacle = f"each worker has {num_local} replicas"
    obstacle = obstacle or ("" if find_starter(os.environ) else "this process was not started for MPI")
    comm, obstacle = (None, obstacle) if obstacle else _open_world(rank, num_workers)
    # Either all have it or none.
    num_able = build(lambda outer: collective.sum(tf.constant([float(comm is not None)]), outer))()[0]
    if num_able < num_workers:
        why = obstacle or "other workers have no MPI"
        if exchange == "mpi":
            raise ConfigError(
                f"exchange='mpi', but {why}; start with 'python -m tfdist.launch' or 'mpiexec' where "
                "tfdist[mpi] is installed, or choose exchange='collective'."
            )
        return collective, f"exchange by TensorFlow's collectives ({why})"
    mpi = MpiCommunicator(comm)
    if exchange == "mpi":
        return mpi, "exchange by MPI"
    secs = [_time(communicator, num_bytes, build, collective) for communicator in (collective, mpi)]
    chosen = mpi if secs[1] < secs[0] else collective
    return chosen, (
        f"exchange by {'MPI' if chosen is mpi else 'collectives'}: {num_bytes / 1e6:,.1f} MB took "
        f"{1e3 * secs[0]:.1f} ms by TensorFlow's collectives, {1e3 * secs[1]:.1f} ms by MPI"
    )


def _open_world(rank: int, num_workers: int) -> tuple[Any, str]:
    """Returns MPI's world and "", or None and what is wrong with it."""
    try:
        # Here, since only this way of exchanging needs it.
        import mpi4py

        # It is started below, if it is the right one; its end waits for all ranks: one that fails would never leave.
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI  # as above
    except (ImportError, RuntimeError) as error:
        return None, f"mpi4py cannot be used ({error})"
    name, starter = MPI.get_vendor()[0], find_starter(os.environ)
    if (name == "Open MPI") != (starter == "Open MPI"):
        # Another's would end the process.
        return None, f"this Python's MPI is {name}, and the processes were started for {starter}"
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    world = MPI.COMM_WORLD
    if world.size != num_workers:
        return None, f"MPI knows {world.size} ranks of {num_workers} workers"
    # Whoever started the ranks has numbered them; the cluster's order is ours.
    ordered = world.Split(0, rank)
    ordered.Barrier()  # All have the memory, and need its name no more.
    _unlink_shared_memory()
    atexit.register(_unlink_shared_memory)  # what came later
    if "TFDIST_LAUNCHED" not in os.environ:  # `mpiexec` takes an end without MPI's for a crash
        atexit.register(_finalize, MPI)
    return ordered, ""


def _unlink_shared_memory() -> None:
    """Removes the names of the memory that MPICH shares among processes, which it leaves behind if it is killed."""
    for path in set(re.findall(r"/dev/shm/mpich_shm_\S+", Path("/proc/self/maps").read_text())):
        with contextlib.suppress(OSError):  # another rank was first
            os.unlink(path)


def _finalize(mpi: Any) -> None:
    """Ends MPI, for which all ranks must come: not if this one ends for a fault, nor for longer than a moment."""
    if not hasattr(sys, "last_value"):
        thread = threading.Thread(target=mpi.Finalize, daemon=True)
        thread.start()
        thread.join(_FINALIZE_SECS)


def _time(
    communicator: Communicator,
    num_bytes: int,
    build: Callable[[Callable[[tf.distribute.ReplicaContext], Any]], Callable[[], Any]],
    collective: CollectiveCommunicator,
) -> float:
    """Returns the seconds of one exchange, the mean over the workers of each one's median."""
    flat = tf.zeros([max(1, num_bytes // 4)])

    exchange = build(lambda outer: communicator.sum_each([flat], outer)[0][0])
    secs = []
    for _ in range(1 + _NUM_TRIES):  # the first one compiles
        start = time.perf_counter()
        exchange()
        secs.append(time.perf_counter() - start)
    own = statistics.median(secs[1:])
    return (
        float(build(lambda outer: collective.sum(tf.constant([own]), outer))()[0]) / communicator.num_workers
    )


def _plain(array: np.ndarray) -> np.ndarray:
    """Returns the same bytes in a type that MPI knows, to be moved and not added up."""
    return array if array.dtype.kind == "f" and array.itemsize > 2 else array.view(np.uint16)
