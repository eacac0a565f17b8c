"""`fit` as Keras means it, over any loop: epochs, callbacks, validation, history."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import keras

from tfdist.data import Source, num_steps
from tfdist.errors import ConfigError
from tfdist.heartbeat import Heart
from tfdist.training.input_wait import InputWait
from tfdist.training.on_nan import OnNan
from tfdist.training.plan import BatchPlan, FinishedStep
from tfdist.training.saver import Loop as SavedLoop
from tfdist.training.saver import Saver


class Loop(SavedLoop, Protocol):
    """What a strategy's loop offers."""

    epoch_logs: dict[str, Any]
    num_replicas: int
    input_wait: InputWait

    def own_part(self, source: Source, shard: str) -> Source:
        """Returns what of a source this process reads."""

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Yields once a step."""

    def measures(self) -> dict[str, Any]:
        """Returns what this strategy alone measures of the epoch so far, by the names that `metrics.jsonl` has."""

    def evaluate(self, source: Source, plan: BatchPlan) -> dict[str, Any]:
        """Returns logs."""

    def predict(self, source: Source, plan: BatchPlan) -> Any:
        """Returns arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How long and in what order `run_fit` trains; the fields mean what they mean in `keras.Model.fit`.

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


def run_fit(
    *,
    loop: Loop,
    model: keras.Model,
    source: Source,
    validation: Source | None,
    options: FitOptions,
    callbacks: keras.callbacks.CallbackList,
    saver: Saver,
    heart: Heart,
    on_nan: OnNan,
) -> None:
    """Trains; the history is in the callback list's own `History`.

    Args:
        loop: The strategy's loop, around the built model.
        model: Its `stop_training` ends the run, as in Keras.
        source: Training examples.
        validation: Validation examples, or None.
        options: How long and in what order.
        callbacks: Those that run on this task.
        saver: Says where to go on, and keeps the state.
        heart: Is told of each step.
        on_nan: Says what to do with a step whose numbers are wrong.
    """
    model.stop_training = False
    callbacks.on_train_begin()
    resumed = saver.restore()
    loop.start()
    if resumed is None and on_nan.goes_back:
        saver.save(epoch=options.initial_epoch, step=0, at_epoch_end=True)
    logs: dict[str, Any] = {}
    first_epoch = options.initial_epoch if resumed is None else resumed.epoch
    for epoch in range(first_epoch, options.epochs):
        callbacks.on_epoch_begin(epoch)
        plan = BatchPlan(
            epoch=epoch,
            seed=options.seed,
            shuffle=options.shuffle,
            global_batch_size=options.global_batch_size,
            num_steps=options.steps_per_epoch,
            first_step=0 if resumed is None else resumed.step,
            drop_remainder=options.drop_remainder,
            input_state=b"" if resumed is None else resumed.input_state,
            metrics=None if resumed is None else resumed.metrics,
            is_boundary=saver.is_boundary,
            is_saved=saver.is_saving,
            log_every_steps=_log_every(callbacks, options.steps_per_epoch, shown=options.shown),
            steps_per_loop=options.steps_per_loop,
            num_epochs_after=options.epochs - epoch - 1,
            is_due=saver.is_due,
            loss_limit=on_nan.loss_limit,
        )
        resumed = None  # the epochs after this one begin at their start
        _train(loop, model, source, plan, callbacks, saver, heart, on_nan)
        logs = dict(loop.epoch_logs)
        if validation is not None and _is_due(epoch, options.validation_freq):
            logs |= {f"val_{k}": v for k, v in _validate(loop, validation, options, callbacks).items()}
        callbacks.on_epoch_end(epoch, logs)
        saver.save(epoch=epoch + 1, step=0, at_epoch_end=True)
        if model.stop_training:
            break
    if model.optimizer is not None and options.epochs > options.initial_epoch:
        # Puts the averaged weights in place where the optimizer keeps some (EMA), as Keras does.
        model.optimizer.finalize_variable_values(model.trainable_weights)
    callbacks.on_train_end(logs=logs)


def plan_steps(
    source: Source, global_batch_size: int, steps: int | None, *, drop_remainder: bool = False
) -> int | None:
    """Returns the steps of a pass, or None where only the data's end will tell.

    Raises:
        ConfigError: If `drop_remainder` would leave nothing.
    """
    if source.num_examples is None:
        return steps
    if drop_remainder and source.num_examples < global_batch_size:
        raise ConfigError(
            f"drop_remainder leaves out all of the {source.num_examples} examples, fewer than "
            f"global_batch_size={global_batch_size}; take a smaller batch, or keep the remainder."
        )
    if steps is not None:
        return steps
    return num_steps(
        num_examples=source.num_examples, global_batch_size=global_batch_size, drop_remainder=drop_remainder
    )


def _train(
    loop: Loop,
    model: keras.Model,
    source: Source,
    plan: BatchPlan,
    callbacks: keras.callbacks.CallbackList,
    saver: Saver,
    heart: Heart,
    on_nan: OnNan,
) -> None:
    steps = loop.train_epoch(source, plan)
    step = plan.first_step
    while True:
        callbacks.on_train_batch_begin(step)
        try:
            finished = next(steps)
        except StopIteration:
            on_nan.check_logs(step - 1, plan, loop.epoch_logs)
            return
        instead = on_nan.after_step(finished, plan)
        callbacks.on_train_batch_end(step, finished.logs)
        step += 1
        heart.beat(plan.total_steps(step))
        if instead is not None:
            plan, steps = instead, loop.train_epoch(source, instead)
        elif finished.is_boundary:
            saver.save(epoch=plan.epoch, step=step)
        if model.stop_training and plan.wants_logs(0):
            # Callbacks that look at each batch see the same logs everywhere, so all workers stop here together.
            loop.epoch_logs = dict(finished.logs or {})
            return


def _validate(
    loop: Loop, validation: Source, options: FitOptions, callbacks: keras.callbacks.CallbackList
) -> dict[str, Any]:
    callbacks.on_test_begin()
    plan = BatchPlan(
        global_batch_size=options.validation_batch_size,
        num_steps=plan_steps(validation, options.validation_batch_size, options.validation_steps),
    )
    logs = loop.evaluate(validation, plan)
    callbacks.on_test_end(logs)
    return logs


def _is_due(epoch: int, frequency: int | Sequence[int]) -> bool:
    if isinstance(frequency, int):
        return (epoch + 1) % frequency == 0
    return epoch + 1 in frequency


def _log_every(callbacks: keras.callbacks.CallbackList, steps: int | None, *, shown: bool) -> int:
    """Every step where a callback looks at batches, about ten times an epoch for the eye, else never (0).

    Logs are a collective under several workers: the rule must give the same answer on each, so callbacks
    that run on the chief alone do not count.
    """
    if any(_reads_batches(c) for c in callbacks.callbacks):
        return 1
    return max(1, (steps or 1000) // 10) if shown else 0


def _reads_batches(callback: keras.callbacks.Callback) -> bool:
    if getattr(callback, "writes", None) is not None or isinstance(callback, _CHIEF_OR_IDLE):
        return False
    base = keras.callbacks.Callback
    hooks = ("on_train_batch_end", "on_batch_end", "on_train_batch_begin", "on_batch_begin")
    return any(
        getattr(type(callback), hook) is not getattr(base, hook) or hook in vars(callback) for hook in hooks
    )


_CHIEF_OR_IDLE = (
    keras.callbacks.History,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.BackupAndRestore,
    keras.callbacks.TensorBoard,
    keras.callbacks.ProgbarLogger,
)
