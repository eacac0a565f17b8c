import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist.errors import ConfigError
from tfdist.optimizers import (
    LARS,
    OPTIMIZERS,
    SCHEDULES,
    LazyAdam,
    LazyFtrl,
    LazyRMSprop,
    LazySGD,
    build_optimizer,
    build_schedule,
)
from tfdist.optimizers.schedules import MAX_WARMUP_STAIRS

CLASSES = {
    "sgd": (keras.optimizers.SGD, 0.1),
    "momentum": (keras.optimizers.SGD, 0.05),
    "adagrad": (keras.optimizers.Adagrad, 0.05),
    "rmsprop": (keras.optimizers.RMSprop, 1e-3),
    "adam": (keras.optimizers.Adam, 1e-3),
    "adamw": (keras.optimizers.AdamW, 1e-3),
    "ftrl": (keras.optimizers.Ftrl, 0.05),
    "lamb": (keras.optimizers.Lamb, 1e-3),
    "lars": (LARS, 1.0),
    "lazy_momentum": (LazySGD, 0.05),
    "lazy_rmsprop": (LazyRMSprop, 1e-3),
    "lazy_adam": (LazyAdam, 1e-3),
    "lazy_ftrl": (LazyFtrl, 0.05),
}
RATE = 0.3


def rate_at(schedule, step):
    return schedule if isinstance(schedule, float) else float(schedule(step))


def warmup(step, warmup_steps):
    return RATE * (step + 1) / (warmup_steps + 1)


def cosine(step, *, total_steps, warmup_steps=0):
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return RATE * (1 + math.cos(math.pi * progress)) / 2


def apply_once(optimizer, weight, grad):
    variable = keras.Variable(np.float32(weight))
    optimizer.apply([tf.constant(grad, tf.float32)], [variable])
    return variable.numpy()


def test_every_optimizer_is_tested():
    assert tuple(CLASSES) == OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_build_optimizer_gives_the_class_with_its_own_rate(name):
    optimizer = build_optimizer(name)
    kind, rate = CLASSES[name]
    assert type(optimizer) is kind
    assert float(optimizer.learning_rate) == pytest.approx(rate)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_build_optimizer_takes_the_rate_given(name):
    assert float(build_optimizer(name, learning_rate=0.25).learning_rate) == 0.25


@pytest.mark.parametrize("name", ["Adam", " ADAMW ", "rmsprop"])
def test_build_optimizer_takes_a_name_in_any_case(name):
    assert type(build_optimizer(name)) is CLASSES[name.strip().lower()][0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_build_optimizer_otherwise_keeps_keras_defaults(name):
    kind, rate = CLASSES[name]
    expected = kind(rate).get_config() | ({"momentum": 0.9} if name.endswith("momentum") else {})
    got = build_optimizer(name).get_config()
    assert {k: v for k, v in got.items() if k != "name"} == {k: v for k, v in expected.items() if k != "name"}


@pytest.mark.parametrize(
    ("name", "expected"), [("sgd", 0.0), ("momentum", 0.9), ("rmsprop", 0.0), ("sgd", 0.5), ("momentum", 0.0)]
)
def test_momentum_is_the_names_own_or_the_one_given(name, expected):
    own = {"sgd": 0.0, "momentum": 0.9, "rmsprop": 0.0}[name]
    given = {} if expected == own else {"momentum": expected}
    assert build_optimizer(name, **given).momentum == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_built_optimizer_loads_in_plain_keras(schedule):
    optimizer = build_optimizer("adam", schedule=schedule, total_steps=100, warmup_steps=7)
    config = keras.saving.serialize_keras_object(optimizer)
    assert "tfdist" not in repr(config)
    again = keras.saving.deserialize_keras_object(config)
    for step in (0, 3, 7, 50, 99):
        optimizer.iterations.assign(step)
        again.iterations.assign(step)
        assert float(again.learning_rate) == float(optimizer.learning_rate) > 0


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("lars", "ftrl", "lazy_ftrl")])
def test_weight_decay_is_decoupled(name):
    decaying = build_optimizer(name, learning_rate=0.5, weight_decay=0.1)
    np.testing.assert_allclose(apply_once(decaying, [2.0, -4.0], [0.0, 0.0]), [1.9, -3.8], rtol=1e-6)
    if name == "lamb":
        return  # measures its step by the weights, which are smaller by then

    # Through the gradient instead, an adaptive optimizer would divide the decay away again.
    plain = build_optimizer(name, learning_rate=0.5, weight_decay=0.0)
    decaying = build_optimizer(name, learning_rate=0.5, weight_decay=0.1)
    moved = apply_once(plain, [2.0, -4.0], [0.1, 0.2]) - [2.0, -4.0]
    np.testing.assert_allclose(apply_once(decaying, [2.0, -4.0], [0.1, 0.2]), moved + [1.9, -3.8], rtol=1e-5)


def test_weight_decay_of_adamw_is_there_unless_given():
    assert build_optimizer("adamw").weight_decay == 0.004
    assert build_optimizer("adamw", weight_decay=0.1).weight_decay == 0.1
    assert all(build_optimizer(name).weight_decay is None for name in OPTIMIZERS if name != "adamw")


