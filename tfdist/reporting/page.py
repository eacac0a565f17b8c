"""A page of HTML that tells of one run, or of several side by side; nothing is fetched to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

import tfdist
from tfdist.config.run_dir import RunDir
from tfdist.reporting.figures import draw_curves, draw_step_times, draw_time_line, read_samples
from tfdist.reporting.record import Record, as_number

_STATES = {
    "finished": "Finished.",
    "failed": "Failed.",
    "stopped": "Stopped: it was told to end, and saved its state.",
    "unfinished": "Has not ended, or was killed with all its tasks.",
}
_SPEEDS = {
    "examples_per_sec": "examples a second",
    "input_wait": "share of time spent waiting for input",
    "dispatch_share": "share of time workers had nothing to do",
    "staleness_mean": "mean staleness",
    "exchange_mb": "MB sent by the chief",
    "memory_mb": "most memory of the chief, MB",
    "num_repeated": "steps made twice",
    "num_dropped": "examples dropped",
}
# Numbers of an epoch that are no metric.
_NO_METRICS = (
    *("epoch", "step", "wall_secs", "step_secs", "slowest_worker", "straggler", "steps_per_loop"),
    *("staleness_p95", "staleness_counts", *_SPEEDS),
)


def render_page(records: Sequence[Record]) -> str:
    """Renders the page."""
    speeds = [draw_curves(records, [name], title) for name, title in _SPEEDS.items()]
    return fill_template(
        "tfdist.reporting",
        title=records[0].title if len(records) == 1 else f"{len(records)} runs",
        version=tfdist.__version__,
        records=records,
        states=_STATES,
        numbers=_numbers,
        show=_show,
        curves=[draw_curves(records, names, names[0]) for names in _metric_names(records)],
        speeds=[figure for figure in (*speeds, *map(draw_step_times, records)) if figure],
        views=[
            {
                "record": record,
                "line": draw_time_line(record.events),
                "samples": read_samples(RunDir(record.path).samples_file),
            }
            for record in records
        ],
        said=list(dict.fromkeys(name for record in records for name in record.said_settings)),
        environment=list(dict.fromkeys(name for record in records for name in record.environment)),
    )


def fill_template(package: str, **values: Any) -> str:
    """Renders a package's `page.html.j2`; texts among the values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""), autoescape=True, trim_blocks=True
    )
    return environment.get_template("page.html.j2").render(values)


def _metric_names(records: Sequence[Record]) -> list[list[str]]:
    """Returns each metric's name, with that of its validation behind it if there is one; the loss first."""
    names = {
        name
        for record in records
        for line in record.metrics
        for name, value in line.items()
        if name not in _NO_METRICS and as_number(value) is not None
    }
    plain = sorted((n for n in names if not n.startswith("val_")), key=lambda name: (name != "loss", name))
    alone = sorted(n for n in names if n.startswith("val_") and n.removeprefix("val_") not in names)
    pairs = [[name, *([f"val_{name}"] if f"val_{name}" in names else [])] for name in plain]
    return [*pairs, *([name] for name in alone)]


def _numbers(record: Record) -> Mapping[str, str]:
    test = record.results.get("test", {})
    numbers = {f"test {name}": _show(value) for name, value in test.items()}
    last = record.metrics[-1] if record.metrics else {}
    if not test:
        numbers |= {name: _show(last[name]) for name in ("loss", "val_loss") if name in last}
    numbers["epochs"] = f"{len(record.metrics)} of {record.config['epochs']}"
    if "wall_secs" in last:
        numbers["trained for"] = f"{float(last['wall_secs']):,.0f} s"
    if "examples_per_sec" in last:
        numbers["examples a second"] = f"{float(last['examples_per_sec']):,.0f}"
    num_tries = sum(event.kind == "start" for event in record.events)
    if num_tries > 1:
        numbers["starts"] = str(num_tries)
    return numbers


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_show, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(item)}" for name, item in value.items())
    return str(value)
