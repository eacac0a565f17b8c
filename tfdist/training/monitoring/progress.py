"""What a person sees while a model trains: a bar on a terminal, a line now and then in a log."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import keras
import numpy as np

from tfdist.training.monitoring.epoch_clock import EpochClock

_BAR_SECS = 0.2
_LINE_SECS = 2.0
# From this share of waiting on a faster input would be felt.
_INPUT_BOUND_SHARE = 0.05

Logs = Mapping[str, Any] | Callable[[], Mapping[str, Any] | None] | None


@dataclass(frozen=True)
class Position:
    """Where a run is, ready to be drawn."""

    epoch: int  # from 1
    num_epochs: int
    step: int
    num_steps: int | None
    note: str

    def __str__(self) -> str:
        width = len(str(self.num_epochs))
        steps = "?" if self.num_steps is None else str(self.num_steps)
        return f"epoch {self.epoch:>{width}}/{self.num_epochs}  {self.step:>{len(steps)}}/{steps}  {self.note}".rstrip()


class _Lines:
    """For pipes and files: lines that stay."""

    pause_secs = _LINE_SECS  # between two pictures

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, position: Position) -> None:
        if position.step != position.num_steps:  # The epoch's own line follows.
            self.finish_epoch(position)

    def finish_epoch(self, position: Position) -> None:
        # Flushed, since a pipe would keep minutes of lines back.
        print(position, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """For terminals: a bar that is replaced, at each epoch's end, by a line that stays."""

    pause_secs = _BAR_SECS

    def __init__(self, stream: TextIO) -> None:
        # Inside: a process that draws no bar need not load rich.
        from rich.console import Console

        self._console = Console(file=stream, force_terminal=True)
        self._progress: Any = None

    def draw(self, position: Position) -> None:
        if self._progress is None:
            self._progress = self._start()
            self._task = self._progress.add_task("", total=position.num_steps, note="")
        self._progress.update(
            self._task,
            description=f"epoch {position.epoch}/{position.num_epochs}",
            completed=position.step,
            total=position.num_steps,
            note=position.note,
            refresh=True,
        )

    def _start(self) -> Any:
        # Inside: as above.
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(
                "{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        progress.start()
        # rich hides the cursor, and nothing would bring it back if training ends with an exception.
        self._console.show_cursor(True)
        return progress

    def finish_epoch(self, position: Position) -> None:
        self.close()
        self._console.print(str(position), markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


_Screen = _Lines | _Bar


class ProgressBar(keras.callbacks.Callback):
    """Shows epoch, step, loss, metrics, examples/s, how far input holds it up, and the time left.

    Batch logs may be a mapping, None (the latest still hold), or a callable that gives one of them. They are
    looked at only when a picture is due, so that steps need not wait for a device.

    Args:
        verbose: 0 shows nothing, 2 a line per epoch, 1 and "auto" progress too; None is what `fit` was given.
        stream: Where to; None is `sys.stdout`. A terminal gets a bar, others lines.
        now: Reads a clock, in seconds.
    """

    writes = True

    def __init__(
        self,
        *,
        verbose: int | str | None = None,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._verbose, self._stream = verbose, stream
        self._clock = EpochClock(now=now)
        self._now = now
        self._screen: _Screen | None = None
        self._next_draw = float("inf")
        self._epoch = 0

    def on_train_begin(self, logs: Logs = None) -> None:
        """Chooses the screen."""
        self._close()  # A `fit` that ended with an exception has not.
        verbose = self.params.get("verbose", "auto") if self._verbose is None else self._verbose
        self._level = 1 if verbose == "auto" else int(verbose)
        if self._level:
            self._screen = self._build_screen(self._stream or sys.stdout)
        self._clock.begin_fit()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Starts an epoch's bar."""
        self._epoch = epoch
        self._latest: Logs = None
        self._clock.begin_epoch()
        self._next_draw = float("inf")
        if self._screen is not None and self._level == 1:
            if isinstance(self._screen, _Bar):  # At once: the first step may compile for long.
                self._screen.draw(self._position(None))
            self._next_draw = self._now() + self._screen.pause_secs

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Notes where the epoch begins."""
        self._clock.begin_batch(batch)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Draws, if it is time to."""
        self._clock.end_batch(batch)
        if logs is not None:
            self._latest = logs
        now = self._now()
        if now >= self._next_draw and self._screen is not None:
            self._next_draw = now + self._screen.pause_secs
            self._screen.draw(self._position(self._latest))

    def on_test_begin(self, logs: Logs = None) -> None:
        """Stops the clock of the steps."""
        self._clock.begin_test()

    def on_test_end(self, logs: Logs = None) -> None:
        """Notes how long validation takes."""
        self._clock.end_test()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Leaves the epoch's line."""
        self._clock.begin_test()
        if self._screen is not None:
            self._screen.finish_epoch(self._position(logs))

    def on_train_end(self, logs: Logs = None) -> None:
        """Gives the terminal back."""
        self._close()

    def _build_screen(self, stream: TextIO) -> _Screen:
        shows_bars = stream.isatty() and os.environ.get("TERM") != "dumb"
        return _Bar(stream) if shows_bars and self._level == 1 else _Lines(stream)

    def _close(self) -> None:
        if self._screen is not None:
            self._screen.close()
        self._screen = None

    def _position(self, logs: Logs) -> Position:
        num_epochs, num_steps = self.params.get("epochs") or self._epoch + 1, self.params.get("steps")
        parts = render_metrics((logs() if callable(logs) else logs) or {})
        secs_per_step = self._clock.secs_per_step
        batch_size = self.params.get("global_batch_size")
        if secs_per_step and batch_size:
            parts.append(f"{batch_size / secs_per_step:,.0f} examples/s")
        get_share = self.params.get("input_wait")
        share = get_share and get_share()
        if share and share >= _INPUT_BOUND_SHARE:
            parts.append(f"input-bound {share:.0%}")
        get_measures = self.params.get("measures")
        measures = get_measures() if get_measures else {}
        if measures.get("staleness_mean"):
            parts.append(f"staleness {measures['staleness_mean']:.1f} (95%: {measures['staleness_p95']:.0f})")
        if measures.get("straggler"):
            parts.append(
                f"straggler: worker {measures['slowest_worker']}, {measures['straggler']:.1f} times the median"
            )
        secs_left = self._clock.secs_left(steps=num_steps, num_more_epochs=num_epochs - self._epoch - 1)
        if secs_left is not None:
            parts.append(f"ETA {render_secs(secs_left)}")
        return Position(self._epoch + 1, num_epochs, self._clock.last_step, num_steps, "  ".join(parts))


def render_metrics(logs: Mapping[str, Any]) -> list[str]:
    """Renders each number as "name value", as Keras does: four decimals, or scientific when tiny.

    The loss comes first. Of several numbers under one name there is their mean, as in Keras.
    """
    texts = []
    for name, value in sorted(logs.items(), key=lambda item: item[0] != "loss"):
        try:
            number = float(np.mean(value))
        except (TypeError, ValueError):
            continue
        is_tiny = number != 0 and abs(number) <= 1e-3
        texts.append(f"{name} {number:.4e}" if is_tiny else f"{name} {number:.4f}")
    return texts


def render_secs(secs: float) -> str:
    """Renders a duration as `m:ss`, or `h:mm:ss` from an hour on."""
    whole = round(secs)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
