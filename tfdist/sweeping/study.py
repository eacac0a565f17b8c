"""A sweep: trials that Optuna chooses, kept in a folder, several at once, and gone on with after any end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna

from tfdist.cluster.cores import count_cores
from tfdist.errors import ConfigError
from tfdist.launcher.process import reaper as reaping
from tfdist.launcher.process.children import Reaper
from tfdist.sweeping.space import Range, render_choice
from tfdist.sweeping.trial import TrialRun, build_command

_PRUNERS: dict[str, Callable[..., optuna.pruners.BasePruner]] = {
    "asha": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
}
# Of a trial that takes the place of one that was killed.
_AGAIN_OF = "again_of"
_MISTAKE_CODE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What a sweep is to do.

    Attributes:
        folder: Where the study and the trials' runs are.
        space: The settings that are tried.
        flags: Those of `tfdist.train` that all trials have.
        launch: Flags of `tfdist.launch`, for another backend; empty: each run starts its own cluster.
        num_trials: In all, those of earlier starts and those that were ended early included. One that fails counts if
            it has failed twice.
        num_parallel: At once.
        metric: The number that is to be the best, by its name in `metrics.jsonl`.
        direction: `minimize` or `maximize`.
        pruner: Which trials are ended early.
        grace_epochs: That each trial has before it may be.
        seed: Of what is tried.
    """

    folder: Path
    space: dict[str, Range]
    flags: Sequence[str]
    launch: Sequence[str] = ()
    num_trials: int = 20
    num_parallel: int = 1
    metric: str = "val_loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    pruner: Literal["asha", "hyperband", "none"] = "asha"
    grace_epochs: int = 1
    seed: int = 0


