"""What large tables cost: row-sparse optimizer steps, and sharded embeddings on parameter servers.

    python benchmarks/ps_embedding.py [--rounds=7] [--write=docs/benchmarks.md]

Clusters are started through `tfdist.launch`, 2 workers and 2 ps where nothing else is said; `ps_programs.py` is what
they run. Every round times each contender once, in turn; figures are ratios of medians with the spread of the rounds,
since machines are shared and noisy. `tf_keras` is installed into a folder of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from figures import Row, divide, parse_options, render_spread, show, take_turns

from tfdist.optimizers import LazyAdam

FOLDER = Path(__file__).resolve().parent
WIDTH, BATCH, STEPS = 16, 512, 80
NUM_ROWS, NUM_IDS = 2_000_000, 4_096  # of the local steps
ADAM_STEPS = 10  # of a turn: one alone would measure how busy the machine is
SLOWNESS, SLICE_SECS = 4, 0.02
Measured = dict[str, list[float]]
_BOUNDS = (
    "Two figures have a bound that the rows after them show: a row-sparse step cannot be faster than TensorFlow "
    "gathers and scatters its rows (to which the sum of repeated rows, Adam's arithmetic and the call are added), and "
    "closures that come faster could win no more than the time in which cores are idle: with two workers and two ps on "
    "two cores a worker that waits mostly leaves its core to a ps, and an epoch ends with one worker waiting for the "
    "other."
)


def build_adam_turn(optimizer: keras.optimizers.Optimizer) -> Callable[[], float]:
    """Returns a turn of steps on 4,096 rows, a few of them repeated, of 2,000,000, which returns ms per step."""
    table = keras.Variable(tf.zeros([NUM_ROWS, WIDTH]))
    optimizer.build([table])

    @tf.function(autograph=False)
    def step() -> None:
        ids, values = draw_slices()
        optimizer.apply([tf.IndexedSlices(values, ids, tf.constant([NUM_ROWS, WIDTH], tf.int64))], [table])

    return build_turn(step)


def build_bare_turn() -> Callable[[], float]:
    """Returns a turn that only reads and writes these rows, of as many tables: what TensorFlow takes at the least."""
    tables = [tf.Variable(tf.zeros([NUM_ROWS, WIDTH])) for _ in range(3)]

    @tf.function(autograph=False)
    def step() -> None:
        ids, _ = draw_slices()
        for table in tables:
            table.scatter_update(tf.IndexedSlices(tf.gather(table, ids), ids))

    return build_turn(step)


def draw_slices() -> tuple[tf.Tensor, tf.Tensor]:
    """Returns ids and gradients, always the same."""
    rng = np.random.default_rng(0)
    ids = tf.constant(rng.integers(0, NUM_ROWS, NUM_IDS))
    return ids, tf.constant(rng.normal(size=(NUM_IDS, WIDTH)).astype(np.float32))


def build_turn(step: Callable[[], None]) -> Callable[[], float]:
    """Returns a turn of steps, which returns ms per step."""

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(ADAM_STEPS):
            step()
        return 1e3 * (time.perf_counter() - start) / ADAM_STEPS

    turn()
    return turn


def run_cluster(
    name: str, rounds: int, *, sizes: Sequence[str] = ("--num_workers=2", "--num_ps=2"), slows: bool = False
) -> Measured:
    """Returns what a program measured in a cluster of its own."""
    file = FOLDER / ("ps_tf_keras.py" if name == "tf_keras" else "ps_programs.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        launch = [sys.executable, "-m", "tfdist.launch", "--strategy=ps", *sizes, str(file)]
        process = subprocess.Popen([*launch, name, str(out), str(rounds)])
        if slows:
            threading.Thread(target=slow_a_worker_down, args=(process,), daemon=True).start()
        if process.wait():
            raise SystemExit(f"{' '.join(launch)} {name} ended with {process.returncode}")
        return json.loads(out.read_text())


def slow_a_worker_down(launcher: subprocess.Popen[bytes]) -> None:
    """Stops worker 0 for three quarters of the time, in short turns."""
    worker = None
    while worker is None and launcher.poll() is None:
        time.sleep(0.5)
        worker = _find_worker(launcher.pid)
    while worker is not None and launcher.poll() is None:
        try:
            os.kill(worker, signal.SIGSTOP)
            time.sleep((SLOWNESS - 1) * SLICE_SECS)
            os.kill(worker, signal.SIGCONT)
            time.sleep(SLICE_SECS)
        except ProcessLookupError:
            return


def _find_worker(launcher: int) -> int | None:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            env = (entry / "environ").read_bytes().decode(errors="replace")
        except (OSError, ValueError):
            continue
        if parent == launcher and '"task": {"type": "worker", "index": 0}' in env:
            return int(entry.name)
    return None


def compare_with_tf_keras(rounds: int) -> Measured:
    """Returns seconds per epoch of `tf_keras` and of tfdist, in clusters that are started in turn."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}"]
        subprocess.run([*install, "tf_keras==2.21.*"], check=True)
        kept = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{kept}"
        found: Measured = {"tf_keras": [], "ours": []}
        try:
            for turn in range(rounds):
                for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
                    found[name] += run_cluster(name, 3)["secs"]
        finally:
            os.environ["PYTHONPATH"] = kept
        return found


