"""Workers that step by themselves, as threads that sum through memory: who averages with whom, and what is kept."""

import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist.collectives.communicator import join, split
from tfdist.config.sync_options import SyncOptions
from tfdist.training.sync.local_steps import GossipSteps, LocalSteps, neighbours


class Memory:
    """Carries between threads what `MpiCommunicator` carries between processes."""

    name = "memory"

    def __init__(self, rank, parts, barrier):
        self.rank, self.num_workers = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def sum(self, value, outer=None, *, may_overwrite=False):
        del outer, may_overwrite
        self._parts[self.rank] = value.numpy()
        self._barrier.wait(timeout=30)
        total = sum(self._parts)
        self._barrier.wait(timeout=30)
        return tf.constant(total)

    def sum_each(self, values, outer=None):
        return split(self.sum(join(values), outer), values)

    def sum_with(self, value, peer):
        # All go through their peers in step, though not the same number of them: see `exchange`.
        self._parts[self.rank] = value.numpy()
        self._barrier.wait(timeout=30)
        total = self._parts[self.rank] + self._parts[peer]
        self._barrier.wait(timeout=30)
        return tf.constant(total)


def build_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def in_threads(num_workers, options, work):
    """Returns what `work(rank, model, steps)` returns on each worker."""
    models = [build_model() for _ in range(num_workers)]
    parts, barrier = [None] * num_workers, threading.Barrier(num_workers)

    def run(rank):
        steps = (GossipSteps if options.sync == "gossip" else LocalSteps)(
            options=options,
            model=models[rank],
            communicator=Memory(rank, parts, barrier),
            build=lambda function: lambda: function(None),
            local=lambda variable: variable.value,
            num_seen=tf.Variable(0, dtype=tf.int64),
        )
        steps.start()
        return work(rank, models[rank], steps)

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(run, range(num_workers)))


@pytest.mark.parametrize(("graph", "distances"), [("ring", [1, 1, 1]), ("exponential", [1, 2, 1])])
def test_gossip_takes_the_graphs_neighbours_in_turn(graph, distances):
    """Of four workers, where neighbours at distance two are others than those at one."""
    start = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")

    def work(rank, model, steps):
        kernel = model.trainable_variables[0]
        kernel.assign(start[rank])
        for _ in distances:
            steps.after_step()
        return kernel.numpy()

    found = in_threads(4, SyncOptions(sync="gossip", sync_graph=graph), work)
    wanted = start
    for distance in distances:
        circles = [[rank, *neighbours(rank, 4, distance)] for rank in range(4)]
        wanted = np.stack([wanted[circle].mean(0) for circle in circles])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_checkpoint_gets_the_mean_of_slots_and_one_counter():
    def work(rank, model, steps):
        model.optimizer.iterations.assign(7)
        (momentum, *_) = [v for v in model.optimizer.variables if "momentum" in v.path]
        momentum.assign(np.full(momentum.shape, 10.0 * rank))
        steps.after_step()
        steps.agree(with_slots=True)
        return momentum.numpy(), int(model.optimizer.iterations.numpy())

    for momentum, iterations in in_threads(3, SyncOptions(sync="diloco", sync_period=5), work):
        np.testing.assert_array_equal(momentum, np.full((3, 2), 10.0))
        assert iterations == 7
