"""What `tfdist.plan` foretells, against runs: hosts behind links of several kinds.

    python benchmarks/plan.py [--rounds=2] [--only=100mbit] [--write=docs/benchmarks.md]

Needs Linux and root. Each link's hosts are planned for by `--hosts`, which tries steps there, and, where the link is
slow, by `--link`, which knows of it only what it is told. Then `fit` trains in every way. Planning and training take
turns, since machines are shared, and change; an error is that of the medians of a step's time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import ROOT, Row, parse_options, show
from lab import linked_hosts
from plan_recipe import BATCH

from tfdist.planning.ways import KINDS

RECIPE = f"--recipe={ROOT / 'benchmarks/plan_recipe.py'}"
PROGRAM = str(ROOT / "benchmarks/plan_program.py")
# rate, round trip in ms, and the same for --link; without a rate, or with a fast one, the hosts' shared cores decide.
LINKS: dict[str, tuple[str | None, float, str | None]] = {
    "loopback": (None, 0.0, None),
    "1gbit": ("1gbit", 0.0, None),
    "100mbit": ("100mbit", 0.0, "100mbit,0ms"),
    "100mbit, 20 ms": ("100mbit", 20.0, "100mbit,20ms"),
}
NUM_HOSTS = 3
WAYS = "every_step,bfloat16,powersgd,local_sgd,diloco,ps"
# What an epoch begins and ends with, an exchange of all that is left out too, is no step's: short steps need many.
EPOCH_SECS, LEAST_STEPS, MOST_STEPS = 3.0, 50, 300
# way and number of workers → a step's seconds, one a round
Times = dict[tuple[str, int], list[float]]


def plan(where: Sequence[str], rest: Sequence[str], found: Times) -> None:
    """Adds what is foretold."""
    said = call(["tfdist.plan", "--json", f"--ways={WAYS}", *where, RECIPE, *rest])
    for way in json.loads(said)["ways"]:
        if way["global_batch_size"] == BATCH:
            found.setdefault((way["way"], way["num_workers"]), []).append(way["step_secs"])


def train(foretold: Times, where: Sequence[str], rest: Sequence[str], found: Times) -> None:
    """Adds what real runs have taken: a cluster for each strategy and size trains in all of its ways."""
    clusters: dict[tuple[str, int], dict[str, int]] = {}
    for (name, size), secs in foretold.items():
        steps = min(max(round(EPOCH_SECS / secs[0]), LEAST_STEPS), MOST_STEPS)
        clusters.setdefault((KINDS[name].strategy, size), {})[name] = steps
    for (strategy, size), steps_of in clusters.items():
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/out.json"
            place = [*where, *rest, f"--strategy={strategy}", f"--num_workers={size}"]
            call(["tfdist.launch", *place, PROGRAM, out, json.dumps(steps_of)])
            for name, secs in json.loads(Path(out).read_text()).items():
                found.setdefault((name, size), []).append(secs)


def call(words: Sequence[str]) -> str:
    """Runs a module to its end, and returns what it says."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=env, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout


def measure(name: str, rounds: int) -> Iterator[Row]:
    """Yields the rows of a link."""
    rate, round_trip_ms, link = LINKS[name]
    # MPI's transports do not know the devices that delay.
    rest = ["--exchange=collective"] if round_trip_ms else []
    tried: Times = {}
    told: Times = {}
    measured: Times = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        linked_hosts(Path(folder), NUM_HOSTS, rate=rate, round_trip_ms=round_trip_ms) as hosts,
    ):
        where = [f"--hosts={','.join(host.name for host in hosts.hosts)}", f"--ssh_config={hosts.config}"]
        for _ in range(rounds):
            plan(where, rest, tried)
            train(tried, where, rest, measured)
            if link is not None:
                plan([f"--link={link}", "--workers=2,3"], rest, told)
    yield from compare(f"{name}, tried", tried, measured, ("≤ 0.15", "≤ 0.35", "≤ 1.1"))
    if told:
        yield from compare(f"{name}, told", told, measured, ("", "", ""))


def compare(what: str, foretold: Times, measured: Times, wanted: tuple[str, str, str]) -> Iterator[Row]:
    """Yields how far off a plan is, and how good its choice."""
    ours = {key: statistics.median(secs) for key, secs in foretold.items()}
    real = {key: statistics.median(measured[key]) for key in ours}
    errors = {key: secs / real[key] - 1 for key, secs in ours.items()}
    for key in sorted(errors, key=lambda key: -abs(errors[key])):
        times = "; ".join(
            " ".join(f"{1e3 * value:.1f}" for value in found[key]) for found in (foretold, measured)
        )
        print(what, *key, f"{errors[key]:+.2f}", f"ms {times}", sep=" | ", file=sys.stderr, flush=True)
    sizes = [abs(error) for error in errors.values()]
    worst = max(errors, key=lambda key: abs(errors[key]))
    yield f"{what}: median error of {len(sizes)} ways", f"{statistics.median(sizes):.2f}", wanted[0]
    yield f"… worst ({worst[0]}, {worst[1]} workers)", f"{max(sizes):.2f}", wanted[1]
    yield "… how far the same runs differ from round to round, median", f"{_noise(measured):.2f}", ""
    chosen, best = (min(found, key=lambda key: found[key]) for found in (ours, real))
    words = f"… its fastest ({chosen[0]}, {chosen[1]}) ÷ the fastest measured ({best[0]}, {best[1]})"
    yield words, f"{real[chosen] / real[best]:.2f}", wanted[2]


def _noise(measured: Mapping[Any, Sequence[float]]) -> float:
    return statistics.median(max(secs) / min(secs) - 1 for secs in measured.values())


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    options = parse_options(str(__doc__), rounds=2, parts=LINKS)
    rows = []
    for name in [options.only] if options.only else LINKS:
        for row in measure(name, options.rounds):
            print(*row, sep=" | ", file=sys.stderr, flush=True)
            rows.append(row)
    show("Plans, and what came of them", rows, options, note="Three hosts share two cores.")


if __name__ == "__main__":
    main()
