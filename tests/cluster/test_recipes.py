"""Every recipe reaches its metric under every strategy, through the command that its docstring names."""

import re

import pytest
from test_train_command import STRATEGIES, run_train

pytestmark = pytest.mark.cluster
# A recipe's own settings, made smaller where the whole would take minutes, and the test metric that they must reach:
# what seeds 0 and 1 gave under all four strategies, less a hundredth or more. By guessing: 0.5 for an AUC, 0.1 for
# digits, 0.17 (always a blank) for text.
RECIPES = {
    "digits_cnn": ([], "accuracy", 0.97),
    "wide_deep": (["--epochs=2"], "auc", 0.78),
    "wide_deep breast_cancer": (["--set", "data=breast_cancer"], "auc", 0.95),
    "text_lm": (
        [
            "--set=width=32",
            "--set=num_layers=1",
            "--set=sequence_length=32",
            "--epochs=1",
            "--steps_per_epoch=200",
        ],
        "accuracy",
        0.30,
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_reaches_its_metric(tmp_path, name, strategy):
    flags, metric, floor = RECIPES[name]
    done = run_train(tmp_path, f"--recipe={name.split()[0]}", f"--strategy={strategy}", *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (last,) = re.findall(rf"test .*\b{metric} (\d\.\d+)", done.stdout)
    assert float(last) > floor
