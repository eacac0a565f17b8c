"""Every command that the README and the docs give works as it stands there, and so does the program."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import programs
import pytest
from tiers import rarely

import tfdist.launch
import tfdist.plan
import tfdist.train
from tfdist.commands.flags import build_config, parse_flags, resolve_run

pytestmark = pytest.mark.cluster
REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
GUARANTEES = (REPOSITORY / "docs/guarantees.md").read_text()
RECIPES = (REPOSITORY / "docs/recipes.md").read_text()
CONFIG_FILES = (REPOSITORY / "docs/config_files.md").read_text()
# Not those that are made by commands that they name, or show networks that are not here.
DOCS = (
    "index.md",
    "porting.md",
    "recipes.md",
    "config_files.md",
    "report.md",
    "sweep.md",
    "plan.md",
    "privacy.md",
    "evaluator.md",
    "strategies.md",
    "guarantees.md",
    "pipeline.md",
    "divide.md",
    "tables.md",
    "gpus.md",
    "troubleshooting.md",
    "architecture.md",
)
PAGES = [README, *((REPOSITORY / "docs" / name).read_text() for name in DOCS)]

SHORT = ["--epochs=1", "--steps_per_epoch=2"]
# Each training command, and what it must say it trains.
TRAINS = {
    "python -m tfdist.train --strategy=ps": "training digits_cnn under ps",
    "python -m tfdist.train --recipe=wide_deep --strategy=multiworker --num_workers=2": (
        "training wide_deep under multiworker"
    ),
    "python -m tfdist.train --strategy=multiworker --evaluator --keep_best=val_accuracy": (
        "evaluator: epoch 1: val_loss"
    ),
    "python -m tfdist.train --recipe=text_lm --strategy=pipeline --num_stages=2 --num_micro_batches=8": (
        "training text_lm under pipeline"
    ),
    "python -m tfdist.train --recipe=text_lm --strategy=pipeline --tensor_parallel=2": (
        "2 blocks: 4 kernels by columns, 4 by rows, 4 attentions by heads, 1 tables by their rows"
    ),
    "python -m tfdist.train --recipe=private_tabular --dp_target_epsilon=3": (
        "training private_tabular under one_device"
    ),
    "python -m tfdist.train --recipe=private_tabular --strategy=multiworker --num_workers=2 --dp_target_epsilon=1": (
        "training private_tabular under multiworker"
    ),
}
# Each command that answers at once, and a word of its answer.
ANSWERS = {
    "python -m tfdist.train --list_recipes": "wide_deep",
    "python -m tfdist.train --help": "--strategy",
    "python -m tfdist.doctor --strategy=ps --num_workers=2": "no errors",
    "python -m tfdist.train --recipe=deep_lm --strategy=pipeline --num_stages=2 --tensor_parallel=2 --dry_run": (
        "2 blocks: 8 kernels by columns"
    ),
}
# Of a file that stands on the same page.
OWN_RECIPE = {
    "python -m tfdist.train --recipe=./my_recipe.py --strategy=multiworker --num_workers=2": (
        "my_recipe.py under multiworker: 2000 examples"
    ),
    "python -m tfdist.train --recipe=./my_recipe.py --set width=32 --set num_examples=500 --epochs=1": (
        "500 examples"
    ),
}
SURVIVES = (
    "python -m tfdist.train --strategy=multiworker --checkpoint_every_steps=10 --chaos=kill:worker:1@step=60"
)
EVALUATES = "python -m tfdist.train --mode=eval --run_dir=runs/my_run"
LAUNCHES = "python -m tfdist.launch --num_workers=2 --num_ps=1 --strategy=ps my_script.py --its --flags"
# Of a file that stands on the same page, or was written: each with what it would start.
FROM_FILE = {
    "python -m tfdist.train --config=run.yaml": "--epochs=3",
    "python -m tfdist.train --config=run.yaml --epochs=1 --strategy=multiworker": "# worker:1",
    "python -m tfdist.train --config=runs/my_run/config.json": "--set=dropout=0.1",
    "python -m tfdist.train --config=run.yaml --hosts=h1,h2": "# by ssh",
    "python -m tfdist.launch --config=run.yaml --slurm --nodes=2 --ntasks_per_node=2": "--recipe=wide_deep",
    "python -m tfdist.launch --config=run.yaml --kubernetes --image=registry.example.com/train:1": "--set=dropout=0.1",
}
SWEEPS = (
    "python -m tfdist.sweep --recipe=digits_cnn --space=space.yaml --trials=20 --parallel=2 --metric=val_accuracy "
    "--epochs=5"
)
# Each plan, and what it says at its end. The hosts of one are not here.
PLANS = {
    "python -m tfdist.plan --recipe=digits_cnn": "fastest with one device's answer",
    "python -m tfdist.plan --recipe=digits_cnn --link=1gbit,1ms --workers=2,4,8 --simulate=1000": "in plan.svg",
}
PLANNED = (
    "python -m tfdist.train --recipe=digits_cnn --strategy=multiworker --num_workers=2 --global_batch_size=64"
)
PLANS_ELSEWHERE = "python -m tfdist.plan --recipe=digits_cnn --hosts=a,b,c"
REPORTS = {
    "python -m tfdist.report runs/my_run": "runs/my_run/report.html",
    "python -m tfdist.report runs/a runs/b --output=both.html": "both.html",
}
WRITES_FILE = "python -m tfdist.train --recipe=wide_deep --strategy=ps --epochs=3 --write_config=run.yaml"
# On two machines, the second of which waits for the first.
TRAINS_FOLLOWED = (
    "python -m tfdist.train --strategy=multiworker --run_dir=runs/my_run --evaluator=elsewhere",
    "python -m tfdist.train --mode=follow --run_dir=runs/my_run",
)
READS_LOGS = "python -m tfdist.doctor logs runs/my_run"
INSTALLS = "pip install ."
TESTS = "python -m pytest -n 2 --dist loadfile"
CI_RUNS = ["pip install '.[test]'", TESTS]

# What the README's program leaves to its reader.
BEFORE_PROGRAM = """
import sys
import keras
import numpy as np

