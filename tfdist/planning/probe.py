"""`python -m tfdist.planning.probe`: times steps of a recipe in some ways, in a cluster that a launcher has started.

The chief prints a line for each trial, `tfdist-probe {…}`, which `measure` reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import tensorflow as tf
from absl import flags

from tfdist import keras_internals
from tfdist.api.checks import check_batches
from tfdist.api.run_state import RunState
from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.commands.execute import join_cluster
from tfdist.commands.flags import build_config, parse_flags, resolve_run
from tfdist.commands.recipe_run import build_for_training
from tfdist.config.run_config import RunConfig
from tfdist.config.sync_options import DEFAULT_PERIODS
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import Source
from tfdist.errors import ConfigError, TfdistError
from tfdist.planning.ways import KINDS, MARK, OWN
from tfdist.recipe import load_recipe, parse_overrides
from tfdist.training.loop import plan_steps
from tfdist.training.model_loop import Loop
from tfdist.training.plan import BatchPlan, Place
from tfdist.training.ps.loop import CoordinatorLoop
from tfdist.training.sync.loop import SyncLoop

_TRIAL_SECS = 1.0
_NUM_MEETINGS = 5
_WARM_STEPS, _LEAST_STEPS, _USUAL_STEPS, _MOST_STEPS = 3, 4, 16, 64
# Of several steps: between them lie two times.
_LEAST_CALLS = 3
# Longer than any trial.
_NEVER = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """What a trial has found.

    Attributes:
        secs: From one optimizer step to the next, the mean.
        samples: The same of each step, or of each call of several; none under `ps`, whose steps overlap.
        input_share: Of the time, spent waiting for data; None where nobody knows.
        sent_mb: That this worker has sent in a step (10**6 bytes), as far as it is counted.
        memory_mb: The most that this process has had so far.
    """

    secs: float
    samples: Sequence[float] = ()
    input_share: float | None
    sent_mb: float
    memory_mb: float


@dataclasses.dataclass(kw_only=True)
class Trial:
    """Makes the steps of a run, but for what comes between its epochs; every process must make the same ones.

    Attributes:
        loop: The model's, configured.
        source: What this process reads.
        batch_size: Examples of a step.
        total_steps: Of the run that is planned: by it is decided whether several in one call of a graph are worth it.
        steps_per_loop: As for `fit`.
        loss_limit: As for `BatchPlan`: whether each step's numbers are looked at.
    """

    loop: Loop
    source: Source
    batch_size: int
    total_steps: int
    steps_per_loop: int | None
    loss_limit: Callable[[], float] | None

    def __post_init__(self) -> None:
        self._per_pass = plan_steps(self.source, self.batch_size, None) or _MOST_STEPS
        self._num_laps = 0
        # Of the run with the most steps, since what was sent is rounded: these steps and that.
        self._sent = (0, 0.0)

    def time(self) -> Timing:
        """Times steps, the first ones and what is compiled left out."""
        loop = self.loop
        loop.start()
        self._run(_WARM_STEPS)
        # Under ps the chief alone decides how many steps are made.
        is_alone = isinstance(loop, CoordinatorLoop)
        secs, samples = (self._time_passes(), []) if is_alone else self._time_calls()
        return Timing(
            secs=secs,
            samples=samples,
            input_share=loop.input_wait.share,
            sent_mb=self._sent[1] / self._sent[0],
            memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        )

    def _time_calls(self) -> tuple[float, list[float]]:
        """Returns the mean and all times between the ends of two calls of a graph."""
        num_steps = _USUAL_STEPS
        if (guess := self.loop.step_secs) is not None:  # alike on all workers, as the number of steps must be
            num_steps = min(max(math.ceil(_TRIAL_SECS / guess), _LEAST_STEPS), _MOST_STEPS)
        size, samples = 0, []
        # Whether several steps in one call pay is known after some, and the first such call compiles: what has it is
        # timed again.
        while size != self._steps_per_call:
            size = self._steps_per_call
            self._run(num_steps)
            samples = self._time_each(max(num_steps, _LEAST_CALLS * size))
        return sum(samples) / len(samples), samples

    def _time_each(self, num_steps: int) -> list[float]:
        samples: list[float] = []
        while num_steps > 0:
            start = time.perf_counter()
            moments = self._run(num_steps)
            size = self._steps_per_call
            ends = moments[size - 1 :: size]
            if len(ends) < 2:  # a short pass has no two whole calls
                size, ends = len(moments), [start, moments[-1]]
            samples += [(after - before) / size for before, after in zip(ends, ends[1:], strict=False)]
            num_steps -= len(moments)
        return samples

    @property
    def _steps_per_call(self) -> int:
        return int(self.loop.measures().get("steps_per_loop", 1))

    def _time_passes(self) -> float:
        """Returns the time of passes by their steps: several workers' overlap, and a pass waits for the last one."""

        def run_for_a_while() -> float:
            start, num_made, secs = time.perf_counter(), 0, 0.0
            while secs < _TRIAL_SECS:
                num_made += len(self._run(_MOST_STEPS))
                secs = time.perf_counter() - start
            return secs / num_made

        run_for_a_while()  # workers find out how many steps to make between two words with the chief
        return run_for_a_while()

    def _run(self, num_steps: int) -> list[float]:
        """Returns when each of so many steps was done, of a pass at most."""
        num_steps = min(num_steps, self._per_pass)
        plan = BatchPlan(
            place=Place(self._num_laps),
            num_steps=num_steps,
            global_batch_size=self.batch_size,
            shuffle=True,
            steps_per_loop=self.steps_per_loop,
            loss_limit=self.loss_limit,
            num_epochs_after=math.ceil(self.total_steps / num_steps),
        )
        self._num_laps += 1
        moments = [time.perf_counter() for _ in self.loop.train_epoch(self.source, plan)]
        if not moments:
            raise ConfigError("the recipe's training data hold no examples.")
        self._sent = max(self._sent, (len(moments), self.loop.measures().get("exchange_mb", 0.0)))
        return moments