def test_clipnorm_looks_at_each_variable_and_global_clipnorm_at_all():
    grads = [tf.constant([3.0, 4.0]), tf.constant([0.0, 12.0])]
    for setting, expected in (
        ("clipnorm", [[-0.6, -0.8], [0.0, -1.0]]),
        ("global_clipnorm", [[-3 / 13, -4 / 13], [0.0, -12 / 13]]),
    ):
        variables = [keras.Variable(np.zeros(2, "float32")) for _ in grads]
        build_optimizer("sgd", learning_rate=1.0, **{setting: 1.0}).apply(grads, variables)
        for variable, value in zip(variables, expected, strict=True):
            np.testing.assert_allclose(variable.numpy(), value, rtol=1e-6)


def test_gradient_accumulation_applies_the_mean_of_its_batches():
    optimizer = build_optimizer("sgd", learning_rate=1.0, gradient_accumulation_steps=2)
    variable = keras.Variable(np.zeros(1, "float32"))
    seen = []
    for grad in (1.0, 3.0, 5.0, 5.0):
        optimizer.apply([tf.constant([grad])], [variable])
        seen.append(float(variable.numpy()[0]))
    assert seen == [0.0, -2.0, -2.0, -7.0]


def test_gradient_accumulation_over_one_batch_is_none():
    assert build_optimizer("sgd", gradient_accumulation_steps=1).gradient_accumulation_steps is None


def test_ema_averages_the_weights():
    optimizer = build_optimizer("sgd", learning_rate=1.0, use_ema=True, ema_momentum=0.75)
    variable = keras.Variable(np.zeros(1, "float32"))
    for _ in range(2):
        optimizer.apply([tf.constant([-4.0])], [variable])
    np.testing.assert_allclose(variable.numpy(), [8.0])
    optimizer.finalize_variable_values([variable])
    # The first step's average is its weight.
    np.testing.assert_allclose(variable.numpy(), [0.75 * 4.0 + 0.25 * 8.0], rtol=1e-6)
    assert not build_optimizer("sgd", ema_momentum=0.5).use_ema


@pytest.mark.parametrize("total_steps", [None, 10])
def test_constant_is_a_bare_number(total_steps):
    assert build_schedule("constant", learning_rate=RATE, total_steps=total_steps) == RATE


