"""Exchanging less: what `--sync` saves on `text_lm`, and what it is worth between two hosts behind 100 Mbit/s.

    python benchmarks/sync_less.py [--rounds=3] [--only=diloco|link] [--picture=FILE.png] [--write=docs/benchmarks.md]

`link` needs Linux and root: each worker has a network namespace of its own, and a cable between them that `tc` narrows.
`--picture` needs matplotlib, and draws the evaluation losses of every way of sharing; it takes half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
from figures import ROOT, Row, render_spread, show, take_turns

SEEDS = 3
# Workers agree at each epoch's end: a short one would exchange more often than asked for. So an epoch is two passes
# over the text, of 391 steps.
EPOCHS, PASSES, BATCH, PERIOD = 10, 2, 32, 196
MODEL = {"num_layers": 1, "width": 64, "sequence_length": 64}
WAYS: dict[str, dict[str, Any]] = {
    "every_step": {},
    "local_sgd": {"sync": "local_sgd", "sync_period": 32},
    "diloco": {"sync": "diloco", "sync_period": PERIOD, "exchange_dtype": "bfloat16"},
    "gossip": {"sync": "gossip"},
    "delayed": {"sync": "delayed"},
}
LINKS: dict[str, dict[str, Any]] = {
    "stock": {},
    "bfloat16": {"exchange_dtype": "bfloat16"},
    "powersgd": {"compression": "powersgd"},
    "diloco": {"sync": "diloco", "sync_period": 100},
}
LINK_BATCH, LINK_STEPS, LINK_WARM_STEPS = 64, 100, 3
PORT = 23_450  # inside namespaces, where nothing else listens


def train_text(folder: Path, way: str, seed: int) -> list[dict[str, Any]]:
    """Returns for each epoch of a run its `step`, `val_loss` and `exchange_mb`."""
    out = folder / f"{way}-{seed}.json"
    cluster = [sys.executable, "-m", "tfdist.launch", "--strategy=multiworker", "--num_workers=2", "--"]
    _run([*cluster, sys.executable, __file__, "--text", way, str(seed), str(out)])
    return list(json.loads(out.read_text()))


def train_text_here(way: str, seed: str, out: str) -> None:
    """Is a worker of `diloco`, without checkpoints: for one the optimizers' slots would cross as well."""
    import keras
    import numpy as np

    import tfdist
    from recipes import text_lm

    run = tfdist.initialize(strategy="multiworker", seed=int(seed))
    keras.utils.set_random_seed(int(seed))
    with run.strategy.scope():
        model = text_lm.build_model(seed=int(seed), **MODEL)
    epochs: list[dict[str, Any]] = []

    class Ends(keras.callbacks.Callback):  # type: ignore[misc]
        writes = True  # on the chief alone

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            sent = self.params["measures"]()["exchange_mb"]
            step = int(self.model.optimizer.iterations)
            epochs.append({"step": step, "val_loss": logs["val_loss"], "exchange_mb": sent})

    train, test = (
        text_lm.build_data(split, sequence_length=MODEL["sequence_length"]) for split in ("train", "test")
    )
    x, y = (np.concatenate([part] * PASSES) for part in train)
    sync = tfdist.SyncOptions(**WAYS[way])
    options = {"batch_size": BATCH, "epochs": EPOCHS, "callbacks": [Ends()], "verbose": 0}
    run.fit(model, x, y, validation_data=test, sync=sync, **options)
    if run.is_chief:
        Path(out).write_text(json.dumps(epochs))


def measure_diloco(folder: Path, picture: Path | None) -> Iterator[Row]:
    """Yields what `diloco` sends and where it ends, next to `every_step`; draws all ways if asked."""
    ways = list(WAYS) if picture else ["every_step", "diloco"]
    runs = {way: [train_text(folder, way, seed) for seed in range(SEEDS)] for way in ways}
    # Every run sees as many examples: bytes per example are as the bytes.
    sent = {
        way: [sum(line["exchange_mb"] for line in lines) for lines in found] for way, found in runs.items()
    }
    ends = {way: [lines[-1]["val_loss"] for lines in found] for way, found in runs.items()}
    ratio = statistics.median(sent["diloco"]) / statistics.median(sent["every_step"])
    yield "bytes per example of `diloco` ÷ `every_step`, `text_lm`", f"1/{1 / ratio:.0f}", "≤ 1/300"
    losses = "; ".join(render_spread(ends[way]) for way in ("diloco", "every_step"))
    yield f"… evaluation loss over {SEEDS} seeds, `diloco`; `every_step`", losses, "equal"
    if picture:
        draw(runs, picture)


def draw(runs: dict[str, list[list[dict[str, Any]]]], picture: Path) -> None:
    """Draws each way's mean evaluation loss by epoch."""
    from matplotlib.figure import Figure  # here: only a picture needs it

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for way, found in runs.items():
        epochs = list(zip(*found, strict=True))
        axes.plot(
            [lines[0]["step"] for lines in epochs],
            [statistics.mean(line["val_loss"] for line in lines) for lines in epochs],
            label=way,
            marker="o",
        )
    axes.set(xlabel="step", ylabel=f"evaluation loss, mean of {SEEDS} seeds", title="text_lm, two workers")
    axes.legend()
    figure.savefig(picture, dpi=120, bbox_inches="tight")


