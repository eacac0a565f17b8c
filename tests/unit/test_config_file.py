"""Settings in a file are those of the command line; what the command line says wins."""

import json
import random

import pytest
import yaml

from tfdist.commands.flags import build_config, collect_settings, define_flags, parse_flags, resolve_run
from tfdist.config.config_file import read_config_file, render_config_file
from tfdist.config.run_config import RunConfig
from tfdist.config.settings import settings_of, types_of
from tfdist.errors import ConfigError
from tfdist.launcher.flags import parse_flags as parse_launch_flags
from tfdist.train import main


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return f"--config={tmp_path / name}"

    return write


def resolve(*words, environ=None):
    return resolve_run(parse_flags(words), None, environ or {})


def some_words(rng):
    """Flags at random, each with a value that it may have."""
    words = []
    kinds = types_of(RunConfig)
    for name, (_, rule) in settings_of(RunConfig).items():
        if name in ("overrides", "resume", "strategy", "mode", "run_dir") or rng.random() < 0.6:
            continue
        number = {int: rng.randrange(1, 9), float: rng.randrange(1, 9) / 8}
        value = rng.choice(rule.choices) if rule.choices else number.get(next(iter(kinds[name])), "some text")
        flag = define_flags()[name]
        choices = getattr(flag.parser, "enum_values", None)
        value = rng.choice(choices) if choices else value
        words.append(f"--{name}={rng.choice(['true', 'false'])}" if flag.boolean else f"--{name}={value}")
    return [*words, "--strategy=ps", "--set=a=1", "--set=b=x,y", "--hosts=h1:2,h2"]


@pytest.mark.parametrize("seed", range(8))
def test_file_says_what_the_command_line_said(write, seed):
    words = some_words(random.Random(seed))
    values = parse_flags(words)
    again = parse_flags([write(render_config_file(collect_settings(values)))])
    for name in values:
        if name != "config":
            assert again[name].value == values[name].value, name


def test_run_is_done_again_by_its_own_config(tmp_path):
    config = RunConfig(
        recipe="wide_deep",
        global_batch_size=32,
        epochs=2,
        run_dir=str(tmp_path),
        strategy="ps",
        num_workers=3,
        num_ps=2,
        resume=True,
        overrides=("hidden=8,4", "dropout=0.1"),
        optimizer="adam",
        learning_rate=0.01,
        staleness_lr="inverse",
    )
    (tmp_path / "config.json").write_text(config.to_json())
    again = build_config(resolve(f"--config={tmp_path}/config.json", "--run_dir=elsewhere"), None)
    assert again.to_dict() == config.to_dict() | {"run_dir": "elsewhere", "resume": False}
    # In a folder of its own, if nobody says which.
    assert resolve(f"--config={tmp_path}/config.json")["run_dir"] != str(tmp_path)


def test_flags_win(write):
    file = write("epochs: 3\nseed: 1\nset: {units: 4, width: 2}\n")
    fields = resolve("--epochs=5", file, "--set=width=3")
    assert (fields["epochs"], fields["seed"]) == (5, 1)
    assert fields["overrides"] == ("units=4", "width=2", "width=3")  # of a name given twice the last counts


def test_another_strategy_leaves_out_what_only_the_files_has(write):
    file = write("strategy: ps\nnum_ps: 2\nnum_workers: 3\nps_mode: sync\nepochs: 4\n")
    fields = resolve(file, "--strategy=multiworker", "--global_batch_size=8")
    assert (fields["num_ps"], fields["num_workers"], fields["epochs"]) == (0, 2, 4)
    build_config(fields, None)
    assert resolve(file, "--strategy=parameter_server")["num_ps"] == 2


def test_names_are_those_of_flags(write):
    file = write(
        "batch-size: 7\nmodel_dir: some dir\ndrop-remainder: yes\nnum_workers: '2:4'\nprofile: null\n"
    )
    values = parse_flags([file])
    assert (values.global_batch_size, values.run_dir, values.drop_remainder) == (7, "some dir", True)
    assert (values.num_workers, values.profile) == ("2:4", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epocs: 3", "there is no setting 'epocs'; did you mean 'epochs'"),
        ("dry_run: true", "there is no setting 'dry_run'"),
        ("a: [1", "is no YAML: .* in line"),
        ("- 3", "holds no settings"),
        ("", "holds no settings"),
        ("\tepochs: 3", "is no YAML"),
    ],
)
def test_mistake_is_one_line(write, text, said):
    with pytest.raises(ConfigError, match=said):
        parse_flags([write(text)])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--config", "needs a file"),
        ("--config=nowhere.yaml", "cannot be read"),
        ("--config=.", "cannot be read"),
    ],
)
def test_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, word, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        parse_flags([word])


def test_file_is_plain_yaml():
    text = render_config_file({"epochs": 3, "set": ["a=1"], "hosts": None, "learning_rate": 1e-3})
    assert yaml.safe_load(text) == {"epochs": 3, "set": ["a=1"], "hosts": None, "learning_rate": 0.001}


def test_numbers_keep_their_digits(write):
    assert parse_flags([write("learning_rate: 1e-3\nmax_loss_spike: 2.5\n")]).learning_rate == 1e-3


def test_json_is_yaml(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"run_dir": "x", "resume": True, "overrides": ["a=1"]}))
    assert read_config_file(tmp_path / "a.json") == {"run_dir": "x", "resume": True, "set": ["a=1"]}


def test_one_file_serves_every_place(write):
    """What deals the roles is the launcher's, all else the program's."""
    file = write(
        "strategy: ps\nnum_workers: 3\nnum_ps: 2\nrecipe: wide_deep\nmax_restarts: 2\nset: {dropout: 0.1}\n"
    )
    own = ["-m", "tfdist.train", "--recipe=wide_deep", "--set=dropout=0.1"]
    for words in ([file], [file, "-m", "tfdist.train"]):
        job = parse_launch_flags(words, {}).job
        assert list(job.command[-4:]) == own
        assert (job.strategy, job.num_workers, job.num_ps, job.max_restarts) == ("ps", 3, 2, 2)
    assert parse_launch_flags([file, "--num_ps=1", "-m", "tfdist.train", "--seed=3"], {}).job.num_ps == 1
    with pytest.raises(ConfigError, match="recipe, set are settings of tfdist.train"):
        parse_launch_flags([file, "--", "echo"], {})
    switch = write("slurm: true\nnodes: 2\nntasks_per_node: 1\n", "slurm.yaml")
    assert (
        parse_launch_flags([switch], {}).backend
        is parse_launch_flags(["--slurm", "--nodes=2", "-m", "tfdist.train"], {}).backend
    )


def test_command_line_is_written_and_nothing_overwritten(tmp_path, capsys):
    path = tmp_path / "my run.yaml"
    words = ["--strategy=ps", "--epochs=2", "--set=units=3", f"--write_config={path}"]
    assert main(words) == 0
    assert str(path) in capsys.readouterr().out
    assert yaml.safe_load(path.read_text()) == {"epochs": 2, "set": ["units=3"], "strategy": "ps"}
    assert main(words) == 2
    assert "exists; name another file" in capsys.readouterr().err
    assert main([f"--write_config={tmp_path}/no/such/run.yaml"]) == 2
    assert "cannot be written" in capsys.readouterr().err
