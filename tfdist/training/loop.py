"""`fit` as Keras means it, over any loop: epochs, callbacks, validation, history."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from tfdist import keras_internals
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.data.order import num_steps
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import ShardedSource, Source
from tfdist.errors import ConfigError
from tfdist.runtime import memory
from tfdist.training.checkpoint.saver import Saver
from tfdist.training.checkpoint.snapshot import Snapshot
from tfdist.training.model_loop import Loop
from tfdist.training.monitoring.callbacks import writes
from tfdist.training.on_nan import OnNan
from tfdist.training.plan import BatchPlan, Place

# Numbers that change faster cannot be read.
_SHOW_SECS = 0.2
# Keras's own words.
_RAN_OUT = (
    "Your input ran out of data; interrupting training. Make sure that your dataset or generator can generate at least "
    "`steps_per_epoch * epochs` batches. You may need to use the `.repeat()` function when building your dataset."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How long and in what order a `Fit` trains; the fields mean what they mean in `keras.Model.fit`.

    `steps_per_epoch` is known, unless only the data's end will tell.
    """

    global_batch_size: int
    epochs: int
    initial_epoch: int
    steps_per_epoch: int | None
    shuffle: bool
    seed: int
    validation_batch_size: int
    validation_steps: int | None
    validation_freq: int | Sequence[int]
    shown: bool
    drop_remainder: bool
    steps_per_loop: int | None

    def order_of(self, source: Source, *, num_readers: int) -> dict[str, Any]:
        """Returns what the order of an epoch's examples follows from, by name, for `check_order`."""
        return {
            "num_examples": source.num_examples,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_remainder": self.drop_remainder,
            "num_parts": num_readers if isinstance(source, ShardedSource) else 1,
        }


@dataclasses.dataclass(kw_only=True)
class Fit:
    """One `fit`; the history is in the callback list's own `History`.

    Attributes:
        loop: The strategy's loop, around the built model.
        model: Its `stop_training` ends the run, as in Keras.
        source: Training examples.
        validation: Validation examples, or None.
        options: How long and in what order.
        callbacks: Those that run on this task.
        saver: Says where to go on, and keeps the state.
        heartbeat: Is told of each step.
        on_nan: Says what to do with a step whose numbers are wrong.
    """

    loop: Loop
    model: keras.Model
    source: Source
    validation: Source | None
    options: FitOptions
    callbacks: keras.callbacks.CallbackList
    saver: Saver
    heartbeat: Heartbeat
    on_nan: OnNan
    _num_validated: int = dataclasses.field(default=0, init=False)

    def run(self) -> None:
        """Trains."""
        options, saver = self.options, self.saver
        self.model.stop_training = False
        self.callbacks.on_train_begin()
        resumed = saver.restore()
        self.heartbeat.prepare()
        self.loop.start()
        if resumed is None and self.on_nan.goes_back:
            saver.save(epoch=options.initial_epoch, step=0, at_epoch_end=True)
        first_epoch = options.initial_epoch if resumed is None else resumed.epoch
        saver.place = Place(first_epoch) if resumed is None else resumed.place
        self.on_nan.restore({} if resumed is None else resumed.extra)
        logs: dict[str, Any] = {}
        for epoch in range(first_epoch, options.epochs):
            logs = self._run_epoch(epoch, resumed)
            resumed = None  # the epochs after this one begin at their start
            if self.model.stop_training:
                break
        if self.model.optimizer is not None and options.epochs > options.initial_epoch:
            # Puts the averaged weights in place where the optimizer keeps some (EMA), as Keras does.
            optimizer = self.model.optimizer
            own = [v for v in self.model.trainable_weights if keras_internals.has_memory(v)]
            with keras_internals.updating_only(optimizer, own):
                optimizer.finalize_variable_values(own)
        self.callbacks.on_train_end(logs=logs)
        self.loop.release()

    def _run_epoch(self, epoch: int, resumed: Snapshot | None) -> dict[str, Any]:
        """Trains, validates and saves; returns the logs."""
        self.callbacks.on_epoch_begin(epoch)
        per_pass = plan_steps(
            self.source, self.options.global_batch_size, None, drop_remainder=self.options.drop_remainder
        )
        plan = self._plan(epoch, resumed, per_pass)
        num_done = self._train(plan)
        if num_done == 0 and plan.place.step:
            # The epoch before had ended with the data, of which nobody knew how many they are.
            plan = dataclasses.replace(plan, place=Place(plan.place.lap + 1))
            num_done = self._train(plan)
        self.saver.place = _next_place(plan, num_done, per_pass)
        wanted = self.options.steps_per_epoch
        if wanted is not None and num_done < wanted and not self.model.stop_training:
            warnings.warn(_RAN_OUT, stacklevel=2)
        logs = dict(self.loop.epoch_logs)
        if self.validation is not None and _is_due(epoch, self.options.validation_freq):
            val_logs = self._validate(self.validation, num_epochs_after=plan.num_epochs_after)
            logs |= {f"val_{name}": value for name, value in val_logs.items()}
        with self.heartbeat.busy():
            self.callbacks.on_epoch_end(epoch, logs)
            self.saver.save(epoch=epoch + 1, step=0, at_epoch_end=True)
            memory.give_back()
        return logs

    def _plan(self, epoch: int, resumed: Snapshot | None, per_pass: int | None) -> BatchPlan:
        options, saver = self.options, self.saver
        watched = _log_every(
            self.callbacks,
            options.steps_per_epoch,
            shown=options.shown,
            step_secs=self.loop.step_secs,
            is_alone=self.loop.num_readers == 1,
        )
        return BatchPlan(
            epoch=epoch,
            place=saver.place,
            seed=options.seed,
            shuffle=options.shuffle,
            global_batch_size=options.global_batch_size,
            num_steps=_cut(options.steps_per_epoch, per_pass, saver.place),
            first_step=0 if resumed is None else resumed.step,
            drop_remainder=options.drop_remainder,
            input_state=b"" if resumed is None else resumed.input_state,
            metrics=None if resumed is None else resumed.metrics,
            is_boundary=saver.is_boundary,
            is_saved=saver.is_saving,
            log_every_steps=watched,
            steps_per_loop=options.steps_per_loop,
            num_epochs_after=options.epochs - epoch - 1,
            is_due=saver.is_due,
            # Callbacks that look at each batch see the same logs everywhere, so all workers stop together.
            is_stopped=lambda: bool(self.model.stop_training) and watched == 1,
            loss_limit=self.on_nan.loss_limit,
        )

    def _train(self, plan: BatchPlan) -> int:
        """Returns the steps that the epoch has had."""
        steps = self.loop.train_epoch(self.source, plan)
        step = plan.first_step
        while True:
            # Where only the data's end will tell, it is one call too many, as in Keras.
            if not plan.is_stopped() and (plan.num_steps is None or step < plan.num_steps):
                self.callbacks.on_train_batch_begin(step)
            try:
                finished = next(steps)
            except StopIteration:
                self.on_nan.check_logs(step - 1, plan, self.loop.epoch_logs)
                return step
            instead = self.on_nan.after_step(finished, plan)
            self.heartbeat.beat(plan.total_steps(step + 1))
            with self.heartbeat.busy() if plan.log_every_steps == 1 else contextlib.nullcontext():
                self.callbacks.on_train_batch_end(step, finished.logs)
            step += 1
            if instead is not None:
                plan, steps = instead, self.loop.train_epoch(self.source, instead)
            elif finished.is_boundary:
                with self.heartbeat.busy():
                    self.saver.save(epoch=plan.epoch, step=step)

    def _validate(self, validation: Source, *, num_epochs_after: int) -> dict[str, Any]:
        options = self.options
        plan = BatchPlan(
            global_batch_size=options.validation_batch_size,
            num_steps=plan_steps(validation, options.validation_batch_size, options.validation_steps),
        )
        if plan.num_steps is not None and options.validation_steps is None:
            # One pass after the other, all alike: to open the data anew would take longer than to read them.
            plan = dataclasses.replace(
                plan, place=Place(self._num_validated), num_epochs_after=num_epochs_after
            )
        self._num_validated += 1
        self.callbacks.on_test_begin()
        logs = self.loop.evaluate(validation, plan)
        self.callbacks.on_test_end(logs)
        return logs


