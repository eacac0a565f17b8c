"""`initialize` and the `Run` it returns: which loop, which role, what to build first."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster import Cluster, Task, canonical_strategy, check_strategy, split_address
from tfdist.data import Source, build_source, hold_out
from tfdist.door import close_when_listening
from tfdist.environments import detect_cluster
from tfdist.errors import ConfigError
from tfdist.ports import check_port_free, check_reachable, meet_peers
from tfdist.strategies import build_resolver, build_strategy, configure_devices
from tfdist.training.callbacks import split_callbacks
from tfdist.training.checkpoint_dir import Checkpoints
from tfdist.training.coordinator import CoordinatorLoop
from tfdist.training.loop import FitOptions, Loop, plan_steps, run_fit
from tfdist.training.plan import BatchPlan
from tfdist.training.saver import Saver
from tfdist.training.sync import SyncLoop

_log = logging.getLogger("tfdist")


def initialize(
    *,
    strategy: str | None = None,
    num_replicas: int | None = None,
    seed: int = 0,
    cluster: Cluster | None = None,
    mixed_precision: str | None = None,
    start_timeout_secs: float = 300.0,
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

    Returns:
        The run, on tasks that run the program.

    Raises:
        ConfigError: If the strategy does not fit the cluster.
        ClusterError: If this task's port is taken, or other tasks do not answer in time.
    """
    cluster = cluster or detect_cluster(os.environ) or Cluster()
    name = canonical_strategy(strategy or os.environ.get("TFDIST_STRATEGY") or _default_strategy(cluster))
    if cluster.is_local and name in ("multiworker", "ps"):
        raise ConfigError(
            f"strategy {name!r} needs a cluster, and this process is alone; start it with "
            f"'python -m tfdist.launch --strategy={name} --num_workers=2 your_script.py', or set TF_CONFIG."
        )
    check_strategy(cluster, name)
    check_port_free(cluster)
    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")
    configure_devices(strategy=name, num_replicas=num_replicas)
    keras.utils.set_random_seed(seed)
    if mixed_precision:
        keras.mixed_precision.set_dtype_policy(f"mixed_{mixed_precision}")
    if name == "multiworker":
        meet_peers(cluster, timeout_secs=start_timeout_secs)
    if cluster.task is not None and cluster.is_loopback:
        close_when_listening(split_address(cluster.address(cluster.task))[1])
    if name == "ps" and cluster.task is not None and cluster.task.type != "chief":
        _serve(cluster)
    if name == "ps":
        servers = [t for t in cluster.tasks if t.type != "chief"]
        check_reachable(cluster, timeout_secs=start_timeout_secs, tasks=servers)
    built = build_strategy(strategy=name, cluster=cluster, num_replicas=num_replicas)
    return Run(strategy=built, strategy_name=name, cluster=cluster, seed=seed)


def _default_strategy(cluster: Cluster) -> str:
    if cluster.num_ps:
        return "ps"
    return "one_device" if cluster.is_single else "multiworker"


def _serve(cluster: Cluster) -> NoReturn:
    resolver = build_resolver(cluster)
    server = tf.distribute.Server(
        resolver.cluster_spec(),
        job_name=resolver.task_type,
        task_index=resolver.task_id,
        protocol="grpc",
    )
    server.join()
    raise SystemExit(0)


