"""What every benchmark does alike: contenders in turn, medians with their spread, a table that is kept."""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Row = tuple[str, str, str]


def parse_options(description: str, *, rounds: int, parts: Iterable[str] = ()) -> argparse.Namespace:
    """Returns `rounds`, `write` and `only`, one of `parts`, of this process's command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--write", type=Path, help="Keep the table in this file, in place of the last one.")
    parser.add_argument("--only", choices=list(parts), help="Measure this part alone.")
    return parser.parse_args()


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns each contender's figures, one a round: machines are shared, and change while one measures."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        # A B C, C B A, …: none always runs after the same other.
        for name in contenders if turn % 2 == 0 else reversed(contenders):
            figures[name].append(contenders[name]())
    return figures


def render_spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns `median (minimum–maximum)`."""
    texts = [f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return f"{texts[0]} ({texts[1]}–{texts[2]})"


def divide(upper: Sequence[float], lower: Sequence[float]) -> float:
    """Returns the ratio of the medians."""
    return statistics.median(upper) / statistics.median(lower)


def show(title: str, rows: Sequence[Row], options: argparse.Namespace, *, note: str = "") -> None:
    """Prints a benchmark's table and, if asked, keeps it in its section of a file; what is below it stays.

    Args:
        title: Of the section.
        rows: What was measured, the figure, and what is wanted.
        options: As `parse_options` returned them.
        note: What else is to be known.
    """
    command = f"python {Path(sys.argv[0]).resolve().relative_to(ROOT)}"
    command += f" --only={options.only}" if options.only else ""
    versions = ", ".join(f"{name} {version(name.lower())}" for name in ("TensorFlow", "Keras"))
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    how = f"{date.today()}, {versions}, {os.cpu_count()} cores, {load}, median (spread) of {options.rounds} rounds"
    table = ["| figure | measured | wanted |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    text = "\n".join([f"## {title}", "", f"`{command}`, {how}.{note and ' ' + note}", "", *table]) + "\n"
    print(text)
    if options.write is None:
        return
    options.write.parent.mkdir(exist_ok=True)
    old = options.write.read_text(encoding="utf-8") if options.write.exists() else "# Benchmarks\n"
    # Up to the table's last row: what somebody has written below it stays.
    section = re.compile(rf"^## {re.escape(title)}\n(?:(?!\||## ).*\n)*(?:\|.*\n)*", re.MULTILINE)
    new = section.sub(lambda _: text, old) if section.search(old) else f"{old.rstrip()}\n\n{text}"
    options.write.write_text(f"{new.rstrip()}\n", encoding="utf-8")
