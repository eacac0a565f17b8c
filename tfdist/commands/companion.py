"""The process that the chief of a run starts to evaluate its checkpoints, and starts again if it dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from tfdist.cluster.environments.mpi import drop_rank
from tfdist.cluster.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from tfdist.commands.flags import OF_A_FOLLOWER
from tfdist.config.run_config import RunConfig

# The process that started a follower, which ends with it; and that it is to evaluate what is there and no more.
PARENT_VARIABLE, LAST_VARIABLE = "TFDIST_FOLLOWED_BY", "TFDIST_FOLLOW_LAST"
_MAX_STARTS = 4
# It is nobody's task, and has no accelerator: its numbers are not worth a step's time.
_LEFT_OUT = ("TF_CONFIG", HEARTBEAT_VARIABLE)
_OWN = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "2",
}


class Companion:
    """Follows a run from a process of its own, which takes the time that is left over; a context.

    On leaving well it waits until the last checkpoint is evaluated.

    Args:
        config: The run's.
        warn: Takes a line about its end.
    """

    def __init__(self, config: RunConfig, warn: Callable[[str], None]) -> None:
        # The folder may still hold an earlier run's settings.
        own = {name: getattr(config, name) for name in OF_A_FOLLOWER}
        flags = [f"--{name}={value}" for name, value in own.items() if value is not None]
        self._command = [
            sys.executable,
            "-m",
            "tfdist.train",
            "--mode=follow",
            f"--run_dir={config.run_dir}",
            *flags,
        ]
        self._warn = warn
        self._num_starts = 0
        self._lock = threading.Lock()
        self._is_ending = False

    def __enter__(self) -> Companion:
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch, name="tfdist-evaluator", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: Any) -> None:
        with self._lock:
            self._is_ending = True
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM if kind is None else signal.SIGKILL)
        self._thread.join()
        code = self._process.wait()
        while kind is None and code < 0 and self._num_starts < _MAX_STARTS:
            if code != -signal.SIGTERM:  # else it had not even begun to listen
                self._warn(f"the evaluator was killed by signal {-code}; starting it again for what is left")
            code = self._start({LAST_VARIABLE: "1"}).wait()

    def _start(self, more: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        self._num_starts += 1
        env = {name: value for name, value in drop_rank(os.environ).items() if name not in _LEFT_OUT}
        env |= _OWN | {PARENT_VARIABLE: str(os.getpid())} | (more or {})
        return subprocess.Popen(self._command, env=env, stdin=subprocess.DEVNULL)

    def _watch(self) -> None:
        while True:
            code = self._process.wait()
            with self._lock:
                if self._is_ending or code in (0, 128 + signal.SIGINT):
                    return
                if code == 2 or self._num_starts >= _MAX_STARTS:
                    self._warn(
                        f"the evaluator ended with code {code}, and is not started again; training goes on"
                    )
                    return
                self._warn(f"the evaluator ended with code {code}; starting it again")
                self._process = self._start()