def plan_steps(
    source: Source, global_batch_size: int, steps: int | None, *, drop_remainder: bool = False
) -> int | None:
    """Returns the steps of a pass, or None where only the data's end will tell.

    Raises:
        ConfigError: If `drop_remainder` would leave nothing.
    """
    if isinstance(source, BatchedSource) and source.num_batches is not None:
        return source.num_batches if steps is None else min(steps, source.num_batches)
    if source.num_examples is None:
        return steps
    if drop_remainder and source.num_examples < global_batch_size:
        raise ConfigError(
            f"drop_remainder leaves out all of the {source.num_examples} examples, fewer than "
            f"batch_size={global_batch_size}; take a smaller batch, or keep the remainder."
        )
    per_pass = num_steps(
        num_examples=source.num_examples, global_batch_size=global_batch_size, drop_remainder=drop_remainder
    )
    return per_pass if steps is None else min(steps, per_pass)


def _cut(steps: int | None, per_pass: int | None, place: Place) -> int | None:
    """Returns the steps of an epoch that begins somewhere in the data: it ends with them at the latest, as in Keras."""
    if per_pass is None:
        return steps
    left = per_pass - place.step
    return left if steps is None else min(steps, left)


def _next_place(plan: BatchPlan, num_done: int, per_pass: int | None) -> Place:
    step = plan.place.step + num_done
    has_ended = (
        num_done < plan.num_steps if plan.num_steps is not None and per_pass is None else step == per_pass
    )
    if plan.num_steps is None or has_ended:
        return Place(plan.place.lap + 1)
    return Place(plan.place.lap, step)


def _is_due(epoch: int, frequency: int | Sequence[int]) -> bool:
    if isinstance(frequency, int):
        return (epoch + 1) % frequency == 0
    return epoch + 1 in frequency


def _log_every(
    callbacks: keras.callbacks.CallbackList,
    steps: int | None,
    *,
    shown: bool,
    step_secs: float | None,
    is_alone: bool,
) -> int:
    """Every step where a callback looks at batches, for the eye ten times an epoch at most, else never (0).

    Logs are a collective under several workers: the rule must give the same answer on each, so callbacks
    that run on the chief alone do not count, unless it is alone.
    """
    if any(_reads_batches(c, is_alone=is_alone) for c in callbacks.callbacks):
        return 1
    if not shown:
        return 0
    return max(1, (steps or 1000) // 10, math.ceil(_SHOW_SECS / step_secs) if step_secs else 1)


def _reads_batches(callback: keras.callbacks.Callback, *, is_alone: bool) -> bool:
    if getattr(callback, "writes", None) is not None or isinstance(callback, _IDLE):
        return False
    if writes(callback) and not is_alone:
        return False
    base = keras.callbacks.Callback
    hooks = ("on_train_batch_end", "on_batch_end", "on_train_batch_begin", "on_batch_begin")
    return any(
        getattr(type(callback), hook) is not getattr(base, hook) or hook in vars(callback) for hook in hooks
    )


# Keras's own hooks for batches, which need no logs.
_IDLE = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.ProgbarLogger,
    keras.callbacks.TensorBoard,
)