class Sweep:
    """Runs the trials of a study.

    Args:
        options: What to do.
        say: Takes lines for a person.
    """

    def __init__(self, options: SweepOptions, say: Callable[[str], None]) -> None:
        self._options = options
        self._say = say
        self._mark = f"sweep-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._stopped_by: BaseException | signal.Signals | None = None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options.folder.mkdir(parents=True, exist_ok=True)
        build = _PRUNERS.get(options.pruner)
        pruner = build(min_resource=options.grace_epochs) if build else optuna.pruners.NopPruner()
        try:
            self.study = optuna.create_study(
                study_name="sweep",
                storage=f"sqlite:///{options.folder.resolve() / 'study.db'}",
                direction=options.direction,
                pruner=pruner,
                load_if_exists=True,
            )
        except Exception as error:
            raise ConfigError(
                f"sweep_dir={str(options.folder)!r} holds no sweep that can be gone on with "
                f"({' '.join(str(error).split())[:200]}); name another."
            ) from error
        # Of the trials so far, or a sweep that goes on would draw what it has drawn at its start.
        seed = options.seed + len(self.study.get_trials(deepcopy=False))
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=options.num_parallel > 1)
        if self.study.direction.name.lower() != options.direction:
            raise ConfigError(
                f"sweep_dir={str(options.folder)!r} holds a sweep that wants to "
                f"{self.study.direction.name.lower()} its metric; name another, or ask for the same."
            )

    def run(self) -> signal.Signals | None:
        """Runs trials until there are enough, or a signal comes; the same command then goes on.

        Returns:
            The signal; None if there are enough.

        Raises:
            BaseException: If a trial ends with a mistake in the settings, does not have the metric, or cannot be run.
        """
        self._try_lost_again()
        guard = Reaper(self._mark)
        # SIGINT too: whoever starts us in the background lets us ignore it, and Python would.
        previous = {
            number: signal.signal(number, lambda number, frame: self._stop(signal.Signals(number)))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        threads = [
            threading.Thread(target=self._work, args=(guard,), name=f"tfdist-sweep-{i}")
            for i in range(self._options.num_parallel)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            guard.dismiss()
        if isinstance(self._stopped_by, BaseException):
            raise self._stopped_by
        return self._stopped_by

    @property
    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that count."""
        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state in states]

    def run_dir(self, number: int) -> Path:
        """Returns the folder of a trial's run."""
        return self._options.folder / f"trial-{number:04d}"

    def _stop(self, reason: BaseException | signal.Signals) -> None:
        self._stopped_by = self._stopped_by or reason

    def _work(self, guard: Reaper) -> None:
        try:
            while (trial := self._take()) is not None:
                self._run_trial(trial, guard)
        except BaseException as error:  # noqa: BLE001 - in a thread: whoever waits raises it
            self._stop(error)

    def _take(self) -> optuna.Trial | None:
        with self._lock:
            if self._stopped_by is not None or self._count() >= self._options.num_trials:
                return None
            return self.study.ask()

    def _count(self) -> int:
        """Returns the trials that have ended for good, and those that run."""
        states = optuna.trial.TrialState
        trials = self.study.get_trials(deepcopy=False)
        gone = sum(trial.state is states.FAIL and _AGAIN_OF in trial.user_attrs for trial in trials)
        return len(self.finished) + gone + sum(trial.state is states.RUNNING for trial in trials)

    def _run_trial(self, trial: optuna.Trial, guard: Reaper) -> None:
        options = self._options
        try:
            chosen = {name: kind.suggest(trial, name) for name, kind in options.space.items()}
        except ValueError as error:
            raise ConfigError(
                f"sweep_dir={str(options.folder)!r} holds a sweep of another space ({error}); name another folder."
            ) from error
        words = render_choice(chosen)
        self._say(f"trial {trial.number}: {' '.join(words)}")
        command = build_command(
            [*options.flags, *words], self.run_dir(trial.number).resolve(), options.launch
        )
        run = TrialRun(command, self.run_dir(trial.number), self._environment(), guard)

        def note(epoch: int, value: float) -> bool:
            trial.report(value, epoch)
            trial.set_user_attr("last", value)
            return bool(trial.should_prune())

        code, is_pruned = run.follow(
            options.metric, note=note, is_stopped=lambda: self._stopped_by is not None
        )
        last = self.study.get_trials(deepcopy=False)[trial.number].user_attrs.get("last")
        if self._stopped_by is not None and not is_pruned:
            return  # It is tried again when the sweep goes on.
        if is_pruned:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            self._say(f"trial {trial.number}: ended early at {options.metric} {last:.5g}")
        elif code == 0 and last is not None:
            self.study.tell(trial, last)
            self._say(f"trial {trial.number}: {options.metric} {last:.5g}; best {self.study.best_value:.5g}")
        else:
            self._note_failure(trial, run, code)

    def _note_failure(self, trial: optuna.Trial, run: TrialRun, code: int) -> None:
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if code == 0:
            raise ConfigError(
                f"metric={self._options.metric!r}: the runs have none of that name; choose one of "
                f"{', '.join(sorted(run.names))}."
            )
        if code == _MISTAKE_CODE:
            raise ConfigError(f"trial {trial.number} did not start: {run.last_line}")
        self._say(f"trial {trial.number}: failed with exit code {code}: {run.last_line}")
        self._try_again(trial.number)

    def _try_lost_again(self) -> None:
        """Those that an earlier start has left in the middle count as failed."""
        for trial in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            with contextlib.suppress(RuntimeError, ValueError):
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self._try_again(trial.number)

    def _try_again(self, number: int) -> None:
        trial = self.study.get_trials(deepcopy=False)[number]
        if _AGAIN_OF not in trial.user_attrs and trial.params:
            self.study.enqueue_trial(trial.params, user_attrs={_AGAIN_OF: number})

    def _environment(self) -> dict[str, str]:
        share = str(max(1, count_cores() // self._options.num_parallel))
        threads = {"TF_NUM_INTRAOP_THREADS": share, "OMP_NUM_THREADS": share}
        own = threads if self._options.num_parallel > 1 else {}
        return {**own, **os.environ, reaping.MARK_VARIABLE: self._mark}


def describe_importance(study: optuna.Study) -> dict[str, float]:
    """Returns how much each setting has mattered, in shares of 1; empty where too few trials tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of trials that are all alike
            found: dict[str, Any] = optuna.importance.get_param_importances(study)
    except (RuntimeError, ValueError, ImportError):
        return {}
    return {name: float(share) for name, share in found.items()}
