"""A transformer of 12 blocks in two stages on a core each, against one process on one core.

python benchmarks/model_parallel.py [--rounds=5] [--write=docs/benchmarks.md]
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import ROOT, Row, divide, parse_options, render_spread, show, take_turns
from model_parallel_program import BATCH, NUM_LAYERS, WIDTH

from tfdist.training.pipeline.schedule import idle_share

PROGRAM = str(ROOT / "benchmarks/model_parallel_program.py")
MICRO_BATCHES = (2, 8)


def run(found: dict[str, list[dict[str, Any]]], name: str, words: list[str], rest: list[str]) -> float:
    """Returns the seconds of a step, and keeps all that the program says."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        done = subprocess.run(
            [*words, PROGRAM, out, *rest], env=env, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        figures = json.loads(Path(out).read_text())
    found.setdefault(name, []).append(figures)
    print(name, figures, file=sys.stderr, flush=True)
    return float(figures["step_secs"])


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    options = parse_options(str(__doc__), rounds=5)
    found: dict[str, list[dict[str, Any]]] = {}
    launch = [
        sys.executable,
        "-m",
        "tfdist.launch",
        "--strategy=pipeline",
        "--num_workers=2",
        "--num_threads=1",
    ]
    alone = ["taskset", "-c", "0", sys.executable]
    contenders = {"alone": functools.partial(run, found, "alone", alone, ["one_device", "1"])}
    for count in MICRO_BATCHES:
        name = f"1f1b {count}"
        contenders[name] = functools.partial(run, found, name, launch, ["pipeline", str(count)])
    last = MICRO_BATCHES[-1]
    contenders["gpipe"] = functools.partial(run, found, "gpipe", launch, ["pipeline", str(last), "gpipe"])
    secs = take_turns(contenders, options.rounds)
    rows: list[Row] = []
    for count in MICRO_BATCHES:
        name, ideal = f"1f1b {count}", 2 * (1 - idle_share(2, count))
        wanted = "≥ 1.5" if count == last else ""
        rows.append(
            (
                f"two stages, {count} micro-batches: examples/s ÷ one process (at best {ideal:.2f})",
                f"{divide(secs['alone'], secs[name]):.2f}",
                wanted,
            )
        )
        idle = [figures["idle"] for figures in found[name]]
        wanted = f"≤ {1.3 * idle_share(2, count):.3f}" if count == last else ""
        rows.append(
            (f"… idle share ({idle_share(2, count):.3f} by the formula)", render_spread(idle), wanted)
        )
    memory = {name: [figures["memory_mb"] for figures in parts] for name, parts in found.items()}
    for name in (f"1f1b {last}", "gpipe"):
        rows.append(
            (
                f"largest process's memory ÷ one process's, {name.split()[0]}, {last} micro-batches",
                f"{divide(memory[name], memory['alone']):.2f}",
                "≤ 0.60" if name != "gpipe" else "",
            )
        )
    rows.append(("one process, ms a step", render_spread([1e3 * s for s in secs["alone"]], 0), ""))
    show(
        "A model in stages",
        rows,
        options,
        note=f"text_lm, {NUM_LAYERS} blocks of width {WIDTH}, {BATCH} examples a step, AdamW.",
    )


if __name__ == "__main__":
    main()
