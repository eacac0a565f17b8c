"""Reads runs, and writes the page that tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tfdist.config.run_dir import write_named


def write_report(run_dirs: Sequence[str], output: str | None = None) -> Path:
    """Writes the page.

    Args:
        run_dirs: The runs' folders.
        output: The file; None: `report.html` in the folder, of several here. One that exists is replaced.

    Raises:
        ConfigError: If a folder holds no run, or the page cannot be written.
    """
    # Here: drawing takes half a second to import, and `--help` none.
    from tfdist.reporting.page import render_page
    from tfdist.reporting.record import read_record

    records = [read_record(folder) for folder in run_dirs]
    path = (
        Path(output).expanduser()
        if output
        else Path(run_dirs[0] if len(run_dirs) == 1 else ".") / "report.html"
    )
    write_named(path, render_page(records), flag="output")
    return path