def measure(rounds: int) -> Iterator[Row]:
    """Yields the table's rows."""
    contenders = {
        "Keras": build_adam_turn(keras.optimizers.Adam()),
        "tfdist": build_adam_turn(LazyAdam()),
        "bare": build_bare_turn(),
    }
    adam = take_turns(contenders, rounds)
    yield _ratio(
        "Keras Adam's step ÷ `LazyAdam`'s, 2,000,000 × 16, 4,096 ids",
        adam,
        "Keras",
        "tfdist",
        "≥ 100",
        "ms",
    )
    share = 100 / divide(adam["tfdist"], adam["bare"])
    text = "… rows of three tables gathered and scattered by TensorFlow, nothing else, ms (of our step, %)"
    yield text, f"{render_spread(adam['bare'], 2)} ({share:.0f})", ""
    layers = run_cluster("layers", rounds)
    for name in ("10,000 rows", "10,000,000 rows", "tfdist", "Keras"):
        layers[name] = [1e3 * secs / STEPS for secs in layers[name]]
    text = "step with 10,000,000 rows ÷ with 10,000, same ids"
    yield _ratio(text, layers, "10,000,000 rows", "10,000 rows", "≤ 1.2", "ms")
    text = "step of Keras's `Embedding` and Adagrad ÷ ours, same loop, 1,000,000 × 16"
    yield _ratio(text, layers, "Keras", "tfdist", "≥ 7", "ms")
    dispatch = run_cluster("dispatch", rounds)
    for steps_per_loop, steps in ((16, 480), (64, 1920)):
        share, idle = ([100 * x for x in dispatch[f"{name} {steps_per_loop}"]] for name in ("share", "idle"))
        text = (
            f"… two workers' time without a closure, {steps_per_loop} steps in each, {steps:,} in an epoch, %"
        )
        yield text, render_spread(share, 1), "≤ 3"
        yield "… the machine's cores idle meanwhile, %: no more can be won", render_spread(idle, 1), ""
    yield "… an empty closure, which TensorFlow alone takes, ms", render_spread(dispatch["empty"], 1), ""
    peers = compare_with_tf_keras(max(1, rounds // 2))
    yield _ratio("epoch of `tf_keras` 2.21 `fit` ÷ ours, same table", peers, "tf_keras", "ours", "≥ 2", "s")
    wire = run_cluster("bytes", rounds)["ratio"]
    yield "bytes on the wire ÷ unique rows × (pull + push + ids)", render_spread(wire, 2), "≤ 1.3"
    slow = run_cluster("slow", 3, sizes=("--num_workers=3", "--num_ps=1"), slows=True)
    text = "3 workers, one four times slower: examples/s async ÷ sync"
    yield _ratio(text, slow, "async rate", "sync rate", "≥ 2.5", "/s")
    losses = "; ".join(render_spread(slow[f"{mode} loss"]) for mode in ("async", "sync"))
    yield "… final loss over 3 seeds, async; sync", losses, "equal"
    memory = run_cluster("memory", 1, sizes=("--num_workers=2", "--num_ps=4"))
    text = "chief above idle, a table of 2 GB over 4 ps, trained and checkpointed, GB"
    yield text, f"{memory['trained'][0]:.2f}", "≤ 1"
    size = f"checkpoint of {memory['checkpoint'][0]:.1f} GB"
    yield f"… and saved as .keras; {size}", f"{memory['saved'][0]:.2f}", "≤ 1"


def _ratio(text: str, figures: Measured, upper: str, lower: str, wanted: str, unit: str) -> Row:
    parts = "; ".join(f"{name} {render_spread(figures[name], 2)} {unit}" for name in (upper, lower))
    return f"{text} ({parts})", f"{divide(figures[upper], figures[lower]):.3g}", wanted


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    options = parse_options(str(__doc__), rounds=7)
    rows = []
    for row in measure(options.rounds):
        print(*row, sep=" | ", file=sys.stderr)
        rows.append(row)
    niceness = f" At niceness {os.nice(0)}, since other work ran." if os.nice(0) else ""
    show("Large tables", rows, options, note=f"Batches of {BATCH} × 26 ids.{niceness} {_BOUNDS}")


if __name__ == "__main__":
    main()