@contextmanager
def narrow_link() -> Iterator[list[str]]:
    """Makes two hosts with 100 Mbit/s between them, and yields their names; 10.78.0.1 and 10.78.0.2."""
    names = [f"link{os.getpid()}n{i}" for i in range(2)]
    cables = [f"l{os.getpid()}n{i}" for i in range(2)]
    try:
        for name in names:
            _run(["ip", "netns", "add", name])
        ends = ["netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1]]
        _run(["ip", "link", "add", cables[0], *ends])
        for i, (name, cable) in enumerate(zip(names, cables, strict=True)):
            inside = ["ip", "netns", "exec", name]
            _run([*inside, "ip", "address", "add", f"10.78.0.{i + 1}/24", "dev", cable])
            _run([*inside, "ip", "link", "set", cable, "up"])
            _run([*inside, "ip", "link", "set", "lo", "up"])
            shape = ["tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms"]
            _run([*inside, "tc", "qdisc", "add", "dev", cable, "root", *shape])
        yield names
    finally:
        for name in names:  # the cable goes with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


def time_link(hosts: Sequence[str], out: Path, way: str) -> float:
    """Returns the examples/s of two workers on two hosts."""
    cluster = {"worker": [f"10.78.0.{i + 1}:{PORT}" for i in range(len(hosts))]}
    workers = []
    for i, host in enumerate(hosts):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": config}
        command = ["ip", "netns", "exec", host, sys.executable, __file__, "--worker", way, str(out)]
        # A file, not a pipe: one worker must not wait until the other's pipe is read.
        log = (out.parent / f"{way}-{i}.log").open("w+")
        workers.append((subprocess.Popen(command, env=env, stdout=log, stderr=log), log))
    try:
        for worker, log in workers:
            if worker.wait(timeout=300):
                log.seek(0)
                raise RuntimeError(f"{way} ended with {worker.returncode}:\n{log.read()[-3000:]}")
    finally:
        for worker, log in workers:
            worker.kill()
            worker.wait()
            log.close()
    return float(json.loads(out.read_text())["rate"])


def train_linked(way: str, out: str) -> None:
    """Is a worker of `link`: an MLP of 2.4 M weights; the time of a whole `fit`, its last exchange included."""
    from sync_models import pin  # before TensorFlow

    pin(json.loads(os.environ["TF_CONFIG"])["task"]["index"])
    import keras
    import numpy as np

    import tfdist

    keras.utils.set_random_seed(0)
    run = tfdist.initialize(strategy="multiworker")
    with run.strategy.scope():
        hidden = [keras.layers.Dense(1024, activation="relu") for _ in range(3)]
        model = keras.Sequential([keras.Input((256,)), *hidden, keras.layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss)
    rng = np.random.default_rng(0)
    count = LINK_BATCH * LINK_STEPS
    data = rng.normal(size=(count, 256)).astype(np.float32), rng.integers(0, 10, count)
    settings: dict[str, Any] = {"batch_size": LINK_BATCH, "shuffle": False, "verbose": 0}
    settings["sync"] = tfdist.SyncOptions(**LINKS[way])
    run.fit(model, data, steps_per_epoch=LINK_WARM_STEPS, **settings)
    start = time.perf_counter()
    run.fit(model, data, steps_per_epoch=LINK_STEPS, **settings)
    if run.is_chief:
        Path(out).write_text(json.dumps({"rate": count / (time.perf_counter() - start)}))


def measure_link(folder: Path, rounds: int) -> Iterator[Row]:
    """Yields each way's rate ÷ stock's."""
    with narrow_link() as hosts:
        rates = take_turns(
            {way: lambda way=way: time_link(hosts, folder / "link.json", way) for way in LINKS},  # type: ignore[misc]
            rounds,
        )
    for way in list(LINKS)[1:]:
        ratios = [a / b for a, b in zip(rates[way], rates["stock"], strict=True)]
        spread = f"{render_spread(rates[way], 0)}; {render_spread(rates['stock'], 0)}"
        yield f"100 Mbit/s: `{way}` ÷ stock (examples/s {spread})", render_spread(ratios, 1), "best ≥ 20"


def _run(command: Sequence[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    if sys.argv[1:2] == ["--text"]:
        train_text_here(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["--worker"]:
        train_linked(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="Of `link`; `diloco` has its seeds.")
    parser.add_argument("--write", type=Path, help="Keep the table in this file, in place of the last one.")
    parser.add_argument("--only", choices=("diloco", "link"), help="Measure this part alone.")
    parser.add_argument("--picture", type=Path, help="Draw the losses of every way of sharing here.")
    options = parser.parse_args()
    if options.picture and not find_spec("matplotlib"):
        parser.error("--picture needs matplotlib: pip install matplotlib.")
    if options.only != "diloco" and (sys.platform != "linux" or os.geteuid() != 0):
        parser.error("link needs Linux and root; leave it out with --only=diloco.")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        if options.only != "link":
            rows += measure_diloco(Path(name), options.picture)
        if options.only != "diloco":
            rows += measure_link(Path(name), options.rounds)
    show("Exchanging less", rows, options, note=f"Two workers, one core each; {SEEDS} seeds.")


if __name__ == "__main__":
    main()