class Probe:
    """A recipe's model and data on this task, and trials of them."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        recipe = load_recipe(config.recipe)
        overrides = parse_overrides(recipe, config.overrides, data_dir=config.data_dir)
        run = join_cluster(config)
        self.is_chief = run.is_chief
        self._model, source = build_for_training(run, recipe, config, overrides)
        state = RunState(
            strategy=run.strategy,
            strategy_name=run.strategy_name,
            cluster=run.cluster,
            seed=run.seed,
            pipeline=config.pipeline_options,
            heartbeat=Heartbeat.from_environment(os.environ),
        )
        self._loop = state.find_loop(self._model, source)
        self._source = source
        self._shared = self._loop.shard_source_of(source, config.shard)

    @property
    def has_own_batches(self) -> bool:
        """Whether the data yield batches, of a size that nobody else can choose."""
        return isinstance(self._source, BatchedSource)

    def describe(self) -> dict[str, Any]:
        """Returns what the model and the run are."""
        weights = self._model.trainable_variables
        steps = self._count_steps(self.scale_batch(Fraction(1)))
        return {
            "recipe": self._config.recipe,
            "batch_size": self.scale_batch(Fraction(1)),
            "epochs": self._config.epochs,
            "num_examples": self._source.num_examples,
            "steps_per_epoch": steps,
            "num_parameters": keras_internals.count_parameters(self._model),
            "gradient_mb": sum(
                math.prod(keras_internals.whole_shape(v)) * tf.as_dtype(v.dtype).size for v in weights
            )
            / 1e6,
            "machine_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6,
            "meeting_secs": self._time_meeting(),
        }

    def _time_meeting(self) -> float | None:
        """Returns how long workers take to add one number up: of an exchange, what is not for its bytes."""
        if not isinstance(self._loop, SyncLoop) or self._config.strategy != "multiworker":
            return None
        secs = []
        for _ in range(1 + _NUM_MEETINGS):  # the first one compiles
            start = time.perf_counter()
            self._loop.all_reduce_sum([1.0])
            secs.append(time.perf_counter() - start)
        return statistics.median(secs[1:])

    def scale_batch(self, factor: Fraction) -> int:
        """Returns the size of the recipe's batch, of a part of it, or of several."""
        if isinstance(self._source, BatchedSource):
            return self._source.batch_size
        return max(1, int(factor * self._config.global_batch_size))

    def try_way(self, name: str, batch_size: int) -> Timing:
        """Times a way's steps; those of `local_sgd` and `diloco` exchange at each.

        Args:
            name: One of `KINDS`, or `OWN`: steps without an exchange.
            batch_size: Examples of a step, over all workers.

        Raises:
            ConfigError: If this model cannot be trained so.
        """
        loop, config = self._loop, self._config
        settings = {"sync": "local_sgd", "sync_period": _NEVER} if name == OWN else dict(KINDS[name].settings)
        if isinstance(loop, CoordinatorLoop):
            loop.configure(dataclasses.replace(config.ps_options, **settings))
        elif isinstance(loop, SyncLoop):
            if settings.get("sync") in DEFAULT_PERIODS and name != OWN:
                settings["sync_period"] = 1
            loop.configure(dataclasses.replace(config.sync_options, **settings))
            loop.choose_compiler(config.jit_compile, self._source, batch_size)
        check_batches(
            loop,
            self._source,
            config.strategy,
            batch_size=batch_size,
            drop_remainder=config.drop_remainder,
            on_nan="ignore",
        )
        total_steps = (self._count_steps(batch_size) or _NEVER) * config.epochs
        trial = Trial(
            loop=loop,
            source=self._shared,
            batch_size=batch_size,
            total_steps=total_steps,
            steps_per_loop=config.steps_per_loop,
            loss_limit=None if config.on_nan == "ignore" else _no_limit,
        )
        return trial.time()

    def _count_steps(self, batch_size: int) -> int | None:
        config = self._config
        return plan_steps(
            self._source, batch_size, config.steps_per_epoch, drop_remainder=config.drop_remainder
        )


