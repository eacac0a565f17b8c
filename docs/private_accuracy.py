"""Draws what privacy costs private_tabular into privacy.svg, and prints it.

python docs/private_accuracy.py
"""

import os
import statistics
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib as mpl
from made import ROOT

import tfdist
from tfdist.recipe import load_recipe

EPSILONS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
NUM_SEEDS = 5


def accuracy(run: tfdist.Run, recipe: tfdist.Recipe, epsilon: float | None, seed: int) -> float:
    """Returns the test accuracy after training on one division of the patients."""
    keras.utils.set_random_seed(seed)
    with run.strategy.scope():
        model = recipe.build_model()
    privacy = (
        None if epsilon is None else tfdist.PrivacyOptions(dp_target_epsilon=epsilon, dp_noise_seed=seed)
    )
    train, test = (recipe.build_data(split, seed=seed) for split in ("train", "test"))
    size = recipe.global_batch_size
    run.fit(model, *train, batch_size=size, epochs=recipe.epochs, verbose=0, privacy=privacy)
    return float(run.evaluate(model, *test, batch_size=size, verbose=0, return_dict=True)["accuracy"])


def main() -> int:
    """Trains, prints and draws."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tfdist"
    from matplotlib import pyplot as plt

    run, recipe = tfdist.initialize(strategy="one_device"), load_recipe("private_tabular")
    found = {e: [accuracy(run, recipe, e, seed) for seed in range(NUM_SEEDS)] for e in (*EPSILONS, None)}
    for epsilon, values in found.items():
        print(f"epsilon {epsilon}: {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    means = [statistics.mean(found[e]) for e in EPSILONS]
    axes.plot(EPSILONS, means, marker="o", label="mean of 5 seeds")
    axes.fill_between(
        EPSILONS,
        [min(found[e]) for e in EPSILONS],
        [max(found[e]) for e in EPSILONS],
        alpha=0.2,
        label="range",
    )
    axes.axhline(statistics.mean(found[None]), color="grey", linestyle="--", label="without privacy")
    axes.set(xlabel="ε", ylabel="test accuracy", title="private_tabular: 455 patients")
    axes.legend(loc="lower right")
    figure.savefig(ROOT / "docs/privacy.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
