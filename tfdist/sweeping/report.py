"""What a sweep has found: a page with all trials, and the best one as a command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import optuna

from tfdist.config.run_dir import write_atomically
from tfdist.errors import ConfigError
from tfdist.reporting.figures import draw_bars, draw_curves
from tfdist.reporting.page import fill_template
from tfdist.reporting.record import Record, read_record
from tfdist.sweeping.space import render_choice
from tfdist.sweeping.study import Sweep, SweepOptions, describe_importance

# Curves of more would hide each other.
_MAX_CURVES = 6


def write_sweep_report(sweep: Sweep, options: SweepOptions) -> str:
    """Writes `report.html` into the folder of a sweep of which a trial has ended; returns the best one, for people."""
    path = options.folder / "report.html"
    trials = sorted(sweep.finished, key=lambda trial: _rank(trial, options.direction))
    best = trials[0]
    command = shlex.join(["python", "-m", "tfdist.train", *options.flags, *render_choice(best.params)])
    importance = describe_importance(sweep.study)
    records = _read_records(sweep, trials[:_MAX_CURVES])
    page = fill_template(
        "tfdist.sweeping",
        metric=options.metric,
        trials=trials,
        all_trials=sweep.study.get_trials(deepcopy=False),
        names=list(options.space),
        best=best,
        command=command,
        curves=draw_curves(records, [options.metric], options.metric) if records else "",
        importance=draw_bars(importance, "How much each setting has mattered"),
    )
    write_atomically(path, page)
    return (
        f"best: trial {best.number}, {options.metric} {best.user_attrs.get('last', best.value):.5g}\n"
        f"  {command}\nthe report is in {path}"
    )


def _rank(trial: optuna.trial.FrozenTrial, direction: str) -> tuple[bool, float]:
    """Orders trials: those that came to their end first, the better ones before the others."""
    value = float(trial.user_attrs.get("last", 0.0))
    return trial.state is not optuna.trial.TrialState.COMPLETE, value if direction == "minimize" else -value


def _read_records(sweep: Sweep, trials: Sequence[optuna.trial.FrozenTrial]) -> list[Record]:
    records = []
    for trial in trials:
        try:
            records.append(read_record(str(sweep.run_dir(trial.number))))
        except ConfigError:  # its folder was removed
            continue
    return records
