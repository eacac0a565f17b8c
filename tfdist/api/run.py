"""A program's handle on its cluster: Keras's `fit`, `evaluate` and `predict` over all of its tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.api.arguments import FitArguments, read_data
from tfdist.api.fitting import Fitting
from tfdist.api.former import takes_former_names
from tfdist.api.run_state import RunState
from tfdist.cluster.membership import Membership
from tfdist.cluster.spec import Cluster, Task
from tfdist.config.privacy_options import PrivacyOptions
from tfdist.config.ps_options import PsOptions
from tfdist.config.sync_options import SyncOptions
from tfdist.runtime.strategies import StagedStrategy
from tfdist.training.checkpoint.owners import blocks_to_save, sharing_state
from tfdist.training.checkpoint.snapshot import Snapshot
from tfdist.training.checkpoint.state import state_array
from tfdist.training.checkpoint.store import Checkpoints
from tfdist.training.loop import plan_steps
from tfdist.training.monitoring.callbacks import split_callbacks
from tfdist.training.plan import BatchPlan


class Run:
    """A program's handle on its cluster.

    Examples:
        >>> import keras, numpy, tfdist
        >>> run = tfdist.initialize(strategy="one_device")
        >>> run.strategy_name, run.is_chief
        ('one_device', True)
        >>> with run.strategy.scope():
        ...     model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        ...     model.compile(keras.optimizers.SGD(0.1), "mse")
        >>> x = numpy.ones((100, 1))
        >>> history = run.fit(model, x, 3 * x, batch_size=10, epochs=5, verbose=0)
        >>> run.evaluate(model, x, 3 * x, batch_size=10, verbose=0) < 0.01
        True
        >>> run.predict(model, x, batch_size=10).shape
        (100, 1)
    """

    def __init__(self, state: RunState) -> None:
        self._state = state

    @property
    def strategy(self) -> tf.distribute.Strategy | StagedStrategy:
        """TensorFlow's, or what stands for it under `pipeline`: build and compile the model inside its `scope()`."""
        return self._state.strategy

    @property
    def strategy_name(self) -> str:
        """Its name: `one_device`, `mirrored`, `multiworker`, `ps` or `pipeline`."""
        return self._state.strategy_name

    @property
    def cluster(self) -> Cluster:
        """Which processes take part."""
        return self._state.cluster

    @property
    def seed(self) -> int:
        """Of order, initial weights and random layers."""
        return self._state.seed

    def join(self, members: Membership, carried: Snapshot | None) -> None:
        """Lets `fit` watch for changes of the cluster, and go on from what this process has brought along.

        Args:
            members: Of this run's cluster.
            carried: The state that `Regroup` carried; None for a process that is new.
        """
        self._state.members, self._state.carried = members, carried

    @property
    def task(self) -> Task | None:
        """Which task this process is; None where it is alone."""
        return self.cluster.task

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes."""
        return self.cluster.is_chief

    # Long: its arguments, one a line, twice.
    @takes_former_names
    def fit(
        self,
        model: keras.Model,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        *,
        checkpoints: Checkpoints | None = None,
        on_nan: str = "ignore",
        max_loss_spike: float | None = None,
        drop_remainder: bool = False,
        shard: str = "auto",
        data_service: str | None = None,
        steps_per_loop: int | None = None,
        jit_compile: str | None = None,
        sync: str | SyncOptions = "every_step",
        ps: str | PsOptions = "async",
        privacy: PrivacyOptions | None = None,
    ) -> keras.callbacks.History:
        """Trains as `keras.Model.fit` does, over the whole cluster, with its arguments in its order.

        Args:
            model: Compiled, made inside `strategy.scope()`.
            x: All that `keras.Model.fit` takes: arrays, lists, dicts, data frames, a generator, a
                `keras.utils.PyDataset`, a PyTorch `DataLoader` or a batched `tf.data.Dataset`, whose batches are the
                global ones. Besides these a `tf.data.Dataset` of examples with a `batch_size`, a TFDS split, an object
                whose `__getitem__` returns one example, as a `tfds.data_source` or a PyTorch dataset does, a
                callable `InputContext → Dataset` of per-replica batches, and arrays `(x, y)` or `(x, y, sample_weight)`
                in one tuple. A generator or `DataLoader` runs on each worker, and must yield the same everywhere.
            y: Targets, of arrays.
            batch_size: Examples of an optimizer step over all replicas. None: 32, or as many as the data's batches
                have; a `tf.data.Dataset` is one of batches then, and of examples otherwise.
            epochs: Epoch to stop at.
            verbose: 0, 1, 2 or "auto".
            callbacks: Keras callbacks; those that write run on the chief alone.
            validation_split: Share of the arrays, from their end, to validate on.
            validation_data: `(x, y)`, `(x, y, sample_weight)`, or all else that `x` may be.
            shuffle: False keeps the data's own order; that of a batched `tf.data.Dataset` is always kept.
            class_weight: Class → weight.
            sample_weight: One weight per example, of arrays.
            initial_epoch: Epoch to start at.
            steps_per_epoch: None: until each example was seen once. An epoch of fewer steps than the data leaves the
                rest to the next, as in Keras; with the data the epoch ends, with Keras's warning if it has fewer steps.
            validation_steps: Batches to validate on; None: all.
            validation_batch_size: Default: `batch_size`.
            validation_freq: Validate every so many epochs, or at the 1-based epochs of a sequence.
            checkpoints: Where to keep the state. If a checkpoint lies there already, training goes on from it,
                inside an epoch too, as if it had never stopped; `epochs` is the total.
            on_nan: What to do with a step whose loss or gradients are NaN or infinite. "ignore" applies it, as Keras
                does. Otherwise it changes nothing, as if its batch were not in the data: no weights, metrics,
                iterations or random streams. "stop" ends the run; "skip" warns and goes on; "rollback" goes on with
                the weights of the last checkpoint, behind the batches since, at most three times from the same one.
                Of several optimizers in a step of the model's own, those before the one with the fault have stepped.
                Under `ps` a batch that is left out of accumulated gradients counts as zeros in their mean.
            max_loss_spike: A loss more than this many times its mean over about 20 steps counts as such a step.
            drop_remainder: Leave out a pass's last batch if it is short.
            shard: How workers share a stream of examples. "off": each reads all of it and takes its part of every
                batch. "file" or "data": each reads its own files, or examples, so that batches differ from those of one
                process; every example still comes once an epoch. "auto": "file" for TFDS splits with a file for each
                worker.
            data_service: A tf.data service prepares the stream of examples, and hands each batch to whichever
                worker asks next; `shard` then holds for `validation_data` alone. "local": the chief serves, to this
                machine. "HOST:PORT": the dispatcher of a service that was started elsewhere, which must see the
                same files, and cannot run Python functions of a pipeline; with several of its workers a pipeline
                must not `zip` data sets. Each example comes once an epoch, in an order that no seed repeats, and in
                batches that differ from those of one process. A resumed epoch leaves out as many batches as were
                trained on, not the same ones: some examples come twice and some not at all. If a worker or a server
                fails, what it held is lost to the epoch.
            steps_per_loop: Steps in one call of a graph: worth it where a step takes a few milliseconds, of which
                Python is about one. The weights are the same, bit for bit; callbacks hear of a loop's steps after its
                last one. Logs and checkpoints come at their steps all the same: steps before them are made one by one,
                as are those of data of unknown length. None: `compile(steps_per_execution=…)` if it is more than 1;
                else four from the second epoch on, if by the first one's times that pays for compiling them. Under
                `ps`, steps that a worker makes between two words with the chief; None: as many as keep the time lost to
                dispatch small, at most 16.
            jit_compile: "on" lets XLA compile forward and backward pass, "off" does not. "auto" compiles on GPUs if the
                model can be; on CPUs it times both ways at first and takes the faster (so that two runs may differ by
                rounding). None: as `compile` says under `one_device`; else "auto" on GPUs, "off" on CPUs. A pass's last
                batch, if it is short, is computed without. Not under `ps`.
            sync: Under `multiworker`, how workers share what they learn: one of `tfdist.config.sync_options.SYNCS`, or
                `tfdist.SyncOptions(…)` for all there is to choose. Only "every_step", and without a narrower type or
                compression, has the answer of one device.
            ps: Under `ps`, whether workers step each for itself ("async") or all together ("sync"), or
                `tfdist.PsOptions(…)` for all there is to choose.
            privacy: `tfdist.PrivacyOptions(…)` trains with differential privacy (DP-SGD), under all strategies but
                `ps`: the logs of each epoch have `epsilon`, what this model was trained with in this run before
                included. None: without.

        Returns:
            The history, equal on every task that runs the program.

        Raises:
            ConfigError: If something asked for cannot be honoured.
            NonFiniteError: If `on_nan` says "stop", or the numbers stay wrong all the same; it names the step, the
                layer and the examples.
            Preempted: A `SystemExit` with code 143: a process was told to end by SIGTERM, and `checkpoints` hold
                the state.
        """
        arguments = FitArguments(
            model=model,
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
            checkpoints=checkpoints,
            on_nan=on_nan,
            max_loss_spike=max_loss_spike,
            drop_remainder=drop_remainder,
            shard=shard,
            data_service=data_service,
            steps_per_loop=steps_per_loop,
            jit_compile=jit_compile,
            sync=sync,
            ps=ps,
            privacy=privacy,
        )
        return Fitting(self._state, arguments).run()

    @takes_former_names
    def evaluate(
        self,
        model: keras.Model,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        *,
        shard: str = "auto",
    ) -> Any:
        """Evaluates on each example once, as `keras.Model.evaluate` does.

        Args:
            model: Compiled, made inside `strategy.scope()`.
            x: As for `fit`.
            y: Targets, of arrays.
            batch_size: As for `fit`.
            verbose: 0 prints nothing, all else a line on the chief.
            sample_weight: One weight per example, of arrays.
            steps: None: all the data.
            callbacks: Hear of the beginning and the end, not of each batch.
            return_dict: False returns a list in Keras's order, or one number.
            shard: As for `fit`.

        Returns:
            Metric name → value, or the values, on every task that runs the program.
        """
        source, size = read_data(model, x, y, sample_weight, batch_size=batch_size)
        loop = self._state.find_loop(model, source)
        source = loop.shard_source_of(source, shard)
        plan = BatchPlan(global_batch_size=size, num_steps=plan_steps(source, size, steps))
        given, _ = split_callbacks(callbacks, is_chief=self.is_chief)
        callback_list = keras.callbacks.CallbackList(given, model=model)
        with self._state.working():
            callback_list.on_test_begin()
            logs = loop.evaluate(source, plan)
            callback_list.on_test_end(logs)
        if verbose != 0 and self.is_chief:
            print("evaluation:", *(f"{name} {value}" for name, value in logs.items()), flush=True)
        return logs if return_dict else keras_internals.flatten_logs(model, logs)

    @takes_former_names
    def predict(
        self,
        model: keras.Model,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Returns the model's outputs, `[examples, …]`, in the data's order, on every task that runs the program.

        Args:
            model: Made inside `strategy.scope()`.
            x: As for `fit`; targets are ignored.
            batch_size: As for `fit`.
            verbose: As in `keras.Model.predict`; nothing is printed.
            steps: None: all the data.
            callbacks: Hear of the beginning and the end, not of each batch.
        """
        del verbose
        source, size = read_data(model, x, batch_size=batch_size)
        loop = self._state.find_loop(model, source, is_trained=False)
        plan = BatchPlan(global_batch_size=size, num_steps=plan_steps(source, size, steps))
        given, _ = split_callbacks(callbacks, is_chief=self.is_chief)
        callback_list = keras.callbacks.CallbackList(given, model=model)
        with self._state.working():
            callback_list.on_predict_begin()
            outputs = loop.predict(source, plan)
            callback_list.on_predict_end()
        return outputs

    def build(self, model: keras.Model, data: Any, batch_size: int | None = None) -> None:
        """Creates the model's variables, its optimizer's too, before the first step (to restore them, say).

        Args:
            model: Compiled, made inside `strategy.scope()`.
            data: As `fit`'s `x`; two examples are read.
            batch_size: As for `fit`.
        """
        self._state.find_loop(model, read_data(model, data, batch_size=batch_size)[0])

    def get_weights(self, model: keras.Model) -> list[np.ndarray]:
        """Returns the weights as `model.get_weights` does, wherever they are; every task calls it.

        Args:
            model: A built model.

        Returns:
            On the chief all of them, on other tasks none.

        Examples:
            >>> import keras, tfdist
            >>> run = tfdist.initialize(strategy="one_device")
            >>> with run.strategy.scope():
            ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
            >>> [weight.shape for weight in run.get_weights(model)]
            [(2, 3), (3,)]
        """
        with sharing_state(model):
            return [state_array(model, weight).read() for weight in model.weights] if self.is_chief else []

    def save(self, model: keras.Model, path: str | Path) -> None:
        """Writes the model on the chief, as `model.save` does, in blocks; every task calls it.

        Args:
            model: A built model.
            path: A `.keras` file for plain Keras; it is whole, or what it was before.
        """
        with sharing_state(model):
            if self.is_chief:
                self._save(model, Path(path))

    def _save(self, model: keras.Model, path: Path) -> None:
        # Keras tells the format by the name's end.
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            with keras_internals.saving_in_blocks(blocks_to_save(model)):
                model.save(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def wait_for_others(self) -> None:
        """Returns once every process that runs the program has called it, so that none leaves while another writes."""
        with self._state.working():
            pass  # All leave it together.
