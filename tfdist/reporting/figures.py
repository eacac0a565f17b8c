"""The pictures of a report, as SVG: curves, where the time went, and what happened when."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator

from tfdist.launcher.events import Event
from tfdist.reporting.record import Record

# Okabe and Ito's, which colour-blind readers tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999")
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_PARTS = ("input", "compute", "exchange", "update", "between")
_KINDS = {
    "start": ("o", "#009e73"),
    "chaos": ("X", "#e69f00"),
    "exit": ("s", "#0072b2"),
    "failure": ("s", "#d55e00"),
}


def draw_curves(records: Sequence[Record], names: Sequence[str], title: str) -> str:
    """Draws numbers over epochs, of each run in its colour; validation is dashed.

    Args:
        records: The runs.
        names: Of the numbers: of training, and of validation if there is any.
        title: What they are.

    Returns:
        SVG; "" if no run has any.
    """
    figure, axes = _new_figure()
    is_empty = True
    for record, colour in zip(records, itertools.cycle(_COLOURS), strict=False):
        for name, style in zip(names, ("-", "--"), strict=False):
            epochs, values = record.series(name)
            if not values:
                continue
            is_empty = False
            words = ([record.name] if len(records) > 1 else []) + (
                ["validation" if style == "--" else "training"] if len(names) > 1 else []
            )
            axes.plot(epochs, values, style, color=colour, marker="." if len(values) < 30 else None,
                      label=" ".join(words))  # fmt: skip
    if is_empty:
        return ""
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(records) > 1 or len(names) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _render(figure)


def draw_step_times(record: Record) -> str:
    """Draws where a step's time went on each worker, the median over the epochs; "" where nobody has measured it."""
    epochs = [line["step_secs"] for line in record.metrics if line.get("step_secs")]
    # The first one holds what is compiled.
    epochs = [workers for workers in epochs[1:] or epochs if len(workers) == len(epochs[-1])]
    if not epochs:
        return ""
    num_workers = len(epochs[-1])
    figure, axes = _new_figure(height=1.2 + 0.35 * num_workers)
    left = np.zeros(num_workers)
    for part, colour in zip(_PARTS, _COLOURS, strict=False):
        widths = np.array(
            [1e3 * np.median([w[i].get(part, 0.0) for w in epochs]) for i in range(num_workers)]
        )
        axes.barh(range(num_workers), widths, left=left, color=colour, label=part)
        left += widths
    axes.set_yticks(range(num_workers), [f"worker {i}" for i in range(num_workers)])
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.set_title("Where a step's time went")
    _put_legend_below(figure, num_columns=5)
    return _render(figure)


def draw_time_line(events: Sequence[Event]) -> str:
    """Draws which tasks started, ended and failed when; "" where a launcher has noted nothing."""
    tasks = sorted({event.task for event in events if event.task})
    if not tasks:
        return ""
    begin = events[0].at
    figure, axes = _new_figure(height=1.1 + 0.3 * len(tasks))
    for event in events:
        kind = "failure" if event.kind == "exit" and event.exit_code else event.kind
        if kind not in _KINDS:
            continue
        marker, colour = _KINDS[kind]
        rows = range(len(tasks)) if event.task is None else [tasks.index(event.task)]
        axes.plot(
            [event.at - begin] * len(rows),
            list(rows),
            marker,
            color=colour,
            markersize=7,
            zorder=3 if kind == "failure" else 2,
        )
    for kind, (marker, colour) in _KINDS.items():
        axes.plot([], [], marker, color=colour, label=kind)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlabel("seconds since the start")
    axes.set_title("What happened when")
    _put_legend_below(figure, num_columns=4)
    return _render(figure)


def draw_bars(values: Mapping[str, float], title: str) -> str:
    """Draws a bar for each name, the longest first; "" if there is none."""
    if not values:
        return ""
    figure, axes = _new_figure(height=1.0 + 0.3 * len(values))
    names = sorted(values, key=lambda name: -values[name])
    axes.barh(range(len(names)), [values[name] for name in names], color=_COLOURS[0])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title)
    return _render(figure)


def draw_efficiency(curves: Mapping[str, Mapping[int, float]]) -> str:
    """Draws efficiency by the number of workers, a curve for each name.

    Args:
        curves: Name → number of workers → share of what so many single devices would do.
    """
    figure, axes = _new_figure()
    for (name, values), colour in zip(curves.items(), itertools.cycle(_COLOURS), strict=False):
        axes.plot(list(values), list(values.values()), marker=".", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("workers")
    axes.set_title("Efficiency: 1 is as many times one device")
    _put_legend_below(figure, num_columns=5)
    return _render(figure)


def read_samples(path: Path) -> list[Mapping[str, Any]]:
    """Returns predictions right and wrong as pictures: `image` (a data URL), `label`, `predicted`, `is_right`."""
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as stored:
        images, labels, predicted = stored["images"], stored["labels"], stored["predicted"]
    return [
        {
            "image": _as_png(image),
            "label": int(label),
            "predicted": int(guess),
            "is_right": bool(label == guess),
        }
        for image, label, guess in zip(images, labels, predicted, strict=True)
    ]


def _as_png(image: np.ndarray) -> str:
    image = image[..., 0] if image.shape[-1] == 1 else image[..., :3]
    low, high = float(image.min()), float(image.max())
    buffer = io.BytesIO()
    imsave(buffer, (image - low) / max(high - low, 1e-9), cmap="gray", format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _new_figure(height: float = 2.8) -> tuple[Figure, Any]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        return figure, figure.subplots()


def _put_legend_below(figure: Figure, *, num_columns: int) -> None:
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=num_columns)


def _render(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
