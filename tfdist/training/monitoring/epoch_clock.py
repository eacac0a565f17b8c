"""How fast an epoch goes, and how long the rest of a `fit` will take."""

from collections.abc import Callable


class EpochClock:
    """Measures steps and seconds of each epoch, from what a Keras callback is told.

    Rates leave out the first batches of a `fit`, up to the first `end_batch`: TensorFlow compiles there.

    Args:
        now: Reads a clock, in seconds.
    """

    def __init__(self, *, now: Callable[[], float]) -> None:
        self.now = now
        self.begin_fit()

    def begin_fit(self) -> None:
        """Forgets all epochs."""
        self._warm = False
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Starts counting an epoch's steps."""
        self._start = self.now()
        self._first_batch: int | None = None
        self._last_batch = -1
        self._cold_steps = 0
        self._train_end: float | None = None
        self._test_secs = 0.0

    def begin_batch(self, batch: int) -> None:
        """Notes the index of the epoch's first batch: not 0 if it goes on from a checkpoint."""
        if self._first_batch is None:
            self._first_batch = batch

    def end_batch(self, batch: int) -> None:
        """Counts every batch up to this index as done."""
        self._last_batch = batch
        if not self._warm:
            self._warm = True
            self._cold_steps = self.steps_done
            self._start_cold, self._start = self._start, self.now()

    def begin_test(self) -> None:
        """Stops the epoch's training time, for validation."""
        if self._train_end is None:
            self._train_end = self.now()

    def end_test(self) -> None:
        """Notes how long validation took."""
        if self._train_end is not None:
            self._test_secs = self.now() - self._train_end

    @property
    def steps_done(self) -> int:
        """Steps of this epoch that this process has seen."""
        return self._last_batch + 1 - (self._first_batch or 0)

    @property
    def last_step(self) -> int:
        """Steps of this epoch that are done, whoever did them."""
        return self._last_batch + 1

    @property
    def secs_per_step(self) -> float | None:
        """Mean training time of a step; None before the first."""
        end = self.now() if self._train_end is None else self._train_end
        steps, start = self.steps_done - self._cold_steps, self._start
        if steps == 0 and self._cold_steps:  # Nothing but the compiling call: better than no number.
            steps, start = self._cold_steps, self._start_cold
        return max(end - start, 1e-9) / steps if steps > 0 else None

    def secs_left(self, *, steps: int | None, num_more_epochs: int) -> float | None:
        """Guesses the seconds to the end of a `fit` of so many steps an epoch; None if there is nothing to go by."""
        if steps is None or self.secs_per_step is None:
            return None
        this_epoch = max(steps - self.last_step, 0) * self.secs_per_step
        return this_epoch + num_more_epochs * (steps * self.secs_per_step + self._test_secs)
