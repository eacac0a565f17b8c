"""A transformer of 12 blocks, divided over two processes on a core each, against one process on one core.

    python benchmarks/model_parallel.py [--rounds=3] [--only=stages] [--write=docs/benchmarks.md]

`stages`: by its layers. `blocks`: one whose training takes 7 GB in one process, in blocks of its layers, and by its
layers. `ways`: what all strategies make of a smaller one, with a picture. `torch`, which is installed for it: the deep
one in stages of `torch.distributed.pipelining`. `link` needs root: stages behind 100 Mbit/s, against what the steps on
this machine and the bytes foretell.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from figures import ROOT, Row, divide, parse_options, render_spread, show, take_turns
from lab import linked_hosts
from model_parallel_program import MODELS

from recipes.text_lm import VOCABULARY_SIZE
from tfdist.training.pipeline.schedule import foretell_step_secs, idle_share

PROGRAM = str(ROOT / "benchmarks/model_parallel_program.py")
MICRO_BATCHES = (2, 8)
# What a link of that rate carries of what programs send: frames and acknowledgements have their part.
RATE, USEFUL = "100mbit", 0.94
# A backward pass takes two of a forward one.
FORWARD_SHARE = 1 / 3
ALONE = ["taskset", "-c", "0", sys.executable]
ONE, STAGES, BLOCKS = "one process", "`pipeline`, 2 stages", "`pipeline`, 2 blocks"
Found = dict[str, list[dict[str, Any]]]


def run(found: Found, name: str, words: Sequence[str], rest: Sequence[str]) -> float:
    """Returns the seconds of a step, and keeps all that the program says."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        done = subprocess.run(
            [*words, PROGRAM, out, *rest], env=env, capture_output=True, text=True, timeout=900
        )
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        figures = json.loads(Path(out).read_text())
    found.setdefault(name, []).append(figures)
    print(name, figures, file=sys.stderr, flush=True)
    return float(figures["step_secs"])


def launch(strategy: str, *more: str) -> list[str]:
    """Returns the command that starts two processes, of a core each."""
    words = [f"--strategy={strategy}", "--num_workers=2", "--num_threads=1", *more]
    return [sys.executable, "-m", "tfdist.launch", *words]


def memory_of(found: Found, name: str) -> list[float]:
    """Returns the most memory of any process, in MB, one a round."""
    return [float(figures["memory_mb"]) for figures in found[name]]


def measure_stages(rounds: int) -> Iterator[Row]:
    """Yields what stages are worth on a deep model."""
    found: Found = {}
    contenders = {"alone": functools.partial(run, found, "alone", ALONE, ["deep"])}
    for count in MICRO_BATCHES:
        name = f"1f1b {count}"
        rest = ["deep", "2", str(count), "1"]
        contenders[name] = functools.partial(run, found, name, launch("pipeline"), rest)
    last = MICRO_BATCHES[-1]
    rest = ["deep", "2", str(last), "1", "gpipe"]
    contenders["gpipe"] = functools.partial(run, found, "gpipe", launch("pipeline"), rest)
    secs = take_turns(contenders, rounds)
    for count in MICRO_BATCHES:
        name, ideal = f"1f1b {count}", 2 * (1 - idle_share(2, count))
        what = f"two stages, {count} micro-batches: examples/s ÷ one process (at best {ideal:.2f})"
        yield what, f"{divide(secs['alone'], secs[name]):.2f}", "≥ 1.5" if count == last else ""
        idle = [figures["idle"] for figures in found[name]]
        wanted = f"≤ {1.3 * idle_share(2, count):.3f}" if count == last else ""
        yield f"… idle share ({idle_share(2, count):.3f} by the formula)", render_spread(idle), wanted
    for name in (f"1f1b {last}", "gpipe"):
        ratio = divide(memory_of(found, name), memory_of(found, "alone"))
        yield f"… largest process's memory ÷ one process's, {name.split()[0]}", f"{ratio:.2f}", ""
    yield "one process, ms a step", render_spread([1e3 * s for s in secs["alone"]], 0), ""


