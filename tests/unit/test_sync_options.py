"""What workers exchange: each setting's rule, and that it reaches the run from the command line."""

import dataclasses

import pytest

from tfdist.commands.flags import build_config, parse_flags, resolve_run
from tfdist.config.run_config import RunConfig, parse_profile
from tfdist.config.sync_options import DEFAULT_PERIODS, SyncOptions
from tfdist.errors import ConfigError

RUN = {"recipe": "r", "global_batch_size": 8, "epochs": 1, "run_dir": "x"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sync": "sometimes"}, "choose one of every_step, local_sgd, diloco, gossip, delayed"),
        ({"exchange": "pigeon"}, "choose one of auto, collective, mpi"),
        ({"exchange_dtype": "int8"}, "choose one of float32, bfloat16, float16"),
        ({"sync_graph": "star", "sync": "gossip"}, "choose one of ring, exponential, complete"),
        ({"compression": "zip"}, "choose one of powersgd"),
        ({"sync": "local_sgd", "sync_period": 0}, "must be 1 or more"),
        ({"bucket_mb": 0.0}, "must be more than 0"),
        ({"bucket_mb": float("nan")}, "must be more than 0"),
        ({"outer_momentum": 1.0}, "less than 1"),
        ({"sync_period": 4}, "it exchanges at every step"),
        ({"sync": "delayed", "sync_period": 4}, "it exchanges at every step"),
        ({"sync_warmup_steps": 4}, "it is for local_sgd, diloco, gossip"),
        ({"sync": "diloco", "compression": "powersgd"}, "only 'every_step' has it"),
        ({"compression": "powersgd", "exchange_dtype": "bfloat16"}, "choose one of the two"),
        ({"error_feedback": True}, "narrower type at every step"),
        ({"error_feedback": True, "exchange_dtype": "bfloat16", "sync": "diloco"}, "narrower type"),
    ],
)
def test_setting_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SyncOptions(**settings)


def test_period_is_the_ways_own_unless_said():
    assert SyncOptions().num_period_steps == 1
    for sync, period in DEFAULT_PERIODS.items():
        assert SyncOptions(sync=sync).num_period_steps == period
        assert SyncOptions(sync=sync, sync_period=7).num_period_steps == 7


def test_flags_reach_the_options():
    words = (
        "--strategy=multiworker --num-workers=2 --sync=diloco --sync_period=50 --outer_learning_rate=0.5 "
        "--exchange=collective --exchange-dtype=bfloat16 --sync_warmup_steps=3 --outer_momentum=0.8 --bucket_mb=4"
    )
    fields = resolve_run(parse_flags(words.split()), None, {})
    config = build_config(fields | {"recipe": "r"}, None)
    assert config.sync_options == SyncOptions(
        sync="diloco",
        sync_period=50,
        outer_learning_rate=0.5,
        outer_momentum=0.8,
        exchange="collective",
        exchange_dtype="bfloat16",
        sync_warmup_steps=3,
        bucket_mb=4.0,
    )


def test_config_has_every_option_with_the_same_default():
    config = RunConfig(**RUN)
    assert config.sync_options == SyncOptions()
    assert {f.name for f in dataclasses.fields(SyncOptions)} <= set(RunConfig.field_names())


@pytest.mark.parametrize("settings", [{"sync": "gossip"}, {"exchange": "mpi"}, {"exchange_dtype": "float16"}])
def test_other_strategies_have_none(settings):
    with pytest.raises(ConfigError, match="only 'multiworker' has it"):
        RunConfig(**RUN, **settings)


@pytest.mark.parametrize(("text", "steps"), [("20:30", (20, 30)), ("7", (7, 7)), ("1:1", (1, 1))])
def test_profile_names_steps(text, steps):
    assert parse_profile(text) == steps


@pytest.mark.parametrize("text", ["", "0:3", "5:4", "a:b", "1:2:3", "-1:3", "1:"])
def test_profile_that_names_none_is_refused(text):
    with pytest.raises(ConfigError, match="write START:STOP"):
        parse_profile(text)
