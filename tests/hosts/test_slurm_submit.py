"""`python -m tfdist.launch --slurm` on a real Slurm; most tasks are plain programs, so they start fast."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import slurm_cluster
from tiers import rarely

pytestmark = [pytest.mark.cluster, pytest.mark.ci]

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "machines.md").read_text()
# Each of the page's commands, without what it says of itself.
COMMANDS = re.findall(r"^python -m tfdist\.launch --slurm (.*?) +#", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield {**os.environ, **env, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def submit(slurm, tmp_path):
    def submit(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "tfdist.launch", "--slurm", *words],
            cwd=tmp_path,
            env=slurm,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return submit


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def squeue(env):
    return subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True, timeout=30).stdout


def wait_until_empty(env):
    deadline = time.monotonic() + 30
    while squeue(env):
        assert time.monotonic() < deadline, squeue(env)
        time.sleep(0.2)


def test_tasks_of_all_nodes_are_followed_to_a_good_end(submit, tmp_path):
    shell = "echo $SLURM_PROCID on $SLURMD_NODENAME, $TFDIST_STRATEGY, $TFDIST_NUM_PS ps, $OMP_NUM_THREADS threads"
    flags = ["--nodes=2", "--ntasks_per_node=2", "--strategy=ps", "--cpus-per-task=2", "--time=1"]
    code, out, err = finish(submit(*flags, "--", "sh", "-c", shell))
    assert code == 0, err
    assert sorted(out.splitlines()) == [f"{i}: {i} on n{1 + i // 2}, ps, 1 ps, 2 threads" for i in range(4)]
    assert "is pending" in err or "is running" in err
    # The log stays; the note of the first failure does not.
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["tfdist"]


def test_first_failure_is_the_jobs(submit):
    # Task 2 fails; 0 and 1 are killed for it; 3 has lost it, and says so first.
    program = """\
case $SLURM_PROCID in
2) sleep 2; echo I am the cause; exit 3;;
3) sleep 1; exit 75;;
*) exec sleep 100;;
esac"""
    code, out, err = finish(
        submit("--nodes=2", "--ntasks_per_node=2", "--strategy=multiworker", "--", "sh", "-c", program)
    )
    assert code == 3, out + err
    assert "tfdist: task 2 on n2 was the first to fail, with exit code 3" in out
    last = err.splitlines()[-3:]
    assert last[0].endswith("the last lines of task 2, the first to fail:") and last[1] == "2: I am the cause"
    assert "exit code 3; whole output: " in last[2]


def test_task_that_was_killed_is_a_cause_too(submit, tmp_path):
    program = "if [ $SLURM_PROCID = 1 ]; then kill -9 $$; fi; exec sleep 100"
    code, out, err = finish(submit("--nodes=2", f"--run_dir={tmp_path}/run", "--", "sh", "-c", program))
    assert code == 137, out + err
    assert "task 1 on n2 was the first to fail, with exit code 137" in out
    assert len(list((tmp_path / "run").glob("slurm-*.log"))) == 1


def test_signal_to_the_launcher_cancels_the_job(submit, slurm):
    process = submit("--nodes=2", "--", "sh", "-c", "echo up; exec sleep 100")
    assert process.stdout.readline().endswith("up\n")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and "cancelling" in err
    wait_until_empty(slurm)


def test_job_whose_output_nobody_reads_is_cancelled(submit, slurm):
    process = submit("--num_workers=1", "--", "sh", "-c", "while echo more; do sleep 0.1; done")
    assert process.stdout.readline() == "0: more\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read().count("Error") == 0
    process.stderr.close()
    wait_until_empty(slurm)


def test_killed_job_is_requeued_and_its_program_may_save_before(submit, slurm, tmp_path):
    # The program is told, saves, and is there again: as at the end of the time limit. One task has nothing to save, and
    # leaves; Slurm must not kill the other for that, which it would do after 3 s. Slurm may tell the sleep first, or
    # miss one that has just been forked; it then waits for whoever still holds a task's output.
    program = """\
[ $SLURM_PROCID = 0 ] || trap 'exit 143' TERM
if [ $TFDIST_RESTART = 1 ]; then cat saved; exit; fi
[ $SLURM_PROCID = 1 ] || trap 'sleep 6; echo my work >saved; exit 143' TERM
echo first try; while :; do sleep 1 >/dev/null 2>&1 & wait; done"""
    process = submit("--num_workers=2", "--max_restarts=1", "--job_name=again", "--", "sh", "-c", program)
    assert {process.stdout.readline() for _ in range(2)} == {"0: first try\n", "1: first try\n"}
    job_id = squeue(slurm).split()[0]
    subprocess.run(["scancel", "--signal=TERM", job_id], env=slurm, check=True, timeout=30)
    deadline = time.monotonic() + 60
    while squeue(slurm).split()[4:5] != ["PD"]:
        assert time.monotonic() < deadline, squeue(slurm)
        time.sleep(0.2)
    # Slurm lets a requeued job wait for two minutes. In the second in which it was killed a node would refuse it.
    time.sleep(2)
    words = ["scontrol", "update", f"JobId={job_id}", "StartTime=now"]
    subprocess.run(words, env=slurm, check=True, timeout=30)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert "0: my work" in out.splitlines()
    # Slurm ended nothing before the program did: else nobody would have noted this.
    assert "was the first to fail, with exit code 143" in out


def test_refusal_of_slurm_is_one_line(submit):
    code, out, err = finish(submit("--nodes=1", "--partition=nowhere", "--", "true"))
    assert (code, out) == (2, "")
    assert err.startswith("tfdist.launch: sbatch failed: ") and err.count("\n") == 1 and "partition" in err


@pytest.mark.parametrize("command", rarely(COMMANDS, "--nodes=2 --time"))
def test_command_of_the_readme_trains(submit, tmp_path, command):
    code, out, err = finish(submit(*shlex.split(command), "--epochs=1", "--steps_per_epoch=2", "--verbose=2"))
    assert code == 0, out[-4000:] + err[-4000:]
    strategy = "ps" if "--strategy=ps" in command else "multiworker"
    assert f"training digits_cnn under {strategy}" in out and "the run is in runs/" in out
    assert len(list((tmp_path / "runs").iterdir())) == 1