def measure_blocks(rounds: int) -> Iterator[Row]:
    """Yields what blocks are worth on a large model, and stages on the same."""
    found: Found = {}
    contenders = {ONE: functools.partial(run, found, ONE, ALONE, ["large"])}
    for name, rest in ((BLOCKS, ["1", "1", "2"]), (STAGES, ["2", "2", "1"])):
        contenders[name] = functools.partial(run, found, name, launch("pipeline"), ["large", *rest])
    secs = take_turns(contenders, rounds)
    for name in (BLOCKS, STAGES):
        speed, memory = divide(secs[ONE], secs[name]), memory_of(found, name)
        yield f"{name}: examples/s ÷ one process", f"{speed:.2f}", "≥ 1.5" if name == BLOCKS else ""
        ratio = divide(memory, memory_of(found, ONE))
        yield "… largest process's memory ÷ one process's", f"{ratio:.2f}", "≤ 0.60"
    yield "one process, ms a step", render_spread([1e3 * s for s in secs[ONE]], 0), ""
    yield "… memory, GB", render_spread([size / 1e3 for size in memory_of(found, ONE)], 1), ""


def measure_ways(rounds: int) -> Iterator[Row]:
    """Yields speed and memory of every strategy on a wide model, with two workers of a core each."""
    found: Found = {}
    commands = {
        ONE: (ALONE, ["wide"]),
        "`multiworker`": (launch("multiworker"), ["wide"]),
        "`ps`, 2 ps tasks": (launch("ps", "--num_ps=2"), ["wide"]),
        STAGES: (launch("pipeline"), ["wide", "2", "2", "1"]),
        BLOCKS: (launch("pipeline"), ["wide", "1", "1", "2"]),
    }
    contenders = {name: functools.partial(run, found, name, *words) for name, words in commands.items()}
    secs = take_turns(contenders, rounds)
    # Under ps each worker's step is a batch of its own.
    speed = {name: MODELS["wide"].batch_size / statistics.median(times) for name, times in secs.items()}
    memory = {name: statistics.median(memory_of(found, name)) for name in commands}
    for name in commands:
        yield f"{name}: examples/s", f"{speed[name]:.2f}", ""
        yield "… largest process, GB", render_spread([m / 1e3 for m in memory_of(found, name)], 2), ""
        if name != ONE:
            yield "… examples/s ÷ one process", f"{divide(secs[ONE], secs[name]):.2f}", ""
            ratio = divide(memory_of(found, name), memory_of(found, ONE))
            yield "… memory ÷ one process's", f"{ratio:.2f}", ""
    _draw(speed, memory)