def build_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.2), loss="mse")
    return model

rng = np.random.default_rng(0)
x, x_test = rng.normal(size=(600, 3)).astype("float32"), rng.normal(size=(100, 3)).astype("float32")
y, y_test = x.sum(axis=1, keepdims=True), x_test.sum(axis=1, keepdims=True)
"""
AFTER_PROGRAM = """
print("flags", *sys.argv[1:])
print("error", abs(outputs - y_test).max())
"""


def find_commands(text):
    """Each command on a line that begins with python or pip, without the remark behind it."""
    commands = []
    for line in re.findall(r"^[ \t$]*((?:python|pip)[\d.]* .*)$", text, re.MULTILINE):
        commands += [part.strip() for part in re.split(r"\s#\s", line)[0].split("&&")]
    return commands


def run(command, cwd, *flags):
    """Runs a command of the README, with more flags, by the Python that runs the tests."""
    program, *words = shlex.split(command)
    assert program == "python"
    words = [*words[:2], *(["--preload"] if words[1] == "tfdist.launch" else []), *words[2:]]
    return programs.run([*words, *flags], cwd=cwd)


def explain(done):
    return done.stdout[-3000:] + done.stderr[-3000:]


def test_commands_are_all_known():
    """A new command in the README or the docs needs a test here; one that has gone needs none."""
    found = {command for page in PAGES for command in find_commands(page)}
    one_by_one = [
        *TRAINS_FOLLOWED,
        SURVIVES,
        SWEEPS,
        PLANS_ELSEWHERE,
        PLANNED,
        EVALUATES,
        LAUNCHES,
        READS_LOGS,
        WRITES_FILE,
        INSTALLS,
        *CI_RUNS,
    ]
    assert found == {*TRAINS, *ANSWERS, *OWN_RECIPE, *FROM_FILE, *REPORTS, *PLANS, *one_by_one}


@pytest.mark.parametrize(
    "command", rarely(TRAINS, ci=["python -m tfdist.train --recipe=text_lm --strategy=pipeline"])
)
def test_training_command_runs(tmp_path, command):
    done = run(command, tmp_path, *SHORT)
    assert done.returncode == 0, explain(done)
    assert TRAINS[command] in done.stdout
    (run_dir,) = re.findall(r"the run is in (.+)", done.stdout)
    assert (tmp_path / run_dir / "model.keras").exists()


@pytest.mark.parametrize("command", ANSWERS)
def test_command_answers(tmp_path, command):
    done = run(command, tmp_path)
    assert done.returncode == 0, explain(done)
    assert ANSWERS[command] in done.stdout


@pytest.mark.parametrize(
    "command", rarely(OWN_RECIPE, "python -m tfdist.train --recipe=./my_recipe.py --set")
)
def test_own_recipe_trains(tmp_path, command):
    (program,) = re.findall(r'^```python title="my_recipe.py"\n(.*?)^```', RECIPES, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_recipe.py").write_text(program)
    done = run(command, tmp_path, "--steps_per_epoch=2")
    assert done.returncode == 0, explain(done)
    assert OWN_RECIPE[command] in done.stdout


def test_settings_in_a_file_start_the_same_run(tmp_path, monkeypatch, capsys):
    """As the commands would, in this process: they start nothing."""
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r'^```yaml title="run.yaml"\n(.*?)^```', CONFIG_FILES, re.MULTILINE | re.DOTALL)
    (tmp_path / "run.yaml").write_text(text)
    config = build_config(resolve_run(parse_flags(["--config=run.yaml"]), None, {}), None)
    (tmp_path / "runs/my_run").mkdir(parents=True)
    (tmp_path / "runs/my_run/config.json").write_text(config.to_json())
    for command, said in FROM_FILE.items():
        _, _, module, *words = shlex.split(command)
        main = {"tfdist.train": tfdist.train.main, "tfdist.launch": tfdist.launch.main}[module]
        assert main([*words, "--dry_run"]) == 0
        assert said in capsys.readouterr().out
    (tmp_path / "run.yaml").unlink()
    assert tfdist.train.main(shlex.split(WRITES_FILE)[3:]) == 0
    assert "epochs: 3" in (tmp_path / "run.yaml").read_text()


@pytest.mark.ci
def test_sweep_finds_the_best(tmp_path):
    page = (REPOSITORY / "docs/sweep.md").read_text()
    (text,) = re.findall(r'^```yaml title="space.yaml"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    (tmp_path / "space.yaml").write_text(text)
    done = run(SWEEPS, tmp_path, "--trials=2", "--sweep_dir=here", *SHORT)
    assert done.returncode == 0, explain(done)
    assert "best: trial" in done.stdout and (tmp_path / "here/report.html").exists()


@pytest.mark.parametrize(
    "command", rarely(PLANS, ci=[command for command in PLANS if "--simulate" in command])
)
def test_plan_says_what_is_best(tmp_path, command):
    # The shortest that shows what the page says: all ways are tried in test_plan.py.
    done = run(command, tmp_path, "--ways=every_step" if "--simulate" in command else "--ways=one_device")
    assert done.returncode == 0, explain(done)
    assert PLANS[command] in done.stdout
    # What it says is best can be trained in.
    (best,) = re.findall(r"one device's answer.*\n +(python .*)", done.stdout)
    resolved = resolve_run(parse_flags(shlex.split(best)[3:]), None, {})
    assert resolved["recipe"] == "digits_cnn"
    assert (tmp_path / "plan.svg").exists() == ("--simulate" in command)


def test_hosts_of_a_plan_are_read():
    """They are not here: `benchmarks/plan.py` plans for hosts that are. What it says of them is a command."""
    assert resolve_run(parse_flags(shlex.split(PLANNED)[3:]), None, {})["num_workers"] == 2
    assert tfdist.plan.main([*shlex.split(PLANS_ELSEWHERE)[3:], "--workers=4"]) == 2


@pytest.mark.ci
def test_followed_run_is_evaluated_elsewhere(tmp_path):
    done = run(TRAINS_FOLLOWED[0], tmp_path, *SHORT)
    assert done.returncode == 0, explain(done)
    assert not (tmp_path / "runs/my_run/eval.jsonl").exists()
    done = run(TRAINS_FOLLOWED[1], tmp_path)
    assert done.returncode == 0, explain(done)
    assert "evaluator: epoch 1: val_loss" in done.stdout


@pytest.mark.ci
def test_run_survives_its_failure(tmp_path):
    done = run(SURVIVES, tmp_path)
    assert done.returncode == 0, explain(done)
    assert "worker:1 was killed by SIGKILL" in done.stderr and "resumed after epoch" in done.stdout
    assert re.search(r"training goes on \d+\.\d s after the failure", done.stderr)


def test_finished_run_is_evaluated(tmp_path):
    trained = run("python -m tfdist.train --run_dir=runs/my_run", tmp_path, *SHORT)
    assert trained.returncode == 0, explain(trained)
    evaluated = run(EVALUATES, tmp_path)
    assert evaluated.returncode == 0, explain(evaluated)
    (test_line,) = re.findall(r"test .+", trained.stdout)
    assert test_line in evaluated.stdout
    for name in ("a", "b"):
        shutil.copytree(tmp_path / "runs/my_run", tmp_path / "runs" / name)
    for command, written in REPORTS.items():
        done = run(command, tmp_path)
        assert done.returncode == 0, explain(done)
        assert "<svg" in (tmp_path / written).read_text()


@pytest.mark.parametrize(
    ("sign", "command"),
    [
        ("-", "python my_script.py --its --flags"),
        ("+", "python my_script.py --its --flags"),
        ("+", LAUNCHES),
    ],
)
def test_own_program_runs(tmp_path, sign, command):
    """Before the change, and after it alone and as a cluster."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    program = "\n".join(line[1:] for line in diff.splitlines() if line[0] in (" ", sign))
    (tmp_path / "my_script.py").write_text(BEFORE_PROGRAM + program + AFTER_PROGRAM)
    done = run(command, tmp_path)
    assert done.returncode == 0, explain(done)
    # Once: the workers and the ps serve inside `initialize`, and go no further.
    assert len(re.findall(r"flags --its --flags$", done.stdout, re.MULTILINE)) == 1, explain(done)
    (error,) = re.findall(r"error (\S+)", done.stdout)
    assert float(error) < 0.5  # of sums that reach 5
    assert (tmp_path / "model.keras").exists()


