"""`initialize` and the `Run` it returns: which loop, which role, what to build first."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.cluster.membership import Membership
from tfdist.cluster.ports import check_reachable, meet_peers
from tfdist.cluster.spec import Cluster, Task, canonical_strategy, check_strategy
from tfdist.config.ps_options import PsOptions
from tfdist.config.run_config import check_deterministic, check_jit
from tfdist.config.sync_options import SyncOptions
from tfdist.data import ShardedSource, Source, build_source, hold_out
from tfdist.data.read_errors import readable_faults
from tfdist.data.service import DataService
from tfdist.errors import ConfigError, PeerLost, Regroup
from tfdist.layers import Embedding
from tfdist.optimizers import describe_dense_rows, with_sparse_rows
from tfdist.runtime.devices import configure_devices, take_gpus
from tfdist.runtime.server import isolate_server, prepare_server, serve
from tfdist.runtime.strategies import build_strategy, is_peer_loss
from tfdist.training.checkpoint.saver import Saver
from tfdist.training.checkpoint.snapshot import Snapshot
from tfdist.training.checkpoint.state import blocks_of_large
from tfdist.training.checkpoint.store import Checkpoints
from tfdist.training.first_batch import check_elements, read_first_batch
from tfdist.training.loop import FitOptions, Loop, plan_steps, run_fit
from tfdist.training.monitoring.callbacks import split_callbacks
from tfdist.training.on_nan import OnNan
from tfdist.training.plan import BatchPlan
from tfdist.training.ps.loop import CoordinatorLoop
from tfdist.training.sync.loop import SyncLoop

_log = logging.getLogger("tfdist")
# A smaller table costs no time to speak of, whatever the optimizer does to it.
_MANY_ROWS = 100_000
# Models whose functions are kept: those of a run that takes turns.
_MAX_LOOPS = 8


def initialize(
    *,
    strategy: str | None = None,
    num_replicas: int | None = None,
    seed: int = 0,
    cluster: Cluster | None = None,
    mixed_precision: str | None = None,
    start_timeout_secs: float = 300.0,
    gpu_memory_gb: float | None = None,
    deterministic: bool = False,
) -> Run:
    """Joins the cluster and builds the strategy. Worker and ps tasks of a `ps` run serve here and never return.

    Args:
        strategy: `one_device`, `mirrored`, `multiworker`, `ps` or an alias; None takes what the launcher was told,
            else `multiworker` in a cluster of workers, `ps` in one with ps tasks, `one_device` alone.
        num_replicas: Replicas of `mirrored`; None means every GPU, or two CPU replicas.
        seed: Seeds Python, NumPy, TensorFlow and Keras alike on every task.
        cluster: None reads it from the environment.
        mixed_precision: `bfloat16` or `float16` computes in it, with float32 variables.
        start_timeout_secs: Longest wait for the other tasks, in seconds; TensorFlow itself would wait for an hour.
        gpu_memory_gb: What this process may take of each GPU (10**9 bytes), where several replicas of `mirrored` share
            one each of them; None: what it needs.
        deterministic: Let TensorFlow run deterministic operations alone, so that the same program gives the same bits
            on GPUs too; steps are slower then, without XLA, and their times are not taken.

    Returns:
        The run, on tasks that run the program.

    Raises:
        ConfigError: If the strategy does not fit the cluster.
        ClusterError: If this task's port is taken, or other tasks do not answer in time.
    """
    cluster = cluster or detect_cluster(os.environ, strategy=strategy) or Cluster()
    name = canonical_strategy(strategy or os.environ.get("TFDIST_STRATEGY") or _default_strategy(cluster))
    if cluster.is_local and name in ("multiworker", "ps"):
        raise ConfigError(
            f"strategy {name!r} needs a cluster, and this process is alone; start it with "
            f"'python -m tfdist.launch --strategy={name} --num_workers=2 your_script.py', or set TF_CONFIG."
        )
    check_strategy(cluster, name)
    check_deterministic(name, deterministic)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    take_gpus(cluster, name)
    if cluster.only_serves(name):
        serve(cluster, start_timeout_secs=start_timeout_secs)
    heartbeat = Heartbeat.from_environment(os.environ)
    prepare_server(cluster, name)
    configure_devices(strategy=name, num_replicas=num_replicas, gpu_memory_gb=gpu_memory_gb)
    keras.utils.set_random_seed(seed)
    if mixed_precision:
        keras.mixed_precision.set_dtype_policy(f"mixed_{mixed_precision}")
    if name == "multiworker":
        meet_peers(cluster, timeout_secs=start_timeout_secs)
    isolate_server(cluster)
    if name == "ps":
        servers = [t for t in cluster.tasks if t.type != "chief"]
        check_reachable(cluster, timeout_secs=start_timeout_secs, tasks=servers)
    built = build_strategy(strategy=name, cluster=cluster, num_replicas=num_replicas)
    return Run(strategy=built, strategy_name=name, cluster=cluster, seed=seed, heartbeat=heartbeat)


def _default_strategy(cluster: Cluster) -> str:
    if cluster.num_ps:
        return "ps"
    return "one_device" if cluster.is_single else "multiworker"


class Run:
    """A program's handle on its cluster.

    Attributes:
        strategy: Build and compile the model inside `strategy.scope()`.
        strategy_name: Canonical name.
        cluster: All tasks.
        seed: Of order, initial weights and random layers.
    """

    def __init__(
        self,
        *,
        strategy: tf.distribute.Strategy,
        strategy_name: str,
        cluster: Cluster,
        seed: int,
        heartbeat: Heartbeat,
    ) -> None:
        self._heartbeat = heartbeat
        self._members: Membership | None = None
        self._carried: Snapshot | None = None
        self.strategy = strategy
        self.strategy_name = strategy_name
        self.cluster = cluster
        self.seed = seed
        self._loops: dict[int, tuple[Any, Loop]] = {}
        self._coordinator: tf.distribute.coordinator.ClusterCoordinator | None = None

    def join(self, members: Membership, carried: Snapshot | None) -> None:
        """Lets `fit` watch for changes of the cluster, and go on from what this process has brought along.

        Args:
            members: Of this run's cluster.
            carried: The state that `Regroup` carried; None for a process that is new.
        """
        self._members, self._carried = members, carried

    @property
    def task(self) -> Task | None:
        """Which task this process is; None where it is alone."""
        return self.cluster.task

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes."""
        return self.cluster.is_chief

    def fit(
        self,
        model: keras.Model,
        train: Any,
        *,
        global_batch_size: int,
        epochs: int = 1,
        validation_data: Any = None,
        validation_split: float = 0.0,
        validation_batch_size: int | None = None,
        validation_steps: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        callbacks: Any = None,
        steps_per_epoch: int | None = None,
        initial_epoch: int = 0,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        verbose: int | str = "auto",
        checkpoints: Checkpoints | None = None,
        on_nan: str = "ignore",
        max_loss_spike: float | None = None,
        drop_remainder: bool = False,
        shard: str = "auto",
        data_service: str | None = None,
        ps_mode: str = "async",
        steps_per_loop: int | None = None,
        max_staleness: int | None = None,
        staleness_lr: str | None = None,
        num_backup_workers: int = 0,
        sync: str | SyncOptions = "every_step",
        jit_compile: str | None = None,
    ) -> keras.callbacks.History:
        """Trains as `keras.Model.fit` does, over the whole cluster.

        Args:
            model: Compiled, made inside `strategy.scope()`.
            train: Arrays `(x, y)`, a `tf.data.Dataset` of examples (not of batches), a TFDS split, an object whose
                `__getitem__` returns one example, as a `tfds.data_source` or a PyTorch dataset does, or a
                callable `InputContext → Dataset` of per-replica batches.
            global_batch_size: Examples per optimizer step over all replicas.
            epochs: Epoch to stop at.
            validation_data: As `train`.
            validation_split: Share of the arrays in `train`, from their end, to validate on instead.
            validation_batch_size: Default: `global_batch_size`.
            validation_steps: Batches to validate on; None: all.
            validation_freq: Validate every so many epochs, or at the 1-based epochs of a sequence.
            callbacks: Keras callbacks; those that write run on the chief alone.
            steps_per_epoch: None: until each example was seen once. An epoch of fewer steps than the data leaves the
                rest to the next, as in Keras; with the data the epoch ends, with Keras's warning if it has fewer steps.
            initial_epoch: Epoch to start at.
            shuffle: False keeps the data's own order.
            class_weight: Class → weight.
            sample_weight: One weight per example.
            verbose: 0, 1, 2 or "auto".
            checkpoints: Where to keep the state. If a checkpoint lies there already, training goes on from it,
                inside an epoch too, as if it had never stopped; `epochs` is the total.
            on_nan: What to do with a step whose loss or gradients are NaN or infinite. "ignore" applies it, as Keras
                does. Otherwise it changes nothing, as if its batch were not in the data: no weights, metrics,
                iterations or random streams. "stop" ends the run; "skip" warns and goes on; "rollback" goes on with
                the weights of the last checkpoint, behind the batches since, at most three times from the same one.
                Of several optimizers in a step of the model's own, those before the one with the fault have stepped.
                Under `ps` a batch that is left out of accumulated gradients counts as zeros in their mean.
            max_loss_spike: A loss more than this many times its mean over about 20 steps counts as such a step.
            shard: How workers share a stream. "off": each reads all of it and takes its part of every batch. "file"
                or "data": each reads its own files, or examples, so that batches differ from those of one process;
                every example still comes once an epoch. "auto": "file" for TFDS splits with a file for each worker.
            drop_remainder: Leave out a pass's last batch if it is short.
            data_service: A tf.data service prepares the stream `train`, and hands each batch of examples to whichever
                worker asks next; `shard` then holds for `validation_data` alone. "local": the chief serves, to this
                machine. "HOST:PORT": the dispatcher of a service that was started elsewhere, which must see the
                same files, and cannot run Python functions of a pipeline; with several of its workers a pipeline
                must not `zip` data sets. Each example comes once an epoch, in an order that no seed repeats, and in
                batches that differ from those of one process. A resumed epoch leaves out as many batches as were
                trained on, not the same ones: some examples come twice and some not at all. If a worker or a server
                fails, what it held is lost to the epoch.
            ps_mode: Under `ps`, "async" lets each worker step for itself, on whole batches. "sync" divides each batch
                among the workers, adds their gradients up, and steps once: the weights are those of one device. It
                needs one optimizer, and a loss that divides by examples alone.
            steps_per_loop: Steps in one call of a graph: worth it where a step takes a few milliseconds, of which
                Python is about one. The weights are the same, bit for bit; callbacks hear of a loop's steps after its
                last one. Logs and checkpoints come at their steps all the same: steps before them are made one by one,
                as are those of data of unknown length. None: four from the second epoch on, if by the first one's times
                that pays for compiling them. Under `ps`, steps that a worker makes between two words with the chief;
                None: as many as keep the time lost to dispatch small, at most 16.
            max_staleness: Under `ps`, most optimizer steps of other workers between a gradient's reading of the weights
                and its applying (stale-synchronous, Ho et al. 2013); 0: one step at a time. None: any number.
            staleness_lr: Under `ps`, "inverse" multiplies the learning rate of each update by 1 / (1 + its staleness)
                (Zhang et al. 2016).
            num_backup_workers: Under `ps_mode="sync"`, a step does not wait for the last so many workers (Chen et al.
                2016). Their parts are dropped, mostly in every step, also where none of them is slow: the step is that
                of a smaller batch, and the epoch one without these examples, which the run's metrics count as
                `num_dropped`. 0: every example counts. A worker that hangs may hold up the others all the same.
            sync: Under `multiworker`, how workers share what they learn: one of `tfdist.config.sync_options.SYNCS`, or
                `tfdist.SyncOptions(…)` for all there is to choose. Only "every_step", and without a narrower type or
                compression, has the answer of one device.
            jit_compile: "on" lets XLA compile forward and backward pass, "off" does not. "auto" compiles on GPUs if the
                model can be; on CPUs it times both ways at first and takes the faster (so that two runs may differ by
                rounding). None: as `compile` says under `one_device`; else "auto" on GPUs, "off" on CPUs. A pass's last
                batch, if it is short, is computed without. Not under `ps`.

        Returns:
            The history, equal on every task that runs the program.

        Raises:
            ConfigError: If something asked for cannot be honoured.
            NonFiniteError: If `on_nan` says "stop", or the numbers stay wrong all the same; it names the step, the
                layer and the examples.
            Preempted: A `SystemExit` with code 143: a process was told to end by SIGTERM, and `checkpoints` hold
                the state.
        """
        ps_options = PsOptions(
            mode=ps_mode,
            steps_per_loop=steps_per_loop,
            max_staleness=max_staleness,
            staleness_lr=staleness_lr,
            num_backup_workers=num_backup_workers,
        )
        ps_options.check_strategy(self.strategy_name)
        if validation_split and validation_data is None:
            rest, validation_data = hold_out(
                build_source(train, sample_weight=sample_weight), validation_split
            )
            source = build_source(rest, class_weight=class_weight)
        else:
            source = build_source(train, class_weight=class_weight, sample_weight=sample_weight)
        validation = None if validation_data is None else build_source(validation_data)
        loop = self._loop(model, source)
        if validation is not None:
            check_elements(model, validation, shares=self._shares_batches)
        if isinstance(loop, CoordinatorLoop):
            loop.configure(ps_options)
        sync_options = SyncOptions(sync=sync) if isinstance(sync, str) else sync
        self._check_sync(sync_options)
        if self.strategy_name != "ps":
            steps_per_loop = self._choose_loop(steps_per_loop, on_nan, max_loss_spike)
        check_jit(self.strategy_name, jit_compile)
        if isinstance(loop, SyncLoop):
            reason = loop.configure(sync_options)
            lines = [reason, loop.choose_compiler(jit_compile, source, global_batch_size)]
            if self.is_chief and verbose != 0:
                print("".join(f"tfdist: {line}\n" for line in lines if line), end="", flush=True)
        service: DataService | None = None
        if data_service is None:
            source = loop.shard_source_of(source, shard)
        else:
            service = DataService(data_service, loop=loop, cluster=self.cluster)
            source = service.share(source)
        validation = None if validation is None else loop.shard_source_of(validation, shard)
        _check_batch(global_batch_size, loop.num_replicas)
        self._check_callbacks(callbacks)
        given, _ = split_callbacks(callbacks, is_chief=self.is_chief)
        steps = plan_steps(source, global_batch_size, steps_per_epoch, drop_remainder=drop_remainder)
        callback_list = keras.callbacks.CallbackList(
            [*given, *self._progress(given, verbose)], add_history=True, model=model
        )
        callback_list.set_params(
            {
                "epochs": epochs,
                "steps": steps,
                "verbose": verbose,
                "global_batch_size": global_batch_size,
                "input_wait": lambda: loop.input_wait.share,
                "measures": loop.measures,
            }
        )
        options = FitOptions(
            global_batch_size=global_batch_size,
            epochs=epochs,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch or steps,
            shuffle=shuffle,
            seed=self.seed,
            validation_batch_size=validation_batch_size or global_batch_size,
            validation_steps=validation_steps,
            validation_freq=validation_freq,
            shown=verbose not in (0, 2),
            drop_remainder=drop_remainder,
            steps_per_loop=steps_per_loop,
        )
        saver = Saver(
            checkpoints=checkpoints,
            loop=loop,
            model=model,
            callbacks=callback_list,
            is_chief=self.is_chief,
            say=_log.info if verbose == 0 else functools.partial(print, flush=True),
            num_steps=steps,
            order={
                "num_examples": source.num_examples,
                "global_batch_size": global_batch_size,
                "seed": self.seed,
                "shuffle": shuffle,
                "drop_remainder": drop_remainder,
                "num_parts": loop.num_readers if isinstance(source, ShardedSource) else 1,
            },
            members=self._members,
            carried=self._carried,
        )
        on_nan_step = OnNan(
            policy=on_nan,
            max_loss_spike=max_loss_spike,
            loop=loop,
            model=model,
            source=source,
            saver=saver,
            is_chief=self.is_chief,
        )
        answering: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.strategy_name != "one_device":
            answering = keras_internals.answering_alone(model, self.strategy)
        with self._working(), service or contextlib.nullcontext(), answering, saver:
            run_fit(
                loop=loop,
                model=model,
                source=source,
                validation=validation,
                options=options,
                callbacks=callback_list,
                saver=saver,
                heartbeat=self._heartbeat,
                on_nan=on_nan_step,
            )
        return model.history

    def evaluate(
        self,
        model: keras.Model,
        data: Any,
        *,
        global_batch_size: int = 256,
        steps: int | None = None,
        sample_weight: Any = None,
        return_dict: bool = True,
        shard: str = "auto",
    ) -> Any:
        """Evaluates on each example once.

        Args:
            model: Compiled, made inside `strategy.scope()`.
            data: As for `fit`.
            global_batch_size: Examples per step over all replicas.
            steps: None: all the data.
            sample_weight: One weight per example.
            return_dict: False returns a list in the order of the dict.
            shard: As for `fit`.

        Returns:
            Metric name → value, on every task that runs the program.
        """
        source = build_source(data, sample_weight=sample_weight)
        loop = self._loop(model, source)
        source = loop.shard_source_of(source, shard)
        num_steps = plan_steps(source, global_batch_size, steps)
        with self._working():
            logs = loop.evaluate(source, BatchPlan(global_batch_size=global_batch_size, num_steps=num_steps))
        return logs if return_dict else list(logs.values())

    def predict(
        self, model: keras.Model, data: Any, *, global_batch_size: int = 256, steps: int | None = None
    ) -> Any:
        """Returns the model's outputs, `[examples, …]`, in the data's order, on every task that runs the program.

        Args:
            model: Made inside `strategy.scope()`.
            data: As for `fit`; targets are ignored. A bare array is `x`.
            global_batch_size: Examples per step over all replicas.
            steps: None: all the data.
        """
        source = build_source(data)
        loop = self._loop(model, source, is_trained=False)
        num_steps = plan_steps(source, global_batch_size, steps)
        with self._working():
            return loop.predict(source, BatchPlan(global_batch_size=global_batch_size, num_steps=num_steps))

    def build(self, model: keras.Model, data: Any) -> None:
        """Creates the model's variables, its optimizer's too, before the first step (to restore them, say).

        Args:
            model: Compiled, made inside `strategy.scope()`.
            data: As for `fit`; two examples are read.
        """
        self._loop(model, build_source(data))

    def save(self, model: keras.Model, path: str | Path) -> None:
        """Writes the model on the chief, as `model.save` does, in blocks; other tasks return at once.

        Args:
            model: A built model.
            path: A `.keras` file for plain Keras; it is whole, or what it was before.
        """
        if not self.is_chief:
            return
        path = Path(path)
        # Keras tells the format by the name's end.
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            with keras_internals.saving_in_blocks(blocks_of_large):
                model.save(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def wait_for_others(self) -> None:
        """Returns once every process that runs the program has called it, so that none leaves while another writes."""
        if self.strategy_name != "multiworker":
            return

        def meet() -> Any:
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.ones([]))

        with self._working():
            met = tf.function(lambda: self.strategy.run(meet), autograph=False)()
            for count in self.strategy.experimental_local_results(met):
                count.numpy()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Steps follow each other inside; a step that fails because other tasks are gone ends this one too."""
        goes_on = False
        try:
            with readable_faults():
                yield
        except Regroup:
            # In another cluster. The launcher, which may see a peer's death later than we, must not find us resting.
            goes_on = True
            raise
        except tf.errors.OpError as error:
            if not is_peer_loss(error) or self.cluster.is_single:
                raise
            print("tfdist: other tasks are gone in the middle of a step", file=sys.stderr, flush=True)
            raise PeerLost from error
        finally:
            if not goes_on:
                self._heartbeat.rest()

    def _loop(self, model: keras.Model, source: Source, *, is_trained: bool = True) -> Loop:
        if is_trained and not keras_internals.is_compiled(model):
            raise ConfigError(
                f"the model {model.name!r} is not compiled; call model.compile(optimizer=…, loss=…) inside "
                "run.strategy.scope() first."
            )
        check_elements(model, source, shares=self._shares_batches)
        known = self._loops.pop(id(model), None)
        # compile() makes new state that an old loop would not see.
        parts = (*keras_internals.compiled_parts(model), is_trained or (known is not None and known[0][-1]))
        if known is not None and all(a is b for a, b in zip(known[0], parts, strict=True)):
            self._loops[id(model)] = known
            return known[1]
        batch = read_first_batch(
            model, source, strategy=self.strategy_name, num_replicas=self.strategy.num_replicas_in_sync
        )
        self._check_scope(model)
        with self.strategy.scope():
            keras_internals.build_model(model, batch, is_trained=is_trained)
        _use_sparse_rows(model, warn=_log.warning if self.is_chief else _log.debug)
        loop: Loop = (
            CoordinatorLoop(
                coordinator=self._get_coordinator(),
                model=model,
                num_workers=self.cluster.num_workers,
                heartbeat=self._heartbeat,
                batch=batch,
            )
            if self.strategy_name == "ps"
            else SyncLoop(strategy=self.strategy, model=model, heartbeat=self._heartbeat, batch=batch)
        )
        # A loop holds its model, so that an id stands for one model only. The latest last.
        self._loops[id(model)] = ((*keras_internals.compiled_parts(model), is_trained), loop)
        while len(self._loops) > _MAX_LOOPS:
            self._loops.pop(next(iter(self._loops)))
        return loop

    @property
    def _shares_batches(self) -> bool:
        return self.strategy_name in ("mirrored", "multiworker")

    def _check_sync(self, options: SyncOptions) -> None:
        asked = dataclasses.replace(options, exchange="auto", bucket_mb=SyncOptions.bucket_mb)
        if asked != SyncOptions() and self.strategy_name != "multiworker":
            raise ConfigError(
                f"sync={options.sync!r} or its settings with strategy={self.strategy_name!r}: only 'multiworker' has "
                "them; leave them out."
            )
        if asked != SyncOptions() and self._members is not None:
            raise ConfigError(
                f"sync={options.sync!r} with elastic='in_process': what workers keep for themselves would be lost with "
                "one of them; choose elastic='restart'."
            )

    def _choose_loop(
        self, steps_per_loop: int | None, on_nan: str, max_loss_spike: float | None
    ) -> int | None:
        if on_nan == "skip":
            obstacle = "on_nan='skip'"
        elif max_loss_spike is not None:
            obstacle = f"max_loss_spike={max_loss_spike}"
        elif self._members is not None:
            obstacle = "elastic='in_process'"
        else:
            return steps_per_loop
        if steps_per_loop not in (None, 1):
            raise ConfigError(
                f"steps_per_loop={steps_per_loop} with {obstacle}, which must know of each step before the next one "
                "begins: leave one of the two out."
            )
        return 1

    def _check_callbacks(self, callbacks: Any) -> None:
        everyone, _ = split_callbacks(callbacks, is_chief=True)
        if self.strategy_name == "multiworker" and any(
            isinstance(c, keras.callbacks.BackupAndRestore) for c in everyone
        ):
            raise ConfigError(
                "BackupAndRestore would restore the chief's weights alone, and only whole epochs; leave it out, and "
                "pass checkpoints=tfdist.Checkpoints(directory=…) to fit (--resume on the command line)."
            )

    def _check_scope(self, model: keras.Model) -> None:
        if self.strategy_name == "one_device":
            return
        if keras_internals.creating_strategy(model) is not self.strategy:
            raise ConfigError(
                f"the model {model.name!r} was made outside the strategy's scope; "
                "build and compile it inside 'with run.strategy.scope():'."
            )
        if not keras_internals.is_compiled_within(model, self.strategy):
            raise ConfigError(
                f"the model {model.name!r} was compiled outside the strategy's scope, where its optimizer and metrics "
                "have no copy for each replica; call model.compile(…) inside 'with run.strategy.scope():'."
            )

    def _get_coordinator(self) -> tf.distribute.coordinator.ClusterCoordinator:
        if self._coordinator is None:
            self._coordinator = tf.distribute.coordinator.ClusterCoordinator(self.strategy)
        return self._coordinator

    def _progress(self, given: Sequence[Any], verbose: int | str) -> list[keras.callbacks.Callback]:
        if (
            not self.is_chief
            or verbose == 0
            or any(isinstance(c, keras.callbacks.ProgbarLogger) for c in given)
        ):
            return []
        # Here, since drawing brings rich, which a silent run need not load.
        from tfdist.training.monitoring.progress import ProgressBar

        return [] if any(isinstance(c, ProgressBar) for c in given) else [ProgressBar()]


def _use_sparse_rows(model: keras.Model, *, warn: Callable[..., None]) -> None:
    """Spares a model's large tables what Keras's optimizers do to all of their rows, where the result is the same.

    Other models keep Keras's classes: their Adagrad counts a row that occurs twice in a batch twice, and so shall we.
    """
    if tables := keras_internals.find_layers(model, Embedding):
        largest = max(tables, key=lambda table: table.input_dim)
        for optimizer in keras_internals.find_optimizers(model):
            what = describe_dense_rows(with_sparse_rows(optimizer))
            if what is not None and largest.input_dim >= _MANY_ROWS:
                warn("%r has %d rows, and %s", largest.name, largest.input_dim, what)
        if model.optimizer is not None:
            keras_internals.set_optimizer(model, model.optimizer)


def _check_batch(global_batch_size: int, num_replicas: int) -> None:
    if global_batch_size < num_replicas:
        raise ConfigError(
            f"global_batch_size={global_batch_size} is smaller than the {num_replicas} replicas that share it; "
            f"take at least {num_replicas}."
        )