class Run:
    """A program's handle on its cluster.

    Attributes:
        strategy: Build and compile the model inside `strategy.scope()`.
        strategy_name: Canonical name.
        cluster: All tasks.
        seed: Of order, initial weights and random layers.
    """

    def __init__(
        self, *, strategy: tf.distribute.Strategy, strategy_name: str, cluster: Cluster, seed: int
    ) -> None:
        self.strategy = strategy
        self.strategy_name = strategy_name
        self.cluster = cluster
        self.seed = seed
        self._loops: dict[int, tuple[Any, Loop]] = {}
        self._coordinator: tf.distribute.coordinator.ClusterCoordinator | None = None

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
        stop_on_nan: bool = False,
    ) -> keras.callbacks.History:
        """Trains as `keras.Model.fit` does, over the whole cluster.

        Args:
            model: Compiled, made inside `strategy.scope()`.
            train: Arrays `(x, y)`, a `tf.data.Dataset` of examples (not of batches), a TFDS split, or a
                callable `InputContext → Dataset` of per-replica batches.
            global_batch_size: Examples per optimizer step over all replicas.
            epochs: Epoch to stop at.
            validation_data: As `train`.
            validation_split: Share of the arrays in `train`, from their end, to validate on instead.
            validation_batch_size: Default: `global_batch_size`.
            validation_steps: Batches to validate on; None: all.
            validation_freq: Validate every so many epochs, or at the 1-based epochs of a sequence.
            callbacks: Keras callbacks; those that write run on the chief alone.
            steps_per_epoch: None: until each example was seen once.
            initial_epoch: Epoch to start at.
            shuffle: False keeps the data's own order.
            class_weight: Class → weight.
            sample_weight: One weight per example.
            verbose: 0, 1, 2 or "auto".
            checkpoints: Where to keep the state. If a checkpoint lies there already, training goes on from it,
                inside an epoch too, as if it had never stopped; `epochs` is the total.
            stop_on_nan: Ends the run where the loss is seen to be NaN or infinite: where logs are made, about ten
                times an epoch, and at its end. False goes on, as Keras does.

        Returns:
            The history, equal on every task that runs the program.

        Raises:
            ConfigError: If something asked for cannot be honoured.
            NonFiniteError: If `stop_on_nan`, and the loss is no number any more.
            Preempted: A `SystemExit` with code 143: a process was told to end by SIGTERM, and `checkpoints` hold
                the state.
        """
        if validation_split and validation_data is None:
            rest, validation_data = hold_out(
                build_source(train, sample_weight=sample_weight), validation_split
            )
            source = build_source(rest, class_weight=class_weight)
        else:
            source = build_source(train, class_weight=class_weight, sample_weight=sample_weight)
        validation = None if validation_data is None else build_source(validation_data)
        loop = self._loop(model, source)
        _check_batch(global_batch_size, loop.num_replicas)
        self._check_callbacks(callbacks)
        given, _ = split_callbacks(callbacks, is_chief=self.is_chief)
        steps = plan_steps(source, global_batch_size, steps_per_epoch)
        callback_list = keras.callbacks.CallbackList(
            [*given, *self._progress(given, verbose)], add_history=True, model=model
        )
        callback_list.set_params(
            {"epochs": epochs, "steps": steps, "verbose": verbose, "global_batch_size": global_batch_size}
        )
        options = FitOptions(
            global_batch_size=global_batch_size,
            epochs=epochs,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            shuffle=shuffle,
            seed=self.seed,
            validation_batch_size=validation_batch_size or global_batch_size,
            validation_steps=validation_steps,
            validation_freq=validation_freq,
            shown=verbose not in (0, 2),
            stop_on_nan=stop_on_nan,
        )
        saver = Saver(
            checkpoints=checkpoints,
            loop=loop,
            model=model,
            callbacks=callback_list,
            is_chief=self.is_chief,
            say=_log.info if verbose == 0 else functools.partial(print, flush=True),
        )
        with saver:
            run_fit(
                loop=loop,
                model=model,
                source=source,
                validation=validation,
                options=options,
                callbacks=callback_list,
                saver=saver,
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
    ) -> Any:
        """Evaluates on each example once.

        Args:
            model: Compiled, made inside `strategy.scope()`.
            data: As for `fit`.
            global_batch_size: Examples per step over all replicas.
            steps: None: all the data.
            sample_weight: One weight per example.
            return_dict: False returns a list in the order of the dict.

        Returns:
            Metric name → value, on every task that runs the program.
        """
        source = build_source(data, sample_weight=sample_weight)
        loop = self._loop(model, source)
        num_steps = plan_steps(source, global_batch_size, steps)
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
        loop = self._loop(model, source)
        num_steps = plan_steps(source, global_batch_size, steps)
        return loop.predict(source, BatchPlan(global_batch_size=global_batch_size, num_steps=num_steps))

    def build(self, model: keras.Model, data: Any) -> None:
        """Creates the model's variables, its optimizer's too, before the first step (to restore them, say).

        Args:
            model: Compiled, made inside `strategy.scope()`.
            data: As for `fit`; two examples are read.
        """
        self._loop(model, build_source(data))

    def save(self, model: keras.Model, path: str | Path) -> None:
        """Writes the model on the chief, as `model.save` does; other tasks return at once.

        Args:
            model: A built model.
            path: A `.keras` file for plain Keras.
        """
        if self.is_chief:
            model.save(path)

    def wait_for_others(self) -> None:
        """Returns once every process that runs the program has called it, so that none leaves while another writes."""
        if self.strategy_name != "multiworker":
            return

        def meet() -> Any:
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.ones([]))

        met = tf.function(lambda: self.strategy.run(meet), autograph=False)()
        for count in self.strategy.experimental_local_results(met):
            count.numpy()

    def _loop(self, model: keras.Model, source: Source) -> Loop:
        if not keras_internals.is_compiled(model):
            raise ConfigError(
                f"the model {model.name!r} is not compiled; call model.compile(optimizer=…, loss=…) inside "
                "run.strategy.scope() first."
            )
        known = self._loops.get(id(model))
        # Keyed by the optimizer too: compile() makes new state that an old loop would not see.
        if known is not None and known[0] is model.optimizer:
            return known[1]
        with self.strategy.scope():
            keras_internals.build_model(model, source.sample_batch(2))
        self._check_scope(model)
        loop: Loop = (
            CoordinatorLoop(
                coordinator=self._get_coordinator(), model=model, num_workers=self.cluster.num_workers
            )
            if self.strategy_name == "ps"
            else SyncLoop(strategy=self.strategy, model=model)
        )
        self._loops[id(model)] = (model.optimizer, loop)
        return loop

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
        if self.strategy_name == "one_device" or not model.trainable_variables:
            return
        if keras_internals.creating_strategy(model) is not self.strategy:
            raise ConfigError(
                f"the model {model.name!r} was made outside the strategy's scope; "
                "build and compile it inside 'with run.strategy.scope():'."
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
        from tfdist.training.progress import ProgressBar

        return [] if any(isinstance(c, ProgressBar) for c in given) else [ProgressBar()]


def _check_batch(global_batch_size: int, num_replicas: int) -> None:
    if global_batch_size < num_replicas:
        raise ConfigError(
            f"global_batch_size={global_batch_size} is smaller than the {num_replicas} replicas that share it; "
            f"take at least {num_replicas}."
        )