def _draw(speed: dict[str, float], memory: dict[str, float]) -> None:
    # Here: the other parts do without.
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "tfdist"
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name in speed:
        plain = name.replace("`", "")
        axes.scatter(memory[name] / 1e3, speed[name], s=60)
        axes.annotate(plain, (memory[name] / 1e3, speed[name]), xytext=(6, 6), textcoords="offset points")
    axes.set(
        xlabel="memory of the largest process, GB",
        ylabel="examples per second",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.margins(x=0.25, y=0.2)
    figure.savefig(ROOT / "docs/divide.svg", metadata={"Date": None})


def measure_link(rounds: int) -> Iterator[Row]:
    """Yields how long stages behind a slow link take, and how long they were foretold to."""
    found: Found = {}
    count, size = 4, MODELS["link"]
    rest = ["link", "2", str(count), "1"]
    with (
        tempfile.TemporaryDirectory() as fast_folder,
        linked_hosts(Path(fast_folder), 2) as fast,
        tempfile.TemporaryDirectory() as slow_folder,
        linked_hosts(Path(slow_folder), 2, rate=RATE) as slow,
    ):
        contenders = {}
        for name, hosts in (("fast", fast), ("slow", slow)):
            place = [f"--hosts={','.join(host.name for host in hosts.hosts)}", f"--ssh_config={hosts.config}"]
            words = launch("pipeline", *place)
            contenders[name] = functools.partial(run, found, name, words, rest)
        secs = take_turns(contenders, rounds)
    step = statistics.median(secs["fast"])
    # Between two blocks: what goes on of each character, float32.
    num_bytes = size.batch_size / count * 128 * size.width * 4
    forward = step * FORWARD_SHARE / (count + 1)
    foretold = foretell_step_secs(
        "1f1b",
        count,
        forward=[forward] * 2,
        backward=[forward / FORWARD_SHARE - forward] * 2,
        crossing=[num_bytes / (1e8 / 8 * USEFUL)],
    )
    yield f"two stages behind {RATE}, ms a step", render_spread([1e3 * s for s in secs["slow"]], 0), ""
    yield "… on a fast link", render_spread([1e3 * s for s in secs["fast"]], 0), ""
    yield "… foretold ÷ measured", f"{foretold / statistics.median(secs['slow']):.2f}", "0.85–1.15"


def measure_torch(rounds: int) -> Iterator[Row]:
    """Yields how long torch takes for a step of the deep model in two stages, by ours."""
    size, count = MODELS["deep"], MICRO_BATCHES[-1]
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        install = [f"{folder}/venv/bin/pip", "install", "--quiet", "torch==2.13.0", "numpy"]
        subprocess.run(install, check=True)

        def run_torch() -> float:
            out = Path(folder) / "out.json"
            shape = (size.num_layers, size.width, size.num_heads, size.batch_size, size.num_steps, count)
            words = [f"{folder}/venv/bin/python", str(ROOT / "benchmarks/model_parallel_torch.py"), str(out)]
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = str(probe.getsockname()[1])
            numbers = [str(number) for number in (*shape, VOCABULARY_SIZE, 128)]
            tasks = [subprocess.Popen([*words, rank, port, *numbers]) for rank in "01"]
            if any([task.wait(600) for task in tasks]):
                raise RuntimeError("torch has failed; its own words are above")
            secs = float(json.loads(out.read_text())["step_secs"])
            print("torch", secs, file=sys.stderr, flush=True)
            return secs

        ours = functools.partial(run, found, "1f1b", launch("pipeline"), ["deep", "2", str(count), "1"])
        alone = functools.partial(run, found, "alone", ALONE, ["deep"])
        secs = take_turns({"torch": run_torch, "tfdist": ours, "alone": alone}, rounds)
    at_best = 2 * (1 - idle_share(2, count))
    for name in ("torch", "tfdist"):
        what = f"{name}, two stages, {count} micro-batches, ms a step"
        yield what, render_spread([1e3 * s for s in secs[name]], 0), ""
    yield "… torch ÷ tfdist", f"{divide(secs['torch'], secs['tfdist']):.2f}", "≥ 1.2"
    what = f"… torch ÷ one process of tfdist, {at_best:.2f} times as fast: what no schedule exceeds"
    yield what, f"{divide(secs['torch'], secs['alone']) * at_best:.2f}", ""


PARTS = {
    "stages": ("A model in stages", measure_stages, "deep"),
    "blocks": ("A model in blocks", measure_blocks, "large"),
    "ways": ("Ways to divide", measure_ways, "wide"),
    "torch": ("Stages of torch", measure_torch, "deep"),
    "link": ("Stages behind a slow link", measure_link, "link"),
}


def main() -> None:
    """Measures, prints the tables and, if asked, keeps them."""
    options = parse_options(str(__doc__), rounds=3, parts=PARTS)
    for part in [options.only] if options.only else PARTS:
        title, measure, name = PARTS[part]
        size = MODELS[name]
        rows = list(measure(options.rounds))
        options.only = part
        note = f"text_lm, {size.num_layers} blocks of width {size.width}, {size.batch_size} examples a step, AdamW."
        show(title, rows, options, note=note)


if __name__ == "__main__":
    main()
