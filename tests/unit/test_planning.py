"""What a plan makes of trials, a link and a simulation; `tests/cluster/test_plan.py` makes the trials."""

import dataclasses
import math
import re

import pytest

from tfdist.errors import TfdistError
from tfdist.plan import main
from tfdist.planning.link import Link, parse_link
from tfdist.planning.measure import World
from tfdist.planning.predict import Cost, Plan
from tfdist.planning.simulate import render_efficiency, simulate
from tfdist.planning.table import find_best, render_best, render_table
from tfdist.planning.ways import DEFAULT_WAYS, KINDS, OWN, Way, flags_of, parse_ways

MODEL = {
    "recipe": "digits_cnn", "batch_size": 64, "epochs": 10, "num_examples": 640, "steps_per_epoch": 10,
    "num_parameters": 1_000_000, "gradient_mb": 4.0, "meeting_secs": 0.001, "machine_mb": 16_000.0,
}  # fmt: skip
MB = 1e6 / (1448 / 1514)  # on the wire, with what TCP and IP add


def world(num_workers, secs, *, sent_mb=0.0):
    timings = {
        key: {"secs": value, "samples": [value], "input_share": 0.0, "sent_mb": sent_mb, "memory_mb": 100.0}
        for key, value in secs.items()
    }
    return World(num_workers=num_workers, model=MODEL, timings=timings, refused={}, start_secs=10.0)


def planned(names, sizes, *, link=None, together=None, ps=None, alone=0.1):
    plan = Plan(["one_device", *names], sizes, link)
    plan.worlds["one_device", 1] = world(1, {(OWN, 64): alone, (OWN, 32): alone / 2, (OWN, 16): alone / 4})
    for size, secs in (together or {}).items():
        plan.worlds["multiworker", size] = world(size, secs, sent_mb=4.0)
    for size, secs in (ps or {}).items():
        plan.worlds["ps", size] = world(size, {("ps", 64): secs})
    return plan


def found(plan, name, num_workers, batch_size=64):
    way = Way(name=name, num_workers=num_workers, batch_size=batch_size)
    (one,) = [p for p in plan.predict() if p.way == way]
    return one


TRIED = {
    (OWN, 64): 0.05,
    (OWN, 128): 0.1,
    ("every_step", 64): 0.07,
    ("local_sgd", 64): 0.082,
    ("diloco", 64): 0.15,
}


def test_what_was_tried_is_foretold():
    plan = planned(["every_step", "local_sgd", "diloco"], [2], together={2: TRIED})
    every = found(plan, "every_step", 2)
    assert every.step_secs == pytest.approx(0.07) and every.own_secs == 0.05
    assert every.examples_per_sec == pytest.approx(64 / 0.07)
    assert every.sent_mb_per_sec == pytest.approx(4 / 0.07)
    assert every.hours == pytest.approx(10 * 10 * 0.07 / 3600)
    # A batch twice as large: each worker's steps as it was tried, and the same exchange, half as often an epoch.
    twice = found(plan, "every_step", 2, 128)
    assert twice.step_secs == pytest.approx(0.12) and twice.hours == pytest.approx(10 * 5 * 0.12 / 3600)
    # Trials exchange at each step, runs now and then.
    assert found(plan, "local_sgd", 2).step_secs == pytest.approx(0.05 + 0.032 / 32)
    assert found(plan, "diloco", 2).step_secs == pytest.approx(0.05 + 0.1 / 100)
    assert found(plan, "diloco", 2).sent_mb_per_sec == pytest.approx(0.04 / 0.051)


def test_limit_is_what_a_step_waits_for_most():
    slow = planned(["every_step"], [2], together={2: TRIED | {("every_step", 64): 0.2}})
    assert found(slow, "every_step", 2).limit == "exchange"
    assert found(slow, "one_device", 1).limit == "compute"
    for timing in slow.worlds["one_device", 1].timings.values():
        timing["input_share"] = 0.6
    assert found(slow, "one_device", 1).limit == "input"


def test_link_is_a_ring_s_rounds_and_what_was_seen_without_one():
    link = Link(bytes_per_sec=1e7, round_trip_secs=0.01)
    plan = planned(
        ["every_step", "delayed"], [2, 4], link=link, together={2: TRIED | {("delayed", 64): 0.06}}
    )
    two = 0.02 + 2 * (0.01 + 2 * MB / 1e7)  # 0.02 without a link; two rounds, of half the bytes each
    assert found(plan, "every_step", 2).step_secs == pytest.approx(0.05 + two)
    four = 0.02 + 6 * (0.01 + 1 * MB / 1e7)
    assert found(plan, "every_step", 4).step_secs == pytest.approx(0.025 + four)
    # Its exchange runs beside the next step.
    assert found(plan, "delayed", 4).step_secs == pytest.approx(four - 0.01)


