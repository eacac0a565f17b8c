import dataclasses
import json
from datetime import datetime

import pytest

from tfdist.config.run_config import RunConfig, default_num_tasks, default_run_dir
from tfdist.errors import ConfigError

MINIMAL = {"recipe": "digits_cnn", "global_batch_size": 64, "epochs": 5, "run_dir": "runs/a b"}


def build_config(**changes):
    return RunConfig(**(MINIMAL | changes))


def test_json_round_trip_is_exact():
    config = build_config(
        strategy="ps",
        num_workers=2,
        num_ps=1,
        optimizer="adam",
        learning_rate=0.1 + 0.2,
        weight_decay=1e-300,
        warmup_steps=7,
        schedule="cosine",
        overrides=("filters=64", 'name="é b"'),
        verbose=2,
        resume=True,
    )
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()


def test_json_spells_every_field_out():
    assert set(json.loads(build_config().to_json())) == {f.name for f in dataclasses.fields(RunConfig)}


def test_json_with_fields_left_out_takes_the_defaults():
    assert RunConfig.from_json(json.dumps(MINIMAL)) == build_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(MINIMAL | {"num_worker": 2}), "did you mean 'num_workers'"),
        (json.dumps(MINIMAL | {"zzz": 2}), "the settings are recipe, global_batch_size"),
        (json.dumps({"recipe": "digits_cnn", "epochs": 1}), "lacks global_batch_size, run_dir"),
        ("[1, 2]", "a JSON list"),
        ("{'a': 1}", "not JSON"),
        (json.dumps(MINIMAL | {"epochs": "5"}), "epochs='5': it must be a whole number"),
    ],
)
def test_json_that_is_no_config_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "mirored"}, "strategy='mirored': choose one of .* mean 'mirrored'"),
        ({"mode": "test"}, "choose one of train, eval, predict, export"),
        ({"mixed_precision": "float32"}, "choose one of bfloat16, float16"),
        ({"verbose": 3}, "verbose=3: choose one of 0, 1, 2, auto"),
        ({"verbose": True}, "verbose=True"),
        ({"epochs": 0}, "epochs=0: it must be 1 or more"),
        ({"epochs": True}, "epochs=True: it must be a whole number"),
        ({"epochs": 2.0}, "epochs=2.0: it must be a whole number"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: it must be more than 0"),
        ({"learning_rate": 0}, "more than 0"),
        ({"weight_decay": float("nan"), "optimizer": "sgd"}, "weight_decay=nan: it must be 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"seed": -1}, "seeds from 0"),
        ({"strategy": "ps"}, "give num_ps=1 or more"),
        ({"num_ps": 1}, "only 'ps' has them"),
        ({"max_staleness": 2}, "max_staleness=2 with strategy='one_device': only 'ps' has it"),
        ({"ps_mode": "sync"}, "ps_mode='sync' with strategy='one_device': only 'ps' has it"),
        ({"num_backup_workers": 1}, "num_backup_workers=1 with ps_mode='async'"),
        ({"strategy": "ps", "num_ps": 1, "deterministic": True}, "deterministic with strategy='ps'"),
        ({"strategy": "ps", "num_ps": 1, "jit_compile": "on"}, "jit_compile='on' with strategy='ps'"),
        ({"gpu_memory_gb": 0.0}, "gpu_memory_gb=0.0: it must be more than 0"),
        ({"num_backup_workers": -1}, "num_backup_workers=-1: it must be 0 or more"),
        (
            {"strategy": "ps", "num_ps": 1, "ps_mode": "sync", "num_backup_workers": 1},
            "num_backup_workers=1 with num_workers=1: somebody's part must count",
        ),
        ({"ps_mode": "both"}, "choose one of async, sync"),
        ({"steps_per_loop": 0}, "steps_per_loop=0: it must be 1 or more"),
        ({"num_workers": 2}, "that is one process"),
        ({"num_replicas": 2}, "choose 'mirrored'"),
        ({"strategy": "mirrored", "num_replicas": 65}, "global_batch_size=64 for 65 replicas"),
        ({"strategy": "multiworker", "num_workers": 9, "num_replicas": 8}, "for 72 replicas"),
        ({"data_service": "here"}, "data_service='here': write 'local', or .*host:port; .* has no port"),
        ({"data_service": "grpc://a:1"}, "without a scheme"),
        ({"run_dir": " "}, "run_dir=' ': it must not be empty"),
        ({"overrides": ("filters",)}, "write it as name=value"),
        ({"overrides": ["filters=3"]}, "a tuple of texts"),
        ({"schedule": "cosine"}, "without an optimizer"),
        ({"lr_scaling": "linear", "base_batch_size": 8}, "lr_scaling='linear' without an optimizer"),
        (
            {"lr_scaling": "linear", "optimizer": "sgd"},
            "base_batch_size=None with lr_scaling='linear': .* both",
        ),
        ({"base_batch_size": 8}, "base_batch_size=8 with lr_scaling=None: .* leave both out"),
        ({"base_batch_size": 0}, "base_batch_size=0: it must be 1 or more"),
    ],
)
def test_a_broken_rule_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_config(**changes)


def test_a_ps_worker_takes_the_whole_global_batch():
    assert build_config(strategy="ps", num_workers=8, num_ps=1, global_batch_size=1)


@pytest.mark.parametrize("strategy", ["one_device", "mirrored", "multiworker", "ps"])
def test_default_num_tasks_fits_its_strategy(strategy):
    num_workers, num_ps = default_num_tasks(strategy)
    assert build_config(strategy=strategy, num_workers=num_workers, num_ps=num_ps)


@pytest.mark.parametrize(
    ("recipe", "short"),
    [
        ("digits_cnn", "digits_cnn"),
        ("my.pkg.lm", "lm"),
        ("./my recipe.py", "my_recipe"),
        ("a/b.v2.py", "b_v2"),
    ],
)
def test_default_run_dir_is_short_and_dated(recipe, short):
    assert default_run_dir(recipe, "ps", datetime(2026, 1, 31, 12)) == f"runs/{short}-ps-20260131-120000"
