"""What private training refuses, how it counts ε, and how its batches and its noise are drawn."""

import inspect
import math

import dp_accounting
import keras
import numpy as np
import pytest
import tensorflow as tf
from dp_accounting import rdp

import tfdist
from tfdist.api.arguments import FitArguments, read_fit_data
from tfdist.api.privacy import plan_private
from tfdist.config.run_config import RunConfig
from tfdist.data import build_source
from tfdist.data.poisson import poisson_batches
from tfdist.training.privacy.accountant import PrivacyBudget, count_epsilon, least_noise, most_epochs
from tfdist.training.privacy.gradients import normal_numbers

rng = np.random.default_rng(0)
X = rng.normal(size=(200, 4)).astype(np.float32)
Y = rng.integers(0, 2, (200, 1)).astype(np.float32)
ON = {"dp_noise_multiplier": 1.0}


@pytest.fixture(scope="module")
def run():
    return tfdist.initialize(strategy="one_device")


def build(*layers, optimizer="sgd", loss="mse"):
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])
    model.compile(optimizer, loss)
    return model


def fit(run, model, x=X, y=Y, *, privacy=ON, **options):
    options = {"batch_size": 20, "verbose": 0, **options}
    return run.fit(model, x, y, privacy=tfdist.PrivacyOptions(**privacy), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dp_noise_multiplier": -1.0}, "dp_noise_multiplier=-1.0: it must be 0 or more"),
        ({"dp_noise_multiplier": 1.0, "dp_clip_norm": 0.0}, "dp_clip_norm=0.0: it must be more than 0"),
        ({"dp_noise_multiplier": 1.0, "dp_clip_norm": math.nan}, "dp_clip_norm=nan: it must be more than 0"),
        ({"dp_noise_multiplier": 1.0, "dp_clip_norm": math.inf}, "dp_clip_norm=inf with noise"),
        ({"dp_noise_multiplier": 1.0, "dp_delta": 1.0}, "dp_delta=1.0: it must be less than 1"),
        (
            {"dp_noise_multiplier": 1.0, "dp_sampling": "none"},
            "dp_sampling='none': choose one of poisson, shuffle",
        ),
        ({"dp_noise_multiplier": 0.0, "dp_target_epsilon": 1.0}, "without noise ε has no bound"),
        ({"dp_target_epsilon": 0.0}, "dp_target_epsilon=0.0: it must be more than 0"),
        ({"dp_clip_norm": 2.0}, "dp_clip_norm=2.0 without dp_noise_multiplier or dp_target_epsilon"),
    ],
)
def test_values_that_break_their_rule_are_refused(options, message):
    with pytest.raises(tfdist.ConfigError, match=message):
        tfdist.PrivacyOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "ps"}, "private training with strategy='ps'"),
        ({"strategy": "multiworker", "sync": "diloco"}, "private training with sync, compression"),
        (
            {"strategy": "multiworker", "exchange_dtype": "bfloat16"},
            "private training with sync, compression",
        ),
        ({"on_nan": "skip"}, "on_nan='skip' with private training"),
        ({"jit_compile": "on"}, "jit_compile='on' with private training"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(tfdist.ConfigError, match=message):
        RunConfig(recipe="x", global_batch_size=8, epochs=1, run_dir="r", dp_noise_multiplier=1.0, **options)


class OwnStep(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize(
    ("layers", "message", "compiled"),
    [
        ([keras.layers.BatchNormalization], "keeps statistics over the examples", {}),
        ([], "reduction='sum' in private training", {"loss": keras.losses.MeanSquaredError(reduction="sum")}),
        (
            [],
            "gradient_accumulation_steps",
            {"optimizer": keras.optimizers.SGD(gradient_accumulation_steps=2)},
        ),
        (
            [],
            "mixed precision float16",
            {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())},
        ),
    ],
)
def test_models_without_gradients_of_single_examples_are_refused(run, layers, message, compiled):
    with pytest.raises(tfdist.ConfigError, match=message):
        fit(run, build(*(layer() for layer in layers), **compiled))


def test_a_step_of_ones_own_is_refused(run):
    inputs = keras.Input((4,))
    model = OwnStep(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(tfdist.ConfigError, match="train_step of its own"):
        fit(run, model)


def test_frozen_statistics_are_allowed(run):
    normal = keras.layers.BatchNormalization()
    normal.trainable = False
    assert fit(run, build(normal)).history["epsilon"][0] > 0


def test_data_that_cannot_be_drawn_are_refused(run):
    stream = tf.data.Dataset.from_tensor_slices((X, Y))
    with pytest.raises(
        tfdist.ConfigError, match="dp_sampling='poisson' with data that come one after the other"
    ):
        fit(run, build(), stream, None)
    with pytest.raises(tfdist.ConfigError, match="give dp_delta"):
        fit(run, build(), stream.filter(lambda x, y: True), None, privacy={**ON, "dp_sampling": "shuffle"})
    with pytest.raises(tfdist.ConfigError, match="shuffle=False with dp_sampling='poisson'"):
        fit(run, build(), shuffle=False)
    with pytest.raises(tfdist.ConfigError, match="batch_size=8 of 200 examples .* at least 16"):
        fit(run, build(), batch_size=8)
    with pytest.raises(tfdist.ConfigError, match="batch_size=300 of 200 examples .* at most all"):
        fit(run, build(), batch_size=300)
    assert len(fit(run, build(), stream, None, privacy={**ON, "dp_sampling": "shuffle"}).history["loss"]) == 1


def test_epsilon_is_that_of_the_gaussian_mechanism():
    """Where nothing is left to chance there is a closed form (Balle and Wang 2018)."""
    for noise, epochs in ((4.0, 20), (10.0, 3), (1.5, 1)):
        exact = dp_accounting.get_epsilon_gaussian(noise / math.sqrt(epochs), 1e-5)
        assert count_epsilon([(noise, 1.0, epochs)], 1e-5) == pytest.approx(exact, rel=3e-3)
        assert count_epsilon([(noise, 1.0, epochs)], 1e-5) >= exact  # never less


def test_epsilon_of_samples_is_bounded_by_renyis():
    for noise, share, count in ((1.1, 0.01, 1000), (0.8, 0.1, 50)):
        accountant = rdp.RdpAccountant()
        event = dp_accounting.PoissonSampledDpEvent(share, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(event, count)
        bound = accountant.get_epsilon(1e-5)
        assert 0.75 * bound < count_epsilon([(noise, share, count)], 1e-5) < bound


def test_noise_and_epochs_are_the_most_and_least_that_fit():
    noise = least_noise((), share=0.1, count=100, delta=1e-5, target=2.0)
    assert count_epsilon([(noise, 0.1, 100)], 1e-5) <= 2.0 < count_epsilon([(noise - 0.01, 0.1, 100)], 1e-5)
    epochs = most_epochs((), (2.0, 0.1, 10), delta=1e-5, target=2.0, epochs=1000)
    fits, passes = (count_epsilon([(2.0, 0.1, 10 * n)], 1e-5) for n in (epochs, epochs + 1))
    assert fits <= 2.0 < passes
    assert most_epochs((), (2.0, 0.1, 10), delta=1e-5, target=2.0, epochs=3) == 3
    with pytest.raises(tfdist.ConfigError, match="cannot be reached with any noise"):
        least_noise([(0.5, 1.0, 10)], share=0.1, count=10, delta=1e-5, target=0.5)


def test_an_epsilon_that_the_first_epoch_passes_names_the_noise_that_keeps_it(run):
    with pytest.raises(
        tfdist.ConfigError, match=r"would be passed in the first epoch .* keep within it with \d"
    ):
        fit(run, build(), epochs=3, privacy={"dp_noise_multiplier": 0.5, "dp_target_epsilon": 0.5})


def test_training_ends_with_the_last_epoch_that_keeps_within_epsilon(run, capfd):
    history = fit(
        run, build(), epochs=50, verbose=2, privacy={"dp_noise_multiplier": 2.0, "dp_target_epsilon": 2.0}
    )
    spent = history.history["epsilon"]
    assert 1 < len(spent) < 50
    assert spent == sorted(spent)
    assert spent[-1] <= 2.0
    assert count_epsilon([(2.0, 0.1, 10 * (len(spent) + 1))], 200**-1.1) > 2.0
    assert f"{len(spent)} epochs, with which ε stays within 2" in capfd.readouterr().out


def test_noise_is_chosen_for_all_epochs(run, capfd):
    history = fit(run, build(), epochs=4, verbose=2, privacy={"dp_target_epsilon": 2.0})
    assert 1.8 < history.history["epsilon"][-1] <= 2.0
    assert "dp_noise_multiplier=" in capfd.readouterr().out


def test_what_a_model_was_trained_with_before_counts(run):
    model, other = build(), build()
    first = fit(run, model, epochs=2).history["epsilon"][-1]
    second = fit(run, model, epochs=3, initial_epoch=2).history["epsilon"][-1]
    assert second > first
    assert second == fit(run, other, epochs=3).history["epsilon"][-1]


def test_a_resumed_run_counts_what_was_spent(run, tmp_path):
    checkpoints = tfdist.Checkpoints(directory=tmp_path)
    whole = fit(run, build(), epochs=4).history["epsilon"]
    fit(run, build(), epochs=2, checkpoints=checkpoints)
    assert fit(run, build(), epochs=4, checkpoints=checkpoints).history["epsilon"] == whole
    # With other noise from here on; and what was spent already is not to be undone by asking for less.
    more = fit(run, build(), epochs=5, checkpoints=checkpoints, privacy={"dp_noise_multiplier": 3.0})
    exact = count_epsilon([(1.0, 0.1, 40), (3.0, 0.1, 10)], 200**-1.1)
    assert more.history["epsilon"] == pytest.approx([*whole, exact])
    privacy = {"dp_noise_multiplier": 3.0, "dp_target_epsilon": whole[-1]}
    with pytest.raises(tfdist.ConfigError, match="would be passed by epoch 6"):
        fit(run, build(), epochs=6, checkpoints=checkpoints, privacy=privacy)


def test_budget_adds_to_the_logs():
    budget = PrivacyBudget(epoch=(1.0, 0.1, 10), before=(), delta=1e-5, target=None)
    logs = {"loss": 1.0}
    budget.on_epoch_end(0, logs)
    budget.on_epoch_end(1, logs)
    assert logs["epsilon"] == count_epsilon([(1.0, 0.1, 20)], 1e-5)
    assert budget.spent == [(1.0, 0.1, 20)]


def test_without_noise_there_is_no_epsilon(run, capfd):
    history = fit(run, build(), verbose=2, privacy={"dp_noise_multiplier": 0.0})
    assert "epsilon" not in history.history
    assert "nothing is private" in capfd.readouterr().out


def test_poisson_batches_hold_each_example_by_a_chance_of_its_own():
    numbers = np.arange(1000)
    source = poisson_batches(build_source((numbers, numbers)), batch_size=20, key=b"k" * 16)
    assert source.num_batches == 50
    batches = [x.numpy() for seed in range(40) for x, _ in source.reorder(seed)]
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.mean() == pytest.approx(20, abs=0.4)
    assert sizes.var() == pytest.approx(
        1000 * 0.02 * 0.98, rel=0.12
    )  # binomial: batches of one size would have none
    counts = np.bincount(np.concatenate(batches), minlength=1000) / len(batches)
    assert abs(counts - 0.02).max() < 0.016  # five standard deviations
    assert all(len(set(batch)) == len(batch) for batch in batches)
    together = np.mean([np.isin(batch + 1, batch).sum() for batch in batches])
    assert together == pytest.approx(999 * 0.02**2, rel=0.15)
    again = poisson_batches(build_source((numbers, numbers)), batch_size=20, key=b"k" * 16)
    np.testing.assert_array_equal(next(iter(again.reorder(7)))[0], next(iter(source.reorder(7)))[0])


def test_cryptographic_numbers_are_normal():
    numbers = normal_numbers(200_001)
    assert numbers.shape == (200_001,)
    assert numbers.dtype == np.float32
    assert numbers.mean() == pytest.approx(0, abs=0.01)
    assert numbers.std() == pytest.approx(1, abs=0.01)
    assert (numbers**4).mean() == pytest.approx(3, abs=0.1)
    halves = numbers[:100_000], numbers[100_001:]
    assert np.corrcoef(*halves)[0, 1] == pytest.approx(0, abs=0.015)
    assert not np.array_equal(numbers, normal_numbers(200_001))


def test_plan_draws_nothing_for_shuffled_data(run):
    told = {
        "model": build(),
        "x": X,
        "y": Y,
        "batch_size": 20,
        "privacy": tfdist.PrivacyOptions(dp_noise_multiplier=1.0, dp_sampling="shuffle"),
    }
    parameters = inspect.signature(tfdist.Run.fit).parameters.values()
    given = FitArguments(**{p.name: p.default for p in parameters if p.name != "self"} | told)
    data = read_fit_data(given)
    plan = plan_private(given, data, broadcast=lambda content: content, before=())
    assert plan.data is data
    assert plan.mechanism.divisor is None