def test_ps_behind_a_link_is_bound_by_the_servers_cable():
    link = Link(bytes_per_sec=1e7)
    plan = planned(["ps"], [2, 64], link=link, ps={1: 0.12})
    assert found(plan, "ps", 1).step_secs == pytest.approx(0.12)  # the first is where the server is
    crossing = 4 * MB / 1e7
    assert found(plan, "ps", 2).step_secs == pytest.approx(1 / (1 / 0.12 + 1 / (0.12 + 2 * crossing)))
    assert found(plan, "ps", 64).step_secs == pytest.approx(1 / (1 / 0.12 + 1 / crossing))


def test_each_cluster_is_started_once_with_all_its_trials():
    plan = Plan(DEFAULT_WAYS, [1, 2, 3], None)
    clusters = {(needed.strategy, needed.num_workers): needed.trials for needed in plan.clusters()}
    assert set(clusters) == {
        ("one_device", 1),
        ("multiworker", 2),
        ("multiworker", 3),
        ("ps", 1),
        ("ps", 2),
        ("ps", 3),
    }
    assert [name for name, _ in clusters["multiworker", 3]] == [
        OWN, OWN, *(name for name in DEFAULT_WAYS if KINDS[name].strategy == "multiworker"), OWN,
    ]  # fmt: skip
    linked = Plan(["one_device", "every_step", "ps"], [4, 8], Link(bytes_per_sec=1e7))
    assert [(needed.strategy, needed.num_workers) for needed in linked.clusters()] == [
        ("one_device", 1), ("multiworker", 2), ("ps", 1),
    ]  # fmt: skip


def test_model_that_nothing_can_train_is_said_to_be_so():
    plan = Plan(["one_device", "blocks"], [2], None)
    for name, why in (("one_device", "out of memory"), ("blocks", "no layer")):
        plan.worlds[name, 1] = World(num_workers=1, model={}, timings={}, refused={name: why}, start_secs=0.0)
    with pytest.raises(TfdistError, match="one_device: out of memory; blocks: no layer"):
        plan.predict()


def test_large_model_is_tried_in_parts():
    plan = Plan(None, [2], None)
    assert {needed.name for needed in plan.clusters()} == {"one_device", "multiworker", "ps"}
    alone = world(1, {(OWN, 64): 0.1})  # 100 MB
    for machine_mb, is_tried in ((1000.0, False), (150.0, True)):
        plan.worlds["one_device", 1] = dataclasses.replace(alone, model=MODEL | {"machine_mb": machine_mb})
        dividing = [n for n in plan.clusters() if n.strategy == "pipeline"]
        assert [n.name for n in dividing] == (["stages", "blocks"] if is_tried else [])
    assert [dict(n.settings) for n in dividing] == [{}, {"num_stages": 1, "tensor_parallel": 2}]
    plan.worlds["blocks", 2] = world(2, {("blocks", 64): 0.07})
    assert found(plan, "blocks", 2).step_secs == 0.07
    assert found(plan, "blocks", 2).way.flags() == [
        "--strategy=pipeline", "--num_workers=2", "--num_stages=1", "--tensor_parallel=2", "--global_batch_size=64",
    ]  # fmt: skip


def test_best_is_of_the_recipe_s_batch_and_exact_unless_said():
    together = {2: TRIED | {("every_step", 64): 0.09}}
    plan = planned(["every_step", "local_sgd"], [2], together=together)
    predictions = plan.predict()
    assert predictions[0].way.batch_size == 128  # the most examples/s, but another training
    own = [p for p in predictions if p.way.batch_size == 64]
    assert find_best(own, is_exact=True).way.name == "every_step"
    assert find_best(own).way.name == "local_sgd"
    said = render_best(
        predictions, 64, ["--recipe=digits_cnn", "--bucket_mb=4", "--num_ps=2"], ["--hosts=a,b"]
    )
    exact, first, other, second = said.splitlines()
    assert "one device's answer" in exact and "differs" in other
    assert first.strip() == (
        "python -m tfdist.train --recipe=digits_cnn --bucket_mb=4 --hosts=a,b --strategy=multiworker --num_workers=2 "
        "--global_batch_size=64"
    )
    assert "--sync=local_sgd" in second
    table = render_table(MODEL, predictions)
    assert len({line.rstrip() for line in table.splitlines()}) == len(predictions) + 3
    assert re.search(r"^every_step +2 +64 +90\.0 ", table, re.MULTILINE)


