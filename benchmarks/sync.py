"""Synchronous training of two workers, one core each, against what else there is.

    python benchmarks/sync.py [--rounds=5] [--only=cnn] [--write=docs/benchmarks.md]

Every round runs each contender once, in turn, in fresh processes: the same model, initial weights, batches and
optimizer, float32, one core and one thread for each worker. Efficiency is the rate of communicating workers ÷ that of
as many isolated ones at the same time, each on its share of the batch. Workers in lock step wait for each other at each
step, as in an exchange that takes no time: the slower one holds the other up, and both read memory at the same moments.
`torch` and `tf_keras` are installed into environments of their own. All of TensorFlow's have oneDNN. Where losses after
10 steps differ by more than 1e-4 the row is void; where the medians of a contender's two turns in each round differ by
more than 3%, its rows are.
"""

from __future__ import annotations

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

FOLDER = Path(__file__).parent
TIMEOUT_SECS = 300
PARTS = ("cnn", "resnet", "mlp", "allreduce", "local_sgd")
EFFICIENCY = "rate ÷ isolated workers' (efficiency)"
AGAIN, MOST_NOISE = "again", 0.03
SIZES = {"64 MB": str(64 * 2**20), "1 MB": str(2**20), "10 KB": str(10 * 2**10)}
Figures = dict[str, Any]


