"""What the environment adds to the training command's flags."""

import pytest

from tfdist.cluster.spec import Cluster, Task
from tfdist.commands.flags import build_config, parse_flags, resolve_run
from tfdist.config.run_dir import RunDir

WORKERS = Cluster(addresses={"worker": ("h:1", "h:2")}, task=Task("worker", 0))
CHIEF = Cluster(addresses={"chief": ("h:1",)}, task=Task("chief", 0))


def resolve(*flags, cluster=WORKERS, **environ):
    return resolve_run(parse_flags(flags), cluster, environ)


@pytest.mark.parametrize(
    ("flags", "environ", "num_ps"),
    [
        (["--strategy=ps"], {}, 1),
        (["--strategy=ps"], {"TFDIST_NUM_PS": "2"}, 2),
        (["--strategy=ps", "--num_ps=3"], {"TFDIST_NUM_PS": "2"}, 3),
        ([], {"TFDIST_NUM_PS": "2", "TFDIST_STRATEGY": "ps"}, 2),
        (["--strategy=multiworker"], {"TFDIST_NUM_PS": "2"}, 0),
    ],
)
def test_num_ps_is_the_flags_or_the_environments(flags, environ, num_ps):
    assert resolve(*flags, **environ)["num_ps"] == num_ps


@pytest.mark.parametrize(("cluster", "strategy"), [(WORKERS, "multiworker"), (CHIEF, "one_device")])
def test_strategy_fits_the_cluster(cluster, strategy):
    assert resolve(cluster=cluster)["strategy"] == strategy


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TFDIST_RESTART"])
def test_job_that_comes_back_goes_on_if_it_had_begun(tmp_path, name):
    flag = f"--run_dir={tmp_path}"
    assert not resolve(flag, **{name: "1"})["resume"]
    run_dir = RunDir(tmp_path)
    run_dir.config_file.write_text(
        '{"recipe": "digits_cnn", "global_batch_size": 64, "epochs": 3, "run_dir": "x"}'
    )
    assert resolve(flag, **{name: "1"})["resume"]
    assert not resolve(flag, **{name: "0"})["resume"]
    assert not resolve(flag)["resume"]


def test_resume_auto_goes_on_where_there_is_something(tmp_path):
    flags = ("--resume=auto", f"--run_dir={tmp_path}", "--recipe=digits_cnn")
    assert not resolve(*flags)["resume"]
    config = '{"recipe": "digits_cnn", "global_batch_size": 64, "epochs": 3, "seed": 7, "run_dir": "x"}'
    RunDir(tmp_path).config_file.write_text(config)
    resumed = resolve(*flags)
    assert resumed["resume"] and resumed["seed"] == 7


@pytest.mark.parametrize("name", ["preemption_grace_secs", "preemption-grace-secs", "grace_secs"])
def test_preemption_grace_is_the_launchers(name):
    assert parse_flags([f"--{name}=90"]).grace_secs == 90


@pytest.mark.parametrize(
    ("flags", "evaluator"),
    [
        ([], "off"),
        (["--evaluator"], "on"),
        (["--noevaluator"], "off"),
        (["--evaluator=elsewhere"], "elsewhere"),
        (["--evaluator=on"], "on"),
        (["--evaluator=false"], "off"),
    ],
)
def test_evaluator_is_a_switch_with_a_third_place(flags, evaluator):
    fields = resolve(*flags)
    assert build_config(fields, None).evaluator == evaluator


def test_follower_is_alone_with_the_runs_settings(tmp_path):
    fields = resolve(
        f"--run_dir={tmp_path}", "--strategy=ps", "--num_workers=3", "--set=dropout=0.1", "--epochs=2"
    )
    RunDir(tmp_path).write_config(build_config(fields, None))
    follows = [
        "--mode=follow",
        f"--run_dir={tmp_path}",
        "--strategy=ps",
        "--keep_best=val_loss",
        "--epochs=9",
    ]
    config = build_config(resolve(*follows, cluster=None), None)
    assert (config.strategy, config.num_workers, config.mode) == ("one_device", 1, "follow")
    assert (config.overrides, config.epochs, config.keep_best) == (("dropout=0.1",), 2, "val_loss")
