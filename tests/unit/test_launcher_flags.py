import stat
import sys

import pytest

from tfdist import launch
from tfdist.errors import ConfigError
from tfdist.launcher.backends import BACKENDS
from tfdist.launcher.flags import parse_flags
from tfdist.launcher.kubernetes.pods import Pods
from tfdist.launcher.slurm.script import Allocation


@pytest.fixture(autouse=True)
def in_folder_with_script(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("")
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)


def parse(*args):
    return parse_flags(args, {})


def test_script_keeps_its_own_flags():
    job = parse("--num_workers=2", "train.py", "--num_workers=9", "--dry_run", "-m", "--", "x").job
    assert job.num_workers == 2
    assert job.command == (sys.executable, "train.py", "--num_workers=9", "--dry_run", "-m", "--", "x")


def test_module_and_program_are_run():
    assert parse("-m", "json.tool", "-m").job.command == (sys.executable, "-m", "json.tool", "-m")
    assert parse("--module=json.tool", "a").job.command == (sys.executable, "-m", "json.tool", "a")
    assert parse("--", "sh", "-c", "true").job.command == ("sh", "-c", "true")
    assert parse("./tool").job.command == ("./tool",)
    assert parse("-np", "2", "python3", "train.py").job.command == ("python3", "train.py")
    assert parse("--", "train.py").job.command == (sys.executable, "train.py")


@pytest.mark.parametrize(
    "args",
    [
        ["--num_workers=3"], ["--num-workers=3"], ["--num_workers", "3"], ["--nproc_per_node=3"],
        ["--nproc-per-node", "3"], ["-np", "3"], ["-n", "3"], ["--num-proc=3"],
    ],
)  # fmt: skip
def test_habits_of_other_launchers_are_understood(args):
    assert parse(*args, "train.py").job.num_workers == 3


def test_all_flags_arrive(tmp_path):
    flags = parse(
        "--num_ps=2", "--strategy=pss", "--run_dir=r", "--grace-secs=1.5", "--num_threads=3", "--dry-run", "train.py"
    )  # fmt: skip
    job = flags.job
    assert flags.dry_run and (job.num_ps, job.strategy, job.grace_secs) == (2, "ps", 1.5)
    assert (job.run_dir, job.threads_per_task) == (str(tmp_path / "r"), 3)


def test_slurm_flags_make_an_allocation():
    flags = parse(
        "--slurm", "--nodes=2", "--ntasks-per-node", "4", "--strategy=pss", "--time=1:00", "train.py"
    )
    assert flags.backend is BACKENDS["slurm"] and flags.place == Allocation(
        nodes=2, ntasks_per_node=4, time="1:00"
    )
    # What fills the machines beside the chief and one ps.
    assert (flags.job.num_workers, flags.job.num_ps) == (6, 1)
    assert parse("--slurm", "--nodes=3", "train.py").job.num_workers == 3
    assert parse("--slurm", "--num_workers=5", "train.py").job.num_workers == 5


def test_kubernetes_flags_make_pods_whose_program_need_not_lie_here():
    flags = parse("--kubernetes", "--image=a/b:1", "--gpus=2", "--num_workers=4", "other/place.py", "--x")
    assert flags.backend is BACKENDS["kubernetes"] and flags.place == Pods(image="a/b:1", gpus=2)
    assert flags.job.command == ("python", "other/place.py", "--x") and flags.job.num_workers == 4
    assert parse("--kubernetes", "--image=i", "-m", "no.where", "y").job.command == (
        "python",
        "-m",
        "no.where",
        "y",
    )
    assert parse("--kubernetes", "--image=i", "--", "no-such-program").job.command == ("no-such-program",)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--image=i", "train.py"], "--image is a flag of --kubernetes: add --kubernetes"),
        (["--slurm", "--image=i", "train.py"], "--image is a flag of --kubernetes"),
        (["--nodes=2", "train.py"], "--nodes is a flag of --slurm: add --slurm"),
        (["--slurm", "--kubernetes", "train.py"], "choose one"),
        (["--kubernetes", "train.py"], "--image"),
        (["--kubernetes", "--image=i"], "nothing to run"),
        (["--slurm", "--chaos=kill:worker:0@start", "train.py"], "--chaos is for processes on this machine"),
        (["--slurm", "--num_workers=2:4", "train.py"], "write one number"),
        (["--slurm", "--nodes=2", "--num_workers=4", "--dry_run", "train.py"], "leave one of them out"),
        (["--kubernetes", "--image=i", "--run_dir=/a/b", "--dry_run", "train.py"], "--volume_claim"),
        (["--slurm", "--partion=x", "train.py"], "did you mean --partition?"),
        (["--num_worker=2", "train.py"], "unknown flag --num_worker; did you mean --num_workers?"),
        (["--stratgy", "ps", "train.py"], "did you mean --strategy?"),
        (["-q", "train.py"], "unknown flag -q"),
        (["trian.py"], "'trian.py' does not exist: did you mean 'train.py'?"),
        (["no/where.py"], "does not exist"),
        (["-m", "no_such_module.at_all"], "'no_such_module'"),
        (["--", "no-such-program"], "'no-such-program'"),
        (["--num_workers=2"], "nothing to run"),
        (["-m"], "nothing to run"),
        (["--"], "nothing to run"),
        (["--num_workers=two", "train.py"], "'two'"),
        (["--num_workers", "--num_ps=1", "train.py"], "--num_workers needs a value"),
        (["-np"], "-np needs a value"),
        (["--dry_run=yes", "train.py"], "dry_run"),
        (["--num_workers=0", "train.py"], "num_workers=0"),
        (["--strategy=mirrored", "--num_workers=2", "train.py"], "one process"),
    ],
)
def test_mistake_gets_one_line_and_exit_code_2(args, said, capsys):
    if "--dry_run" not in args:
        with pytest.raises(ConfigError):
            parse(*args)
    assert launch.main(args) == 2
    message = capsys.readouterr().err
    assert message.startswith("tfdist.launch: ") and message.count("\n") == 1 and said in message


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        launch.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--strategy=ps -m tfdist.train" in text and "--num_ps" in text


def test_dry_run_starts_nothing(capsys, tmp_path):
    assert launch.main(["--num_workers=2", "--dry_run", "--run_dir=new", "--", "touch", "started"]) == 0
    text = capsys.readouterr().out
    assert text.count("TF_CONFIG=") == 2 and text.count("touch started") == 2
    assert not (tmp_path / "started").exists() and not (tmp_path / "new").exists()
