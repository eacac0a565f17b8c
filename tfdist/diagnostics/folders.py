"""Whether the run's folder can be written and is the same everywhere, and whether there are files enough."""

from tfdist.diagnostics.findings import AllFacts, Finding, group_by_host, name_tasks

_FILES_ISSUE = "https://github.com/tensorflow/tensorflow/issues/36846"


def check_folders(facts: AllFacts) -> list[Finding]:
    """Looks at the run_dir and the data files."""
    findings = []
    for task, own in facts.items():
        if own["run_dir_error"]:
            # The chief alone writes there; the others' logs are the launcher's.
            severity = "error" if _is_chief(task, own["cluster"]) else "warning"
            text = f"{task} on {own['host']} cannot write to {own['disk']} ({own['run_dir_error']})"
            findings.append(Finding(severity, text, "choose a --run_dir that it owns"))
        blind = [
            p
            for p, seen in own["peers"].items()
            if not seen.get("reads_run_dir", True)
            and not (p in facts and facts[p]["run_dir_error"])
            and _is_chief(p, own["cluster"])
        ]
        for peer in blind:
            where = f" on {facts[peer]['host']}" if peer in facts else ""
            text = f"{task} on {own['host']} does not see what {peer}{where} writes to the run_dir"
            remedy = (
                "nothing is lost as long as the chief stays where it is; put --run_dir on a shared disk, so that a run "
                "can go on elsewhere"
            )
            findings.append(Finding("warning", text, remedy))
    return findings + _check_files(facts)


def _is_chief(task: str, cluster: dict[str, list[str]]) -> bool:
    return not cluster or task == ("chief:0" if "chief" in cluster else "worker:0")


def _check_files(facts: AllFacts) -> list[Finding]:
    counts = {task: own["num_files"] for task, own in facts.items() if own["num_files"] is not None}
    num_workers = sum(task.startswith("worker") for task in counts) or 1
    findings = []
    for host, tasks in group_by_host({task: facts[task] for task in counts}).items():
        count = counts[tasks[0]]
        if count == 0:
            remedy = "correct the pattern, or copy the files there"
            findings.append(Finding("error", f"no file on {host} fits --data_files", remedy))
        elif count < num_workers:
            text = f"{count} files on {host} for {num_workers} workers: some would get none"
            remedy = "write more and smaller files, or share by examples (--shard=data)"
            findings.append(Finding("warning", text, remedy, _FILES_ISSUE))
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} for {name_tasks([task], facts)}" for task, count in counts.items())
        remedy = "copy the same files to all hosts, or use a shared disk"
        findings.append(Finding("error", f"the tasks see different numbers of files: {listed}", remedy))
    return findings
