import re
import subprocess

import pytest

from tfdist.errors import ConfigError
from tfdist.launcher.job import Job
from tfdist.launcher.slurm.script import Allocation, render_sbatch


def render(allocation=None, **changes):
    job = Job(**{"command": ["python3", "train.py", "--name=a b"], "env": {}, **changes})
    return render_sbatch(job, Allocation(**(allocation or {})))


def options(text):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))


def exports(text):
    return dict(re.findall(r"^export (\w+)=(.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_script_is_bash(max_restarts):
    text = render(max_restarts=max_restarts)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=30)
    assert text.startswith("#!/bin/bash\n") and text.endswith("exit $code\n")
    assert ("scontrol requeue" in text) == bool(max_restarts)
    assert "python3 train.py '--name=a b' \"$@\"\n" in text
    assert ("#SBATCH --requeue\n" in text) == bool(max_restarts)


def test_tasks_of_all_roles_are_asked_for():
    text = render({"nodes": 2, "ntasks_per_node": 3}, strategy="ps", num_workers=3, num_ps=2)
    asked = options(text)
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("2", "3") and "ntasks" not in asked
    told = exports(text)
    assert (told["TFDIST_STRATEGY"], told["TFDIST_NUM_PS"]) == ("ps", "2")


def test_slurm_chooses_the_nodes_where_nobody_else_does():
    asked = options(render(num_workers=5))
    assert asked["ntasks"] == "5" and not {"nodes", "ntasks-per-node", "time"} & set(asked)


def test_flags_arrive():
    text = render(
        {"partition": "gpu", "account": "us", "time": "1-0", "gpus_per_task": 1, "cpus_per_task": 6, "job_name": "it",
         "sbatch_flags": "--mem=64G --qos=high"},
        run_dir="/shared/a run", grace_secs=90,
    )  # fmt: skip
    asked = options(text)
    assert (asked["partition"], asked["account"], asked["time"], asked["job-name"]) == (
        "gpu",
        "us",
        "1-0",
        "it",
    )
    assert (asked["gpus-per-task"], asked["cpus-per-task"], asked["signal"]) == ("1", "6", "TERM@90")
    assert asked["output"] == "'/shared/a run/slurm-%j.log'" and asked["mem"] == "64G --qos=high"
    assert "--label --cpus-per-task=6 bash" in text  # srun does not take it over
    assert exports(text)["OMP_NUM_THREADS"] == "6" and exports(text)["TFDIST_RUN_DIR"] == "'/shared/a run'"


def test_threads_are_left_to_the_nodes_where_nobody_counts_cores():
    assert not {name for name in exports(render()) if "THREADS" in name}


def test_ps_tasks_with_few_cores_have_threads_enough():
    told = exports(render({"cpus_per_task": 1}, strategy="ps"))
    assert (told["TF_NUM_INTRAOP_THREADS"], told["TF_NUM_INTEROP_THREADS"]) == ("1", "4")
    assert told["TF_GRPC_WORKER_CACHE_THREADS"] == "4"


@pytest.mark.parametrize(
    ("allocation", "changes", "said"),
    [
        ({"nodes": 0}, {}, "nodes=0"),
        ({"ntasks_per_node": 2}, {}, "--nodes beside it"),
        ({"nodes": 2}, {"num_workers": 3}, "leave one of them out"),
        ({"partition": "a b"}, {}, "'a b'"),
        ({"sbatch_flags": "--mem=1G\nrm -rf /"}, {}, "one word"),
        ({"job_name": "a\nb"}, {}, "one word"),
    ],
)
def test_impossible_allocation_is_refused(allocation, changes, said):
    with pytest.raises(ConfigError, match=said):
        render(allocation, **changes)