def main(args: Sequence[str] | None = None) -> int:
    """Makes the trials that the command line names.

    Args:
        args: A JSON list of trials, each `[name, "part of the batch"]`, and flags of `tfdist.train`.

    Returns:
        0, or 2 if the recipe or its settings cannot be honoured.
    """
    trials, *words = sys.argv[1:] if args is None else args
    try:
        values = parse_flags(words)
        cluster = detect_cluster(os.environ, strategy=values.strategy, num_ps=values.num_ps)
        fields = resolve_run(values, cluster, os.environ)
        probe = Probe(build_config(fields, load_recipe(fields["recipe"])))
        say = _say if probe.is_chief else _say_nothing
        say({"model": probe.describe()})
        for name, factor in json.loads(trials):
            if probe.has_own_batches and factor != "1":
                continue
            batch_size = probe.scale_batch(Fraction(factor))
            trial: dict[str, Any] = {"name": name, "batch_size": batch_size}
            try:
                say(trial | dataclasses.asdict(probe.try_way(name, batch_size)))
            except ConfigError as error:
                say(trial | {"refused": str(error)})
    except (TfdistError, flags.Error) as error:
        _say({"mistake": " ".join(str(error).split())})
        return 2
    return 0


def _no_limit() -> float:
    return math.inf


def _say(found: Mapping[str, Any]) -> None:
    print(f"{MARK}{json.dumps(found)}", flush=True)


def _say_nothing(found: Mapping[str, Any]) -> None:
    del found


if __name__ == "__main__":
    sys.exit(main())
