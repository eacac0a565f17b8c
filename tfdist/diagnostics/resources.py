"""Whether the machines have what the tasks will ask of them."""

from tfdist.diagnostics.findings import AllFacts, Finding, group_by_host, name_tasks

# An idle server takes about this.
_TASK_BYTES = 700 * 2**20
_DISK_BYTES = 2**30


def check_resources(facts: AllFacts) -> list[Finding]:
    """Looks at threads, GPUs, memory and disk of each host."""
    findings = []
    for host, tasks in group_by_host(facts).items():
        findings += _check_threads(host, tasks, facts)
        findings += _check_gpus(tasks, facts)
        available = facts[tasks[0]]["memory_bytes"]
        if available is not None and available < len(tasks) * _TASK_BYTES:
            text = (
                f"{host} has {available / 1e9:.1f} GB of free memory for {len(tasks)} tasks, which need about "
                f"{len(tasks) * _TASK_BYTES / 1e9:.1f} GB before any model"
            )
            findings.append(Finding("warning", text, "place fewer tasks there, or stop other programs"))
        own = facts[tasks[0]]
        if own["disk_bytes"] < _DISK_BYTES:
            text = f"{host} has {own['disk_bytes'] / 1e9:.2f} GB free at {own['disk']}"
            findings.append(Finding("warning", text, "free some, or choose another --run_dir"))
    return findings


def _check_threads(host: str, tasks: list[str], facts: AllFacts) -> list[Finding]:
    """Counts the threads of those that compute: a ps or a chief of its own mostly waits."""
    workers = [task for task in tasks if task.startswith("worker")]
    cores = facts[tasks[0]]["num_cores"]
    num_threads = sum(facts[task]["threads"] or cores for task in workers)
    if num_threads <= cores or len(workers) == 1 and facts[workers[0]]["threads"] is None:
        return []
    remedy = f"place at most {cores} workers there"
    if len(workers) <= cores:
        number = cores // len(workers)
        remedy = (
            f"set OMP_NUM_THREADS and TF_NUM_INTRAOP_THREADS to {number} there, or leave both to the launcher"
        )
    text = f"{len(workers)} workers on {host} compute with {num_threads} threads on {cores} cores"
    return [Finding("warning", text, remedy)]


def _check_gpus(tasks: list[str], facts: AllFacts) -> list[Finding]:
    owners: dict[str, list[str]] = {}
    for task in tasks:
        for gpu in facts[task]["gpus"]:
            owners.setdefault(gpu, []).append(task)
    return [
        Finding(
            "warning",
            f"GPU {gpu} is shared by {name_tasks(sharing, facts)}: they divide its time and memory, and under "
            "multiworker gradients cross by the host, for NCCL refuses two on one",
            "take as many workers as there are GPUs",
        )
        for gpu, sharing in owners.items()
        if len(sharing) > 1
    ]
