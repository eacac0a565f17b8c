"""A plan as lines for a person: what each way will cost, and the best ones as commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tfdist.planning.predict import Prediction
from tfdist.planning.ways import flags_of

# A machine more must be worth it.
_ABOUT = 0.05
_HEADS = (
    "way",
    "workers",
    "batch",
    "ms a step",
    "examples/s",
    "MB/s sent",
    "MB of memory",
    "hours",
    "limit",
    "answer",
)


def render_table(model: Mapping[str, Any], predictions: Sequence[Prediction]) -> str:
    """Renders what is expected, a line for each way."""
    examples = f"{model['num_examples']:,}" if model["num_examples"] else "streamed"
    title = (
        f"{model['recipe']}: {model['num_parameters']:,} parameters, {model['gradient_mb']:,.2f} MB of gradients, "
        f"{examples} examples, {model['epochs']} epochs"
    )
    rows = [_HEADS, *map(_cells, predictions)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    lines = []
    for row in rows:
        # Words to the left, numbers to the right.
        cells = [
            cell.ljust(width) if i in (0, 8, 9) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([title, "", *lines])


def render_best(
    predictions: Sequence[Prediction], batch_size: int, train: Sequence[str], place: Sequence[str]
) -> str:
    """Renders the fastest ways of the recipe's own batch: with one device's answer, and of all.

    Args:
        predictions: All.
        batch_size: The recipe's: a larger one is another training.
        train: Flags of `tfdist.train` that the user gave.
        place: Flags that say where, for ways of several workers.
    """
    comparable = [p for p in predictions if p.way.batch_size == batch_size]
    alone = next((p for p in comparable if p.way.name == "one_device"), None)
    exact, any_way = find_best(comparable, is_exact=True), find_best(comparable)
    best_ones = [(exact, "fastest with one device's answer")]
    if any_way is not exact:
        best_ones.append((any_way, "fastest of all; its answer differs"))
    lines = []
    for best, words in best_ones:
        way = best.way
        own = [w for w in flags_of(way.kind.strategy, train) if not w.startswith("--global_batch_size=")]
        where = place if way.kind.has_workers else ()
        command = shlex.join(["python", "-m", "tfdist.train", *own, *where, *way.flags()])
        times = ""
        if alone is not None and best is not alone:
            times = f", {alone.step_secs / best.step_secs:.2g} times as fast as one_device"
        size = f" with {way.num_workers} workers" if way.kind.has_workers else ""
        lines.append(f"{words}: {way.name}{size}{times}\n  {command}")
    return "\n".join(lines)


def find_best(predictions: Sequence[Prediction], *, is_exact: bool = False) -> Prediction:
    """Returns the one with the fewest workers of those that are about as fast as the fastest."""
    found = [p for p in predictions if p.way.kind.is_exact or not is_exact]
    most = max(p.examples_per_sec for p in found)
    good = [p for p in found if p.examples_per_sec >= (1 - _ABOUT) * most]
    return min(good, key=lambda p: (p.way.num_workers, -p.examples_per_sec))


def _cells(prediction: Prediction) -> tuple[str, ...]:
    way = prediction.way
    sent, hours = prediction.sent_mb_per_sec, prediction.hours
    return (
        way.name,
        str(way.num_workers),
        f"{way.batch_size:,}",
        f"{1e3 * prediction.step_secs:,.1f}",
        f"{prediction.examples_per_sec:,.0f}",
        "" if sent is None else f"{sent:,.2f}",
        f"{prediction.memory_mb:,.0f}",
        "" if hours is None else f"{hours:,.2f}" if hours >= 0.01 else f"{hours:.1g}",
        prediction.limit,
        "exact" if way.kind.is_exact else "differs",
    )