def test_exchange_grows_as_a_ring():
    cost = Cost(exchange_secs={2: 0.1, 4: 0.2}, meeting_secs=0.03)
    assert cost.all_reduce_secs(1) == 0 and cost.all_reduce_secs(2) == 0.1
    assert cost.all_reduce_secs(31) == pytest.approx(0.03 * 30 / 3 + 0.17 * (30 / 31) / (3 / 4))


def test_simulation_of_equal_steps_is_arithmetic():
    pytest.importorskip("simpy")
    plan = planned(["every_step", "local_sgd"], [2], link=Link(bytes_per_sec=1e7), together={2: TRIED})
    curves = simulate(plan, most=100, mtbf_days=math.inf, seed=0)
    for size in (2, 10, 100):
        exchange = 0.02 + plan.link.all_reduce_secs(4e6, size)
        assert curves["every_step"][size] == pytest.approx(0.1 / (0.1 + exchange), abs=1e-4)
    exchange = 0.032 + plan.link.all_reduce_secs(4e6, 100)
    assert curves["local_sgd"][100] == pytest.approx(0.1 / (0.1 + exchange / 32), abs=1e-4)
    assert curves["every_step"][1] == 1


def test_stragglers_failures_and_a_busy_server_cost_what_they_must():
    pytest.importorskip("simpy")
    plan = planned(
        ["every_step", "ps"], [2], link=Link(bytes_per_sec=1e12), together={2: TRIED}, ps={1: 0.13}
    )
    # One step in ten takes three times as long: of many workers one always does.
    plan.alone.timings[OWN, 64].update(samples=[0.1] * 9 + [0.3], secs=0.12)
    curves = simulate(plan, most=200, mtbf_days=math.inf, seed=0)
    assert curves["every_step"][200] == pytest.approx(0.12 / (0.3 + 0.02), rel=0.02)
    # Behind a server that each step keeps busy for 10 ms, two hundred workers make a hundred steps a second.
    assert curves["ps"][200] == pytest.approx(0.12 / (200 * 0.01), rel=0.1)
    failing = simulate(plan, most=200, mtbf_days=0.2, seed=0)
    # A failure every 86 s: each loses the 10 s of a start, and half of the 3.2 s since the last checkpoint.
    assert failing["every_step"][200] / curves["every_step"][200] == pytest.approx(1 - 11.6 / 96.4, rel=0.03)
    assert failing == simulate(plan, most=200, mtbf_days=0.2, seed=0)
    text = render_efficiency(failing)
    assert "200" in text and len(text.splitlines()) == 3


def test_links_are_read():
    assert parse_link("100mbit,5ms") == Link(bytes_per_sec=12.5e6, round_trip_secs=0.005)
    assert parse_link("10 Gbit/s, 50us") == Link(bytes_per_sec=1.25e9, round_trip_secs=pytest.approx(50e-6))
    assert parse_link("1gbit") == Link(bytes_per_sec=1.25e8)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--link=fast"], "link='fast'"),
        (["--link=0mbit"], "link='0mbit'"),
        (["--link=1gbit", "--hosts=a,b"], "leave one out"),
        (["--ways=every_stop"], "did you mean 'every_step'?"),
        (["--workers=two"], "workers='two'"),
        (["--workers=4", "--hosts=a,b"], "2 slots"),
        (["--strategy=ps"], "--ways"),
        (["--dp-clip-norm=1"], "plain training"),
        (["--simulate=100"], "--link or --hosts"),
        (["--simulate=0", "--link=1gbit"], "simulate=0"),
        (["--link=1gbit", "--simulate=9", "--mtbf_days=0"], "mtbf_days=0"),
        (["--hosts=a:0"], "slots"),
    ],
)
def test_mistake_is_one_line(words, part, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("tfdist.plan: ") and captured.err.count("\n") == 1
    assert part in captured.err


def test_flags_go_to_the_strategies_that_have_them():
    flags = ["--recipe=x", "--bucket_mb=4", "--num_ps=2", "--num_replicas=4", "--steps_per_loop=2"]
    assert flags_of("one_device", flags) == ["--recipe=x", "--steps_per_loop=2"]
    assert flags_of("multiworker", flags) == ["--recipe=x", "--bucket_mb=4", "--steps_per_loop=2"]
    assert flags_of("ps", flags) == ["--recipe=x", "--num_ps=2", "--steps_per_loop=2"]
    assert flags_of("pipeline", [*flags, "--recompute"]) == [
        "--recipe=x",
        "--steps_per_loop=2",
        "--recompute",
    ]
    assert flags_of("mirrored", flags) == ["--recipe=x", "--num_replicas=4", "--steps_per_loop=2"]
    assert parse_ways("ps,ps, delayed") == ["one_device", "ps", "delayed"]
