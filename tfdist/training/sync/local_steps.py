"""Workers that step each for itself, and how their weights come together: by averages, an outer step, or gossip.

Sources: Lin et al. 2018, "Don't Use Large Mini-Batches, Use Local SGD"; Douillard et al. 2023, "DiLoCo"; Lian et al.
2017, "Can Decentralized Algorithms Outperform Centralized Algorithms?".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives import Communicator, GradientExchange, join, split
from tfdist.config.sync_options import SyncOptions

Build = Callable[[Callable[[tf.distribute.ReplicaContext], Any]], Callable[[], Any]]
# How many exchanges between neighbours come before all workers have heard of a step that was not sound.
GOSSIP_CHECK_STEPS = 32


class LocalSteps:
    """Brings the weights of a model together, whose every worker keeps its own.

    `local_sgd` and `diloco` are one thing: the workers' mean difference from where they last agreed is a gradient, and
    an outer optimizer applies it. With a rate of 1 and no momentum that is the average.

    Args:
        options: How, and how often.
        model: Built.
        communicator: What carries weights.
        build: Makes of a function of the outer replica context one that runs it on this worker's replica, compiled.
        local: Returns this worker's own TensorFlow variable of a Keras variable.
        num_seen: Counts the examples that this worker has trained on by itself.

    Attributes:
        num_bytes: Handed to the communicator since the beginning.
    """

    def __init__(
        self,
        *,
        options: SyncOptions,
        model: keras.Model,
        communicator: Communicator,
        build: Build,
        local: Callable[[keras.Variable], tf.Variable],
        num_seen: tf.Variable,
    ) -> None:
        self._options = options
        self._comm = communicator
        self._weights = [local(v) for v in model.trainable_variables]
        self._slots = _Slots(model, communicator, build, local)
        self._num_seen = num_seen
        self._sums = GradientExchange(communicator, options, self._weights)
        self._anchors = [tf.Variable(w.read_value(), trainable=False) for w in self._weights]
        self._velocities = [
            tf.Variable(tf.zeros(w.shape), trainable=False)
            for w in self._weights
            if options.sync == "diloco" and options.outer_momentum
        ]
        self._average = build(self._average_in)
        self._num_since = 0
        self.num_bytes = 0

    def start(self) -> None:
        """Begins where the weights are now, the same on every worker."""
        for anchor, weight in zip(self._anchors, self._weights, strict=True):
            anchor.assign(weight)
        self._num_seen.assign(0)
        self._num_since = 0

    def after_step(self) -> bool:
        """Exchanges, if a period is over, and tells whether now is the time to compare what went wrong.

        Every worker calls it after each of its steps.
        """
        self._num_since += 1
        self._slots.are_equal = False
        return self._num_since % self._options.num_period_steps == 0 and self._end_period()

    def _end_period(self) -> bool:
        self.agree()
        return True

    def agree(self, *, with_slots: bool = False) -> None:
        """Gives all workers the same weights; every worker calls it.

        Args:
            with_slots: The optimizers' slots too, for a checkpoint: their mean, and the first worker's counters.
        """
        if self._num_since:
            self._average()
            self._num_seen.assign(0)
            self.num_bytes += self._sums.num_bytes
            self._num_since = 0
        if with_slots:
            self.num_bytes += self._slots.agree()

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint must hold besides the model: the outer optimizer's velocities."""
        return {f"sync/velocity_{i}": v.numpy() for i, v in enumerate(self._velocities)}

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `state` returned; what is missing stays as it is."""
        for i, velocity in enumerate(self._velocities):
            if (value := arrays.get(f"sync/velocity_{i}")) is not None:
                velocity.assign(value)

    def _average_in(self, outer: tf.distribute.ReplicaContext) -> Any:
        options, share = self._options, self._share_in(outer)
        momentum = options.outer_momentum if options.sync == "diloco" else 0.0
        rate = options.outer_learning_rate if options.sync == "diloco" else 1.0
        pairs = list(zip(self._anchors, self._weights, strict=True))
        own = [(anchor.read_value() - weight.read_value()) * share for anchor, weight in pairs]
        changes, _ = self._sums.sum(own, range(len(own)), tf.constant(0.0), outer)
        for i, (anchor, weight) in enumerate(pairs):
            change = changes[i]
            if self._velocities:
                velocity = self._velocities[i].assign(momentum * self._velocities[i] + change)
                change = change + momentum * velocity
            weight.assign(anchor.assign(anchor - rate * change))
        return tf.constant(0)

    def _share_in(self, outer: tf.distribute.ReplicaContext) -> Any:
        """Returns this worker's share of the mean: that of the examples that it has seen."""
        seen = tf.cast(tf.reshape(self._num_seen.read_value(), [1]), tf.float32)
        return tf.math.divide_no_nan(seen, self._comm.sum(seen, outer))[0]


