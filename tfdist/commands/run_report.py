"""What is written behind a run: its page, and what has ended it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tfdist.config.run_config import RunConfig
from tfdist.config.run_dir import RunDir
from tfdist.reporting import is_wanted
from tfdist.reporting.write import write_report


@contextlib.contextmanager
def reporting(config: RunConfig, *, keeps_error: bool = False) -> Iterator[None]:
    """Writes the page of the run inside, of one that has died too, but not of one that was refused.

    Args:
        config: Of the run.
        keeps_error: Whether an exception that ends it is kept with its results: no launcher does.
    """
    before = _stamp(config)

    def has_begun() -> bool:
        return config.mode == "train" and _stamp(config) != before

    try:
        yield
    except Exception as error:
        if keeps_error and has_begun():
            with contextlib.suppress(OSError):  # a full disk, maybe
                RunDir(Path(config.run_dir)).write_results({"error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        if has_begun() and is_wanted(config.report):
            _report(config)


def _stamp(config: RunConfig) -> tuple[int, int] | None:
    """Returns what changes when a run begins: whoever was refused has changed nothing, and shall not."""
    path = RunDir(Path(config.run_dir)).config_file
    found = path.stat() if path.exists() else None
    return found and (found.st_ino, found.st_mtime_ns)


def _report(config: RunConfig) -> None:
    try:
        path = write_report([config.run_dir])
    except Exception as error:  # noqa: BLE001 - the run is what counts
        print(f"tfdist.train: no report ({type(error).__name__}: {error})", file=sys.stderr)
        return
    print(f"the report is in {path}", flush=True)