def test_ci_installs_and_tests_as_the_readme_does():
    ci = (REPOSITORY / ".ci/run").read_text()
    assert re.search(r"pip install (--quiet )?'\.\[test\]'$", ci, re.MULTILINE)
    assert re.search(rf"^{TESTS} --ci( |$)", ci, re.MULTILINE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `pip install .` would install, built beside the repository, which stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tfdist"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("tfdist", "recipes", "tests"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    # With the setuptools that TensorFlow has brought along: needs no network.
    run_pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(copy))
    (built,) = folder.glob("*.whl")
    return built


def run_pip(*words):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words, "--no-index"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, explain(done)


def run_installed(site, cwd, *words):
    env = {**os.environ, "PYTHONPATH": str(site), "TFDIST_REPORT": "on"}
    words = [sys.executable, *words]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    """Modules, the texts beside them, the digits; no tests."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = wheel.parent / "tfdist"
    files = [path for package in ("tfdist", "recipes") for path in (source / package).rglob("*")]
    assert packed == {str(path.relative_to(source)) for path in files if path.is_file()}
    assert "tfdist/data/sources/digits.py" in packed


@pytest.mark.ci
def test_installed_wheel_runs_the_main_job(wheel, tmp_path):
    """From a folder that knows nothing of the repository, on digits prepared anew, into a path with a space."""
    site, cwd = tmp_path / "site", tmp_path / "elsewhere"
    cwd.mkdir()
    run_pip("install", "--no-deps", f"--target={site}", str(wheel))
    where = "import importlib.util as u; print(u.find_spec('tfdist').origin)"
    found = run_installed(site, cwd, "-c", where)
    assert found.stdout.strip() == str(site / "tfdist/__init__.py"), explain(found)

    flags = ["--epochs=2", "--run_dir=my runs/first run", f"--data_dir={tmp_path / 'data'}"]
    done = run_installed(site, cwd, "-m", "tfdist.train", "--strategy=ps", *flags)
    assert done.returncode == 0, explain(done)
    (accuracy,) = re.findall(r"test .*accuracy (\d\.\d+)", done.stdout)
    assert float(accuracy) > 0.8
    assert re.search(r"the run is in my runs/first run$", done.stdout, re.MULTILINE)
    (promised,) = re.findall(r"^## A run leaves\n\n +(.+)", GUARANTEES, re.MULTILINE)
    assert not [name for name in promised.split() if not (cwd / "my runs/first run" / name).exists()]


# The commands of docs/machines.md, some from the repository's own folder of scripts.
MACHINES = (REPOSITORY / "docs/machines.md").read_text()
LAUNCH_COMMANDS = {
    "launch/local.sh --recipe=digits_cnn": SHORT,
    "STRATEGY=multiworker NUM_WORKERS=3 launch/local.sh": SHORT,
    "python -m tfdist.launch --num_workers=2 --num_ps=1 my_script.py": [],
    "python -m tfdist.launch --num_workers=2 --dry_run my_script.py": [],
    "python -m tfdist.doctor --num_workers=2 --run_dir=runs/my_run": [],
    READS_LOGS: [],
}


def test_launch_commands_are_all_known():
    # Schedulers have their own screens, which tests/hosts reads.
    (block,) = re.findall(r"```sh\n(.*?)```", MACHINES.partition("\n## ")[0], re.DOTALL)
    assert [re.split(r"\s+#\s", line)[0] for line in block.splitlines()] == list(LAUNCH_COMMANDS)


@pytest.mark.parametrize("command", rarely(LAUNCH_COMMANDS, "STRATEGY=multiworker"))
def test_launch_command_runs(tmp_path, command):
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    (tmp_path / "my_script.py").write_text("import os; print(os.environ['TF_CONFIG'])")
    (tmp_path / "runs/my_run/logs").mkdir(parents=True)
    (tmp_path / "runs/my_run/logs/worker-0.log").write_text("trained in 1.0 s\n")
    line = re.sub(
        r"^python", shlex.quote(sys.executable), f"{command} {shlex.join(LAUNCH_COMMANDS[command])}"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable}
    done = subprocess.run(
        line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, explain(done)
