"""What becomes of a way to train with many more workers: stragglers, a ring that grows, a server's link, failures.

Two discrete-event simulations, by SimPy. In the first, steps follow each other, each worker's drawn from those that
were measured; in the second, days pass, machines fail, and those that are left begin again at the last checkpoint.
Every worker keeps the recipe's batch as its own, so that the work of each is that of one device.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tfdist.config.run_dir import write_named
from tfdist.errors import ConfigError
from tfdist.planning.predict import Plan
from tfdist.planning.ways import KINDS, OWN

# A node of 8 GPUs fails once in about so many days (Kokolis et al. 2024, "Revisiting Reliability in Large-Scale Machine
# Learning Research Clusters": 1,024 GPUs, 7.9 hours).
DEFAULT_MTBF_DAYS = 42.0
_NUM_STEPS = 60
_NUM_DAYS = 30
_DAY_SECS = 86_400.0
# way → number of workers → share of what so many single devices would do.
Curves = Mapping[str, Mapping[int, float]]


def check_simpy() -> None:
    """Makes sure that there is something to simulate with.

    Raises:
        ConfigError: If there is not.
    """
    if find_spec("simpy") is None:
        raise ConfigError("simulate needs simpy: pip install 'tfdist[plan]'.")


def simulate(plan: Plan, *, most: int, mtbf_days: float, seed: int) -> dict[str, dict[int, float]]:
    """Returns the efficiency of each way by the number of workers: 1 is as many times one device.

    Args:
        plan: Measured.
        most: Workers.
        mtbf_days: Mean time between two failures of a machine.
        seed: Of what is drawn.
    """
    alone = plan.alone.timings[OWN, plan.batch_size]
    sizes = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000) if n < most] + [
        most
    ]
    curves: dict[str, dict[int, float]] = {}
    for name in plan.ways:
        if KINDS[name].strategy not in ("multiworker", "ps") or (cost := plan.cost_of(name, sizes)) is None:
            continue
        curves[name] = {}
        for size in sizes:
            rng = random.Random(f"{seed} {name} {size}")
            if KINDS[name].strategy == "ps":
                secs = _simulate_server(alone["samples"], cost.server_secs, size, rng)
            else:
                period = KINDS[name].period
                secs = _simulate_lock_step(alone["samples"], cost.all_reduce_secs(size), period, size, rng)
            share = _simulate_days(
                size,
                mtbf_secs=mtbf_days * _DAY_SECS,
                restart_secs=plan.alone.start_secs,
                save_secs=secs * (plan.alone.model["steps_per_epoch"] or _NUM_STEPS),
                loses_alone=KINDS[name].strategy == "ps",
                rng=rng,
            )
            curves[name][size] = round(alone["secs"] / secs * share, 4)
    return curves


def render_efficiency(curves: Curves) -> str:
    """Renders the curves as a table, a line for each way."""
    sizes = list(next(iter(curves.values()), {}))
    width = max((len(name) for name in curves), default=0)
    head = " ".join([f"{'efficiency with':<{width}}", *(f"{size:>6,}" for size in sizes), " workers"])
    indent = " " * max(0, len("efficiency with") - width)
    rows = [
        " ".join([f"{name:<{width}}{indent}", *(f"{values[size]:>6.2f}" for size in sizes)])
        for name, values in curves.items()
    ]
    return "\n".join([head, *rows])


def draw_efficiency(curves: Curves, path: Path) -> None:
    """Draws the curves into an SVG."""
    # Here: a second, for pictures alone.
    from tfdist.reporting.figures import draw_efficiency as draw

    write_named(path, draw(curves), flag="picture")


def _simulate_lock_step(
    samples: Sequence[float], exchange_secs: float, period: int, num_workers: int, rng: random.Random
) -> float:
    """Returns the mean seconds of a step of workers that wait for each other every `period` steps."""
    import simpy  # here: only a simulation needs it

    env = simpy.Environment()
    num_periods = max(1, _NUM_STEPS // period)
    steps = min(period, _NUM_STEPS)

    def worker() -> Generator[Any, Any, Any]:
        for _ in range(steps):
            yield env.timeout(rng.choice(samples))

    def training() -> Generator[Any, Any, Any]:
        for _ in range(num_periods):
            yield env.all_of([env.process(worker()) for _ in range(num_workers)])
            yield env.timeout(exchange_secs * steps / period)

    env.run(env.process(training()))
    return float(env.now) / (num_periods * steps)


def _simulate_server(
    samples: Sequence[float], server_secs: float, num_workers: int, rng: random.Random
) -> float:
    """Returns for each worker the mean seconds from step to step, where all bring their gradients to one server."""
    import simpy  # as above

    env = simpy.Environment()
    server = simpy.Resource(env)

    def worker() -> Generator[Any, Any, Any]:
        for _ in range(_NUM_STEPS):
            yield env.timeout(rng.choice(samples))
            with server.request() as turn:
                yield turn
                yield env.timeout(server_secs)

    env.run(env.all_of([env.process(worker()) for _ in range(num_workers)]))
    return float(env.now) / _NUM_STEPS


def _simulate_days(
    num_workers: int,
    *,
    mtbf_secs: float,
    restart_secs: float,
    save_secs: float,
    loses_alone: bool,
    rng: random.Random,
) -> float:
    """Returns the share of some days in which work was done that was not lost.

    Args:
        num_workers: Each of which may fail.
        mtbf_secs: Mean time between two failures of one.
        restart_secs: From a failure to the first new step.
        save_secs: Between two checkpoints.
        loses_alone: Whether the others go on meanwhile, and nothing is lost.
        rng: Draws.
    """
    import simpy  # as above

    env = simpy.Environment()
    end = _NUM_DAYS * _DAY_SECS
    lost = 0.0

    def failures() -> Generator[Any, Any, Any]:
        nonlocal lost
        saved = 0.0
        while True:
            yield env.timeout(rng.expovariate(1.0) * mtbf_secs / num_workers)
            if loses_alone:
                lost += restart_secs / num_workers
                continue
            lost += (env.now - saved) % save_secs + restart_secs
            yield env.timeout(restart_secs)
            saved = env.now

    env.process(failures())
    env.run(until=end)
    return max(0.0, 1.0 - lost / end)
