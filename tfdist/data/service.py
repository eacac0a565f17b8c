"""A tf.data service that prepares a run's training stream: joined where it runs, or started inside the chief."""

from __future__ import annotations

import gc
import uuid
from types import TracebackType
from typing import Any, Protocol

import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster.network_isolation import isolate_port
from tfdist.cluster.ports import PortReservation, check_grpc_server
from tfdist.cluster.spec import Cluster
from tfdist.config.run_config import LOCAL_SERVICE, check_data_service
from tfdist.data.sources.source import ServedSource, Source, StreamSource
from tfdist.errors import ConfigError

_ANSWER_SECS = 10.0
# An endless job, and what its shuffling holds, goes soon after the epoch that it served.
_GC_MS = 10_000


class Loop(Protocol):
    """What the service needs of a strategy's loop."""

    @property
    def num_readers(self) -> int:
        """Processes that read the data."""

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the chief's bytes on every process."""

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""


class DataService:
    """A run's link to a tf.data service. Open while its source is read; every process must make it, and leave it.

    Args:
        name: "local" starts a dispatcher and a worker server in the chief; "HOST:PORT" is a dispatcher that runs.
        loop: The strategy's loop.
        cluster: Who reads.

    Raises:
        ConfigError: If nobody answers at the address, or the readers are on other machines than a local service.
    """

    def __init__(self, name: str, *, loop: Loop, cluster: Cluster) -> None:
        check_data_service(name)
        self._name = name
        self._loop = loop
        self._is_chief = cluster.is_chief
        self._servers: list[Any] = []
        self._num_opened = 0
        if name == LOCAL_SERVICE and loop.num_readers > 1 and not cluster.is_loopback:
            raise ConfigError(
                f"data_service={name!r} can be reached from the chief's machine only, and the cluster has others; "
                "start a tf.data service (tf.data.experimental.service.DispatchServer and WorkerServer), and name its "
                "dispatcher: --data_service=HOST:PORT."
            )
        if name != LOCAL_SERVICE:
            reason = check_grpc_server(name, timeout_secs=_ANSWER_SECS)
            if reason is not None:
                raise ConfigError(
                    f"data_service={name!r}: no tf.data dispatcher answers there within {_ANSWER_SECS:g} s ({reason}); "
                    "start it, correct the address, or take --data_service=local."
                )

    def share(self, source: Source) -> Source:
        """Has the service prepare a stream; returns what this process reads of it, once the service is open.

        Raises:
            ConfigError: If the source is no stream.
        """
        if not isinstance(source, StreamSource):
            raise ConfigError(
                f"data_service={self._name!r} prepares a tf.data.Dataset of examples or a streamed TFDS split; arrays, "
                "examples read by number and a pipeline that shards itself are read by each worker: leave it out."
            )
        return ServedSource(stream=source, num_readers=self._loop.num_readers, serve=self._serve)

    def __enter__(self) -> DataService:
        address, run = self._name, ""
        if self._is_chief:
            run = uuid.uuid4().hex
            if self._name == LOCAL_SERVICE:
                address = self._start()
        told = self._loop.broadcast(f"{address} {run}".encode()).decode()
        self._address, self._run = told.split(" ")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            # A reader that has lost its dispatcher would call for it. None may be left when the chief goes on.
            gc.collect()
            self._loop.all_reduce_sum([1.0])
        while self._servers:
            keras_internals.stop_data_server(self._servers.pop())

    def _start(self) -> str:
        service = tf.data.experimental.service
        with PortReservation(2) as reserved:
            # By number: a proxy is not asked for this one.
            dispatcher, worker = (f"127.0.0.1:{port}" for port in reserved.ports)
            self._servers.append(
                service.DispatchServer(
                    service.DispatcherConfig(
                        port=reserved.ports[0], job_gc_check_interval_ms=_GC_MS, job_gc_timeout_ms=_GC_MS
                    )
                )
            )
            isolate_port(reserved.ports[0])
            self._servers.append(
                service.WorkerServer(
                    service.WorkerConfig(
                        dispatcher_address=dispatcher, worker_address=worker, port=reserved.ports[1]
                    )
                )
            )
            isolate_port(reserved.ports[1])
        return dispatcher

    def _serve(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        self._num_opened += 1
        name = f"tfdist-{self._run}-{self._num_opened}"
        service, address = tf.data.experimental.service, f"grpc://{self._address}"
        if self._is_chief:
            # By the chief alone: a Python function in the pipeline is known in its process only.
            try:
                service.register_dataset(
                    address,
                    dataset,
                    compression=None if self._name == LOCAL_SERVICE else "AUTO",
                    dataset_id=name,
                )
            except tf.errors.OpError as error:
                raise ConfigError(
                    f"data_service={self._name!r} does not take the data set ({error.message.splitlines()[0]}); "
                    f"it must be a tf.data dispatcher of TensorFlow {tf.__version__}."
                ) from error
        self._loop.broadcast(name.encode())
        return service.from_dataset_id(
            service.ShardingPolicy.DYNAMIC,
            address,
            name,
            element_spec=dataset.element_spec,
            job_name=name,
            # Else one worker takes several batches ahead, and the epoch's last steps are the others' empty ones.
            max_outstanding_requests=1,
        )
