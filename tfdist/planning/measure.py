"""Trials on this machine or on hosts: clusters of each size, started one after the other, and what they have found."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from tfdist.errors import ConfigError, TfdistError
from tfdist.launcher.process import reaper as reaping
from tfdist.launcher.process.children import Reaper
from tfdist.planning.ways import MARK, flags_of

# A name, and the part of the recipe's batch, or the multiple, that a step takes.
Trial = tuple[str, Fraction]
_MISTAKE_CODE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """A cluster's trials.

    Attributes:
        num_workers: That it had.
        model: What `Probe.describe` says.
        timings: Of each trial, by its name and its batch's size, the fields of `Timing`.
        refused: Why a trial was not made, by its name.
        start_secs: From the command to a model that is ready to train.
    """

    num_workers: int
    model: Mapping[str, Any]
    timings: Mapping[tuple[str, int], Mapping[str, Any]]
    refused: Mapping[str, str]
    start_secs: float

    def secs(self, name: str, batch_size: int) -> float | None:
        """Returns how long a step took; None if it was not tried."""
        timing = self.timings.get((name, batch_size))
        return None if timing is None else float(timing["secs"])


@dataclasses.dataclass(kw_only=True)
class Worlds:
    """Starts clusters, one at a time; all are gone when this is closed.

    Attributes:
        launch: Flags of `tfdist.launch`: where.
        train: Flags of `tfdist.train`: what.
        note: Told of each trial that is done.
        hear: Told of each other line that a cluster prints.
    """

    launch: Sequence[str]
    train: Sequence[str]
    note: Callable[[], None]
    hear: Callable[[str], None]

    def __post_init__(self) -> None:
        self._mark = f"plan-{os.getpid()}-{secrets.token_hex(4)}"
        self._guard = Reaper(self._mark)

    def __enter__(self) -> Worlds:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._guard.dismiss()

    def run(
        self,
        strategy: str,
        num_workers: int,
        trials: Sequence[Trial],
        settings: Mapping[str, Any] | None = None,
    ) -> World:
        """Makes trials in a cluster of their own.

        Args:
            strategy: Canonical name.
            num_workers: That compute.
            trials: Which.
            settings: Of `tfdist.train`, besides the user's.

        Raises:
            ConfigError: If the recipe or its settings cannot be honoured.
            TfdistError: If the cluster failed.
        """
        size = [f"--strategy={strategy}", f"--num_workers={num_workers}"]
        command = [sys.executable, "-m", "tfdist.launch", *self.launch, *size, "--max_restarts=0"]
        command += [
            "-m",
            "tfdist.planning.probe",
            json.dumps([(name, str(factor)) for name, factor in trials]),
        ]
        command += flags_of(strategy, self.train)
        command += [f"--{name}={value}" for name, value in (settings or {}).items()]
        model: Mapping[str, Any] = {}
        timings: dict[tuple[str, int], Mapping[str, Any]] = {}
        refused: dict[str, str] = {}
        begun = time.monotonic()
        start_secs = 0.0
        for found in self._read(command):
            if "model" in found:
                model, start_secs = found["model"], time.monotonic() - begun
                continue
            self.note()
            if "refused" in found:
                refused[found["name"]] = found["refused"]
            else:
                key = found["name"], found["batch_size"]
                # Of one that was made twice the faster one: what disturbs a trial makes it slower.
                timings[key] = min(found, timings.get(key, found), key=lambda trial: trial["secs"])
        return World(
            num_workers=num_workers, model=model, timings=timings, refused=refused, start_secs=start_secs
        )

    def _read(self, command: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        env = {**os.environ, reaping.MARK_VARIABLE: self._mark, "TF_CPP_MIN_LOG_LEVEL": "3"}
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._guard.add(process.pid)
        last = said = ""  # of the launcher, and of a task: `[worker:0] …`
        mistake = None
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    _, mark, text = line.partition(MARK)
                    if not mark:
                        last = line.strip() or last
                        said = line.strip() if line.startswith("[") and len(line.split()) > 1 else said
                        self.hear(line.rstrip())
                        continue
                    found = json.loads(text)
                    mistake = mistake or found.get("mistake")
                    if "mistake" not in found:
                        yield found
            finally:
                process.terminate()  # the launcher ends its tasks; nothing, if it has come to its end
        if mistake is not None:
            raise ConfigError(mistake)
        if process.returncode == _MISTAKE_CODE:
            raise ConfigError(last.partition("tfdist.launch: ")[2] or last)
        if process.returncode:
            raise TfdistError(
                f"a trial ended with exit code {process.returncode}: {said or last} (--verbose shows all)"
            )
