"""Asks every task for its facts, by way of the launcher or as one of the tasks, and has them checked."""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Mapping
from typing import Any

from tfdist.diagnostics.facts import FactsRequest, gather_facts
from tfdist.diagnostics.findings import Finding, sort_findings
from tfdist.diagnostics.folders import check_folders
from tfdist.diagnostics.network import check_network
from tfdist.diagnostics.resources import check_resources
from tfdist.diagnostics.roster import check_roster
from tfdist.diagnostics.versions import check_versions
from tfdist.errors import LaunchError
from tfdist.launcher.job import Job, build_cluster
from tfdist.launcher.local import run_local


def build_command(asked: FactsRequest, python: str | None) -> list[str]:
    """Makes the command that prints a task's facts."""
    return [python or sys.executable, "-m", "tfdist.diagnostics.facts", json.dumps(dataclasses.asdict(asked))]


def survey_job(job: Job) -> list[Finding]:
    """Starts the facts program, by the command of `build_command`, on all tasks of a job; the worst findings first.

    A host that cannot be reached is a finding; the others are asked without it.

    Raises:
        ConfigError: If there are fewer slots than workers.
    """
    findings: list[Finding] = []
    while True:
        try:
            facts, said = _launch(job)
            break
        except LaunchError as error:
            findings.append(_explain_refusal(str(error)))
            left = tuple(host for host in job.hosts if not str(error).startswith(f"host {host.name}: "))
            num_lost = sum(host.num_slots for host in job.hosts) - sum(host.num_slots for host in left)
            if not left or len(left) == len(job.hosts):
                return findings
            job = dataclasses.replace(job, hosts=left, num_workers=max(1, job.num_workers - num_lost))
    tasks = [str(task) for task in build_cluster(job).tasks]
    silent = [task for task in tasks if task not in facts]
    if silent:
        reason = next((line for line in reversed(said) if line.strip()), "no output")
        text = f"no answer from {', '.join(silent)} ({reason})"
        findings.append(Finding("error", text, "run `python -m tfdist.diagnostics.facts` there by hand"))
    return check(facts, findings, job.strategy)


def survey_here(env: Mapping[str, str], asked: FactsRequest) -> list[Finding]:
    """Meets the others as the task that the environment names; the doctor must run on all of them."""
    own = gather_facts(env, asked)
    facts = {own["task"] or "this process": own}
    for task, seen in own["peers"].items():
        # What a peer has seen of the others is not known here: its own doctor says it.
        unseen: dict[str, Any] = {"peers": {}, "heard": [], "port_error": None, "run_dir_error": None}
        if seen.get("facts"):
            facts[task] = {**seen["facts"], **unseen}
    heard = set(own["heard"])
    return check(facts, _check_unheard(own, heard), asked.strategy)


def check(
    facts: Mapping[str, Mapping[str, Any]], findings: list[Finding], strategy: str | None
) -> list[Finding]:
    """Runs every check; the worst findings first."""
    findings = [*findings, *check_roster(facts, strategy)]
    for examine in (check_network, check_versions, check_resources, check_folders):
        findings += examine(facts)
    return sort_findings(findings)


def _check_unheard(own: Mapping[str, Any], heard: set[str]) -> list[Finding]:
    return [
        Finding(
            "error",
            f"{own['task']} on {own['host']} reaches {peer}, which does not reach it",
            "open its port in that direction too",
        )
        for peer, seen in own["peers"].items()
        if seen["error"] is None and peer not in heard
    ]


def _launch(job: Job) -> tuple[dict[str, Any], list[str]]:
    """Returns the facts by task, and what was said beside them."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run_local(job)
    facts = {}
    for line in out.getvalue().splitlines():
        _, _, text = line.partition("] ")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            own = json.loads(text)
            facts[own["task"]] = own
    return dict(sorted(facts.items())), err.getvalue().splitlines()


def _explain_refusal(message: str) -> Finding:
    text, _, remedy = message.partition("; ")
    return Finding("error", text, remedy or "see above")
