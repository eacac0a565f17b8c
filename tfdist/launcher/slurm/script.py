"""What a job looks like under Slurm: the script that sbatch takes."""

import dataclasses
import shlex

from tfdist.config.settings import check_settings, setting
from tfdist.errors import PEER_LOST_CODE, ConfigError
from tfdist.launcher.job import RESTART_VARIABLE, Job, render_shared_env

_TASK = f"""\
trap told=yes TERM
trap : INT
"$@"
code=$?
if [ $code -eq {PEER_LOST_CODE} ]; then sleep 5; fi
if [ $code -eq 143 ]; then sleep 1; fi
if [ $code -ne 0 ]; then
    (set -o noclobber; echo "$SLURM_PROCID $SLURMD_NODENAME $code" >"$TFDIST_FIRST_FAILURE") 2>/dev/null
fi
if [ $code -eq 143 ] && [ -n "$told" ]; then exit 0; fi
exit $code"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """What a job asks of Slurm: the launcher's flags with --slurm.

    Raises:
        ConfigError: If a value is out of range or would break the script.
    """

    nodes: int | None = setting(None, least=1, help="machines (default: as many as the tasks need)")
    ntasks_per_node: int | None = setting(
        None, least=1, help="tasks on each (default: 1 where --nodes is given)"
    )
    cpus_per_task: int | None = setting(None, least=1, help="cores of each task, all roles alike")
    gpus_per_task: int | None = setting(None, least=1, help="GPUs of each task, all roles alike")
    time: str | None = setting(
        None, help="how long the job may take, as in 2:00:00; it is told a minute before"
    )
    partition: str | None = setting(None, help="where to queue")
    account: str | None = setting(None, help="who pays")
    job_name: str = setting("tfdist", help="what squeue shows (default: tfdist)")
    sbatch_flags: str = setting("", help="more for sbatch, in one word: '--mem=64G --qos=high'")

    def __post_init__(self) -> None:
        check_settings(self)
        for name, value in vars(self).items():
            if isinstance(value, str) and ("\n" in value or name != "sbatch_flags" and " " in value):
                raise ConfigError(f"{name} is {value!r}: write one word")
        if self.nodes is None and self.ntasks_per_node is not None:
            raise ConfigError(f"ntasks_per_node is {self.ntasks_per_node}: it needs --nodes beside it")

    @property
    def num_tasks(self) -> int | None:
        """How many tasks fill the machines; None where their number is left to Slurm."""
        return self.nodes and self.nodes * (self.ntasks_per_node or 1)


def render_sbatch(job: Job, allocation: Allocation) -> str:
    """Writes the script that sbatch takes; words after the script's name go to the program.

    It ends with the exit code of the task that failed first. What the job's `env` has set stays.

    Raises:
        ConfigError: If the tasks are not as many as the machines are to hold.
    """
    if allocation.num_tasks not in (None, job.num_tasks):
        raise ConfigError(
            f"num_workers and num_ps make {job.num_tasks} tasks, and --nodes and --ntasks_per_node "
            f"{allocation.num_tasks}: leave one of them out"
        )
    threads = job.threads_per_task or allocation.cpus_per_task
    shared = render_shared_env(job, cores=allocation.cpus_per_task, cores_per_task=threads)
    exports = shared | ({"TFDIST_NUM_PS": str(job.num_ps)} if job.num_ps else {})
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _list_options(job, allocation)), ""]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    if job.run_dir is None:  # a job that comes back finds its own again
        lines.append("export TFDIST_RUN_DIR=${TFDIST_RUN_DIR:-runs/$SLURM_JOB_ID}")
    lines.append(f"export {RESTART_VARIABLE}=${{SLURM_RESTART_COUNT:-0}}")
    # From Slurm 22.05 on, srun does not take it over from sbatch.
    cpus = f" --cpus-per-task={allocation.cpus_per_task}" if allocation.cpus_per_task else ""
    srun = f"srun --kill-on-bad-exit=1 --label{cpus}"
    lines.append(_SCRIPT.format(run_task=_TASK, srun=srun, command=shlex.join(job.command)))
    if job.max_restarts:
        lines.append(_REQUEUE.format(max_restarts=job.max_restarts, lost=PEER_LOST_CODE))
    return "\n".join([*lines, "exit $code", ""])


_SCRIPT = """
# srun ends with the code of a task that it killed. So each task notes its failure, if it is the first; one that lost
# the others ({lost}) leaves the lost one time to do so. The traps let a program save when Slurm ends the job, and its
# end (143) then is no reason for srun to kill those that still do. It may come here a moment later than there.
export TFDIST_FIRST_FAILURE=$PWD/.tfdist-$SLURM_JOB_ID-$TFDIST_RESTART
run_task='{run_task}'
{srun} bash -c "$run_task" task \\
    {command} "$@"
code=$?
if [ -s "$TFDIST_FIRST_FAILURE" ]; then
    read -r task node code <"$TFDIST_FIRST_FAILURE"
    echo "tfdist: task $task on $node was the first to fail, with exit code $code"
fi
rm -f "$TFDIST_FIRST_FAILURE"
""".replace("{lost}", str(PEER_LOST_CODE))
_REQUEUE = """\
# Killed, out of time, or without the others: no fault of the program. It goes on from its last checkpoint.
# Slurm ends this script then; a child just forked could escape it.
if [ $code -eq {lost} ] || [ $code -gt 128 ]; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
        echo "tfdist: requeued"
        scontrol requeue "$SLURM_JOB_ID" && exec sleep 60
    fi
fi
"""


def _list_options(job: Job, allocation: Allocation) -> list[str]:
    output = f"{job.run_dir}/slurm-%j.log" if job.run_dir else "%x-%j.log"
    given = {
        "job-name": allocation.job_name,
        "nodes": allocation.nodes,
        "ntasks": job.num_tasks if allocation.nodes is None else None,
        "ntasks-per-node": allocation.nodes and (allocation.ntasks_per_node or 1),
        "cpus-per-task": allocation.cpus_per_task,
        "gpus-per-task": allocation.gpus_per_task,
        "time": allocation.time,
        "partition": allocation.partition,
        "account": allocation.account,
        "output": output,
        "open-mode": "append",
        # Slurm looks at the clock once a minute.
        "signal": f"TERM@{max(60, round(job.grace_secs))}",
    }
    options = [f"--{name}={shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    if job.max_restarts:
        options.append("--requeue")
    return [*options, *([allocation.sbatch_flags] if allocation.sbatch_flags else [])]