@pytest.mark.parametrize("warmup_steps", [1, 5, 100])
@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_warmup_is_linear_and_ends_at_the_whole_rate(name, warmup_steps):
    schedule = build_schedule(
        name, learning_rate=RATE, warmup_steps=warmup_steps, total_steps=2 * warmup_steps
    )
    for step in {0, warmup_steps // 2, warmup_steps - 1}:
        assert rate_at(schedule, step) == pytest.approx(warmup(step, warmup_steps))
    assert rate_at(schedule, warmup_steps) == pytest.approx(RATE)


def test_constant_stays_after_its_warmup():
    schedule = build_schedule("constant", learning_rate=RATE, warmup_steps=4)
    assert [rate_at(schedule, step) for step in (4, 5, 6, 1000, 10**7)] == [pytest.approx(RATE)] * 5


@pytest.mark.parametrize("warmup_steps", [0, 10])
@pytest.mark.parametrize("step", [10, 11, 55, 99, 100])
def test_cosine_follows_its_formula(step, warmup_steps):
    schedule = build_schedule("cosine", learning_rate=RATE, total_steps=100, warmup_steps=warmup_steps)
    expected = cosine(step, total_steps=100, warmup_steps=warmup_steps)
    assert rate_at(schedule, step) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_cosine_starts_whole_and_stays_at_zero():
    schedule = build_schedule("cosine", learning_rate=RATE, total_steps=100)
    assert rate_at(schedule, 0) == pytest.approx(RATE)
    assert [rate_at(schedule, step) for step in (100, 101, 10**6)] == [0.0] * 3


@pytest.mark.parametrize("warmup_steps", [0, 7, 20])
@pytest.mark.parametrize(
    ("step", "share"), [(20, 1), (49, 1), (50, 0.1), (74, 0.1), (75, 0.01), (99, 0.01), (1000, 0.01)]
)
def test_step_drops_at_half_and_three_quarters(step, share, warmup_steps):
    schedule = build_schedule("step", learning_rate=RATE, total_steps=100, warmup_steps=warmup_steps)
    assert rate_at(schedule, step) == pytest.approx(RATE * share)


@pytest.mark.parametrize("warmup_steps", [1, 7, MAX_WARMUP_STAIRS])
def test_step_has_an_exact_warmup_while_it_is_short(warmup_steps):
    schedule = build_schedule("step", learning_rate=RATE, total_steps=100, warmup_steps=warmup_steps)
    for step in range(warmup_steps):
        assert rate_at(schedule, step) == pytest.approx(warmup(step, warmup_steps))


@pytest.mark.parametrize("warmup_steps", [MAX_WARMUP_STAIRS + 1, 47, 200])
def test_step_has_a_long_warmup_in_equal_stairs(warmup_steps):
    schedule = build_schedule(
        "step", learning_rate=RATE, total_steps=4 * warmup_steps, warmup_steps=warmup_steps
    )
    rates = [rate_at(schedule, step) for step in range(warmup_steps + 1)]
    assert len(set(rates[:-1])) == MAX_WARMUP_STAIRS
    assert all(low <= high for low, high in pairwise(rates))
    assert rates[-1] == pytest.approx(RATE)
    widest = math.ceil(warmup_steps / MAX_WARMUP_STAIRS)
    for step, rate in enumerate(rates[:-1]):
        assert abs(rate - warmup(step, warmup_steps)) <= RATE * widest / (warmup_steps + 1) / 2 * 1.001
    # As much rate as the linear one hands out.
    assert sum(rates[:-1]) == pytest.approx(sum(warmup(step, warmup_steps) for step in range(warmup_steps)))


@pytest.mark.parametrize(
    ("total_steps", "warmup_steps", "shares"),
    [
        (1, 0, [1]),
        (2, 0, [1, 0.01]),
        (3, 0, [1, 0.1, 0.01]),
        (4, 0, [1, 1, 0.1, 0.01]),
        (4, 3, [0.25, 0.5, 0.75, 0.01]),
        (10, 6, [*(k / 7 for k in range(1, 7)), 0.1, 0.01, 0.01, 0.01]),
    ],
)
def test_step_of_a_short_run_drops_when_the_warmup_has_ended(total_steps, warmup_steps, shares):
    schedule = build_schedule("step", learning_rate=RATE, total_steps=total_steps, warmup_steps=warmup_steps)
    assert [rate_at(schedule, step) / RATE for step in range(total_steps)] == pytest.approx(shares)


def test_optimizer_follows_its_schedule():
    optimizer = build_optimizer("sgd", learning_rate=RATE, schedule="Step", total_steps=8, warmup_steps=2)
    variable, seen = keras.Variable(0.0), [0.0]
    for _ in range(8):
        optimizer.apply([tf.constant(-1.0)], [variable])
        seen.append(float(variable))
    rates = [after - before for before, after in pairwise(seen)]
    assert [rate / RATE for rate in rates] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-4
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adan", r"no optimizer 'adan'\. Did you mean 'adam'\? Choose one of sgd, momentum, adagrad"),
        ("zzz", r"no optimizer 'zzz'\. Choose one of sgd"),
        ("", r"no optimizer ''\. Choose"),
    ],
)
def test_unknown_optimizer(name, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cosin", r"no schedule 'cosin'\. Did you mean 'cosine'\? Choose one of constant, cosine, step\."),
        ("zzz", r"no schedule 'zzz'\. Choose one of"),
    ],
)
def test_unknown_schedule(name, message):
    with pytest.raises(ConfigError, match=message):
        build_schedule(name, learning_rate=RATE, total_steps=10)
    with pytest.raises(ConfigError, match=message):
        build_optimizer("sgd", schedule=name, total_steps=10)


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_schedule_without_its_total_steps(name):
    with pytest.raises(ConfigError, match=rf"'{name}' needs total_steps.*or choose the schedule 'constant'"):
        build_schedule(name, learning_rate=RATE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0}, "learning_rate=0.0: it must be greater than 0"),
        ({"learning_rate": -0.1}, "greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": math.inf}, "learning_rate=inf: .* finite"),
        ({"warmup_steps": -1}, "warmup_steps=-1: it must be 0"),
        ({"schedule": "cosine", "total_steps": 5, "warmup_steps": 5}, "longer than its warm-up"),
        ({"schedule": "step", "total_steps": 0}, "total_steps=0 with warmup_steps=0"),
        ({"momentum": 1.0}, "momentum=1.0: it must be at least 0 and less than 1"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"name": "adam", "momentum": 0.9}, "adam has no momentum; .* choose sgd, momentum, rmsprop"),
        ({"clipnorm": 0}, "clipnorm=0: it must be greater than 0"),
        ({"global_clipnorm": -1.0}, "global_clipnorm=-1.0: it must be greater than 0"),
        ({"global_clipnorm": math.inf}, "global_clipnorm=inf: .* leave it out"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, "clipnorm=1.0 with global_clipnorm=1.0: choose one"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: it must be 0 or more"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"name": "lazy_ftrl", "weight_decay": 0.1}, "weight_decay=0.1: lazy_ftrl computes each weight anew"),
        ({"weight_decay": math.inf}, "weight_decay=inf: .* finite"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: it must be 1"),
        ({"use_ema": True, "ema_momentum": 1.0}, "ema_momentum=1.0"),
    ],
)
def test_number_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(**({"name": "sgd"} | changes))


def test_names_are_known_without_tensorflow():
    code = (
        "import sys; from tfdist.optimizers import OPTIMIZERS, build_schedule;"
        "build_schedule('constant', learning_rate=0.1);"
        "print(*sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
