"""Which settings a sweep tries."""

import pytest

from tfdist.errors import ConfigError
from tfdist.sweeping.space import Range, read_space, render_choice


def read(tmp_path, text):
    (tmp_path / "space.yaml").write_text(text)
    return read_space(str(tmp_path / "space.yaml"))


def test_ranges_are_read(tmp_path):
    space = read(
        tmp_path,
        "learning-rate: {low: 1e-4, high: 0.1, log: true}\nset.widths: [[8, 16], [32]]\n"
        "set.drop-out: {low: 0, high: 0.5, step: 0.1}\nbatch_size: {choices: [32, 64]}\nepochs: {low: 1, high: 9}\n",
    )
    assert space == {
        "learning_rate": Range(low=1e-4, high=0.1, log=True),
        "set.widths": Range(choices=("8,16", "32")),
        "set.drop-out": Range(low=0, high=0.5, step=0.1),
        "batch_size": Range(choices=(32, 64)),
        "epochs": Range(low=1, high=9),
    }
    assert space["epochs"].is_whole and not space["set.drop-out"].is_whole


@pytest.mark.parametrize(
    "text",
    ["a: 3", "a: []", "a: {low: 1}", "a: {low: 2, high: 1}", "a: {low: x, high: y}", "a: {low: 0, high: 1, log: true}",
     "a: {low: 1, high: 2, step: 0}", "a: {low: 1, high: 9, step: 2, log: true}", "a: {lo: 1, high: 2}", "- a", "",
     "a: [1", "a: {choices: [1], low: 1}", "a: {low: true, high: 3}"],
)  # fmt: skip
def test_mistake_names_the_setting_and_what_to_write(tmp_path, text):
    with pytest.raises(ConfigError, match="space=") as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_choice_becomes_flags():
    assert render_choice({"epochs": 3, "set.filters": 8, "set.rate": 0.5, "drop_remainder": True}) == [
        "--epochs=3", "--drop_remainder=true", "--set=filters=8", "--set=rate=0.5",
    ]  # fmt: skip