class GossipSteps(LocalSteps):
    """At the end of a period each worker averages with some others; all of them agree before a checkpoint alone."""

    def __init__(self, *, build: Build, **shared: Any) -> None:
        super().__init__(build=build, **shared)
        self._build = build
        self._mixes: dict[int, Callable[[], Any]] = {}
        self._num_mixes = 0

    def _end_period(self) -> bool:
        num_workers = self._comm.num_workers
        distance = _distance(self._options.sync_graph, self._num_mixes, num_workers)
        self._num_mixes += 1
        if distance not in self._mixes:
            self._mixes[distance] = self._build(lambda outer: self._mix_in(distance, outer))
        self._mixes[distance]()
        self.num_bytes += _num_bytes(self._weights) * max(
            1, len(neighbours(self._comm.rank, num_workers, distance))
        )
        return self._num_since % (GOSSIP_CHECK_STEPS * self._options.num_period_steps) == 0

    def _mix_in(self, distance: int, outer: tf.distribute.ReplicaContext) -> Any:
        communicator = self._comm
        own = [weight.read_value() for weight in self._weights]
        flat = join(own)
        if distance == 0:
            mixed = communicator.sum(flat, outer) / communicator.num_workers
        else:
            peers = neighbours(communicator.rank, communicator.num_workers, distance)
            share = 1.0 / (1 + len(peers))
            mixed = flat
            for peer in peers:
                mixed += share * (communicator.sum_with(flat, peer) - 2.0 * flat)
        for weight, value in zip(self._weights, split(mixed, own), strict=True):
            weight.assign(value)
        return tf.constant(0)

    def _share_in(self, outer: tf.distribute.ReplicaContext) -> Any:
        """Returns the same share for all: gossip keeps the plain mean as it is, whoever has seen more."""
        return tf.constant(1.0 / self._comm.num_workers)


class _Slots:
    """The optimizers' variables, each worker's own between two checkpoints.

    Attributes:
        are_equal: Whether nothing has changed since the workers agreed.
    """

    def __init__(
        self,
        model: keras.Model,
        communicator: Communicator,
        build: Build,
        local: Callable[[keras.Variable], tf.Variable],
    ) -> None:
        optimizers = keras_internals.find_optimizers(model)
        found = {id(v): v for optimizer in optimizers for v in optimizer.variables}
        self._variables = [local(v) for v in found.values()]
        self._comm = communicator
        self._agree = build(self._agree_in)
        self.are_equal = True

    def agree(self) -> int:
        """Gives all workers their mean, and the first worker's counters; returns the bytes that crossed."""
        if self.are_equal or not self._variables:
            return 0
        self._agree()
        self.are_equal = True
        return _num_bytes(self._variables)

    def _agree_in(self, outer: tf.distribute.ReplicaContext) -> Any:
        first = self._comm.rank == 0
        for slot in self._variables:
            own = slot.read_value()
            if slot.dtype.is_floating and slot.shape.rank > 0:
                mean = self._comm.sum(own, outer) / tf.cast(self._comm.num_workers, slot.dtype)
            else:
                mean = self._comm.sum(own if first else tf.zeros_like(own), outer)
            slot.assign(mean)
        return tf.constant(0)


def neighbours(rank: int, num_workers: int, distance: int) -> list[int]:
    """Returns whom a worker averages with: at that distance, if not 0, on both sides in a ring.

    In an order in which nobody waits for ever.
    """
    if distance == 0 or num_workers == 1:
        return []
    edges = {tuple(sorted((rank, (rank + d) % num_workers))) for d in (distance, -distance)}
    # All go through the edges in one order: of those not done, both ends of the first have done all before it.
    ordered = sorted(edges, key=lambda edge: (edge[0] // distance % 2, edge))
    return [b if a == rank else a for a, b in ordered]


def _distance(graph: str, number: int, num_workers: int) -> int:
    """Returns how far apart the workers are that average in an exchange; 0: all do."""
    if graph == "complete":
        return 0
    if graph == "ring":
        return 1
    return int(2 ** (number % max(1, math.ceil(math.log2(num_workers)))))


def _num_bytes(variables: Sequence[tf.Variable]) -> int:
    return sum(v.shape.num_elements() * v.dtype.size for v in variables)