class Arena:
    """Starts contenders, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pythons: dict[str, Path] = {}
        self.losses: dict[str, dict[str, float]] = {}
        self.noise: dict[str, float] = {}

    def run(self, contender: str, contest: str) -> Figures:
        """Runs a contender to its end, and returns its figures."""
        weights = self._folder / f"{contest}.npz"
        if not weights.exists():
            self._call([self._own("sync_programs.py", "weights", contest, "-", str(weights))])
        out = self._folder / "out.json"
        words = (contest, str(out), str(weights))
        outs = [out]
        if contender.startswith("torch-"):
            port = _free_port()
            program = [str(self._python("torch")), str(FOLDER / "sync_torch.py"), contender[6:], *words]
            self._call([[*program, str(rank), port] for rank in range(2)])
        elif contender == "tf_keras":
            self._call([self._launch(str(self._python("tf_keras")), "sync_tf_keras.py", "-", *words)])
        elif contender in ("isolated", "lock_step"):
            outs = [self._folder / f"out-{rank}.json" for rank in range(2)]
            own = [(contest, str(path), str(weights), str(rank)) for rank, path in enumerate(outs)]
            self._call([self._own("sync_programs.py", contender, *words) for words in own])
        elif contender == "keras":
            self._call([self._own("sync_programs.py", "keras", *words)])
        else:
            self._call([self._launch(sys.executable, "sync_programs.py", contender, *words)])
        found = [json.loads(path.read_text()) for path in outs]
        for path in outs:
            path.unlink()
        if len(found) > 1:
            return {"rate": sum(f["rate"] for f in found)}
        if "loss" in found[0]:
            self.losses.setdefault(contest, {})[contender] = found[0]["loss"]
        return dict(found[0])

    def _own(self, program: str, *words: str) -> list[str]:
        return [sys.executable, str(FOLDER / program), *words]

    def _launch(self, python: str, program: str, *words: str) -> list[str]:
        flags = ["--strategy=multiworker", "--num_workers=2", "--num_threads=1"]
        command = ["--", python, str(FOLDER / program), *words]
        return [sys.executable, "-m", "tfdist.launch", *flags, *command]

    def _call(self, commands: Sequence[Sequence[str]]) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TF_ENABLE_ONEDNN_OPTS": "1"}
        processes = [
            subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for c in commands
        ]
        for process, command in zip(processes, commands, strict=True):
            said, _ = process.communicate(timeout=TIMEOUT_SECS)
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said[-4000:]}")

    def _python(self, peer: str) -> Path:
        """Returns the interpreter of a peer's environment, which is made when it is first asked for."""
        if peer not in self._pythons:
            folder = self._folder / f"venv-{peer}"
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            packages = (
                ["torch==2.13.0", "numpy"] if peer == "torch" else ["tensorflow==2.21.*", "tf_keras==2.21.*"]
            )
            subprocess.run([folder / "bin/pip", "install", "--quiet", *packages], check=True)
            self._pythons[peer] = folder / "bin/python"
        return self._pythons[peer]


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def contend(arena: Arena, contest: str, contenders: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Returns each contender's examples/s, one a round; of the first another at each round's end."""
    first = contenders[0]
    turns = {name: name for name in contenders} | {AGAIN: first}
    rates = take_turns(
        {turn: lambda name=name: arena.run(name, contest)["rate"] for turn, name in turns.items()},  # type: ignore[misc]
        rounds,
    )
    arena.noise[contest] = abs(divide(rates[first], rates[AGAIN]) - 1)
    return rates


def _ratio(
    arena: Arena,
    contest: str,
    what: str,
    rates: dict[str, list[float]],
    ours: str,
    peers: Sequence[str],
    bound: str,
) -> Row:
    """Returns a row: ours ÷ the best of the peers', round by round."""
    best = max(peers, key=lambda name: statistics.median(rates[name]))
    ratios = [a / b for a, b in zip(rates[ours], rates[best], strict=True)]
    spread = f"{render_spread(rates[ours], 0)}; {render_spread(rates[best], 0)}"
    text = f"{what} ({best}; examples/s {spread})"
    losses = arena.losses.get(contest, {})
    gap = abs(losses[ours] - losses[best]) if {ours, best} <= losses.keys() else 0.0
    if gap > 1e-4:
        return text, f"void: losses differ by {gap:.1e}", bound
    is_void = arena.noise[contest] > MOST_NOISE
    return text, f"{'void: ' if is_void else ''}{render_spread(ratios, 2)}", bound


def _noise(arena: Arena, contest: str, contender: str) -> Row:
    return f"… `{contender}` against itself, %", f"{100 * arena.noise[contest]:.1f}", "≤ 3"


def _free(arena: Arena, contest: str, rates: dict[str, list[float]]) -> Iterator[Row]:
    what = "… of workers in lock step that exchange nothing"
    yield _ratio(arena, contest, what, rates, "lock_step", ("isolated",), "")
    yield "… efficiency ÷ theirs", f"{divide(rates['every_step'], rates['lock_step']):.2f}", "≥ 0.98"


def measure(part: str, arena: Arena, rounds: int) -> Iterator[Row]:
    """Yields the rows of a part."""
    torch = ("torch-plain", "torch-best")
    if part == "cnn":
        rates = contend(
            arena, "cnn", ("every_step", "isolated", "lock_step", *torch, "tf_keras", "keras"), rounds
        )
        yield _ratio(arena, "cnn", f"CNN: {EFFICIENCY}", rates, "every_step", ("isolated",), "≥ 0.92")
        yield from _free(arena, "cnn", rates)
        yield _ratio(arena, "cnn", "CNN ÷ torch DDP's best", rates, "every_step", torch, "≥ 1.9")
        yield _ratio(arena, "cnn", "CNN ÷ `tf_keras` `fit`", rates, "every_step", ("tf_keras",), "≥ 1.7")
        plain = "CNN ÷ plain `keras.Model.fit`, one process, all cores"
        yield _ratio(arena, "cnn", plain, rates, "every_step", ("keras",), "≥ 1.3")
        yield _noise(arena, "cnn", "every_step")
    elif part == "local_sgd":
        rates = contend(arena, "cnn", ("local_sgd", "isolated"), rounds)
        what = "CNN, `local_sgd`, H = 32: efficiency"
        yield _ratio(arena, "cnn", what, rates, "local_sgd", ("isolated",), "≥ 0.99")
        yield _noise(arena, "cnn", "local_sgd")
    elif part == "resnet":
        rates = contend(arena, "resnet", ("every_step", "isolated", "lock_step"), rounds)
        what = "ResNet-20, 32 a worker: efficiency"
        yield _ratio(arena, "resnet", what, rates, "every_step", ("isolated",), "≥ 0.97")
        yield from _free(arena, "resnet", rates)
        yield _noise(arena, "resnet", "every_step")
    elif part == "mlp":
        rates = contend(arena, "mlp", ("every_step", "isolated", *torch), rounds)
        what = "MLP of 25 M weights ÷ torch DDP's best"
        yield _ratio(arena, "mlp", what, rates, "every_step", torch, "≥ 1.8")
        yield _ratio(arena, "mlp", "… isolated workers ÷ torch DDP's best", rates, "isolated", torch, "")
        yield _ratio(arena, "mlp", f"… {EFFICIENCY}", rates, "every_step", ("isolated",), "")
        yield _noise(arena, "mlp", "every_step")
    else:
        found: dict[str, list[Any]] = take_turns(
            {name: lambda name=name: arena.run(name, "cnn") for name in ("allreduce", "torch-allreduce")},  # type: ignore[misc]
            rounds,
        )
        for (size, key), bound in zip(SIZES.items(), ("≤ 0.9", "≤ 0.3", "≤ 0.1"), strict=True):
            ours, gloo = ([f[key] for f in found[name]] for name in ("allreduce", "torch-allreduce"))
            ratios = [a / b for a, b in zip(ours, gloo, strict=True)]
            text = f"all-reduce of {size} in the graph ÷ gloo's (ms {render_spread(ours, 2)}; {render_spread(gloo, 2)})"
            yield text, render_spread(ratios, 2), bound


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    options = parse_options(str(__doc__), rounds=5, parts=PARTS)
    with tempfile.TemporaryDirectory() as name:
        arena = Arena(Path(name))
        rows = []
        for part in [options.only] if options.only else PARTS:
            for row in measure(part, arena, options.rounds):
                print(*row, sep=" | ", file=sys.stderr, flush=True)
                rows.append(row)
    show("Synchronous training", rows, options, note="Two workers, one core each.")


if __name__ == "__main__":
    main()
