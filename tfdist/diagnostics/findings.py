"""A finding: what is wrong, how bad it is, and what to do about it."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

# The facts of each task, by its name as in "worker:0".
AllFacts = Mapping[str, Mapping[str, Any]]
SEVERITIES = ("error", "warning", "note")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line for a person.

    Attributes:
        severity: `error` (the run will fail, hang or be wrong), `warning` (it may) or `note`.
        text: What was seen.
        remedy: What to do.
        issue: Where others have met it, as a link.
    """

    severity: str
    text: str
    remedy: str
    issue: str | None = None


def render_finding(finding: Finding) -> str:
    """Writes a finding as one line."""
    link = f" ({finding.issue})" if finding.issue else ""
    return " ".join(f"{finding.severity}: {finding.text}: {finding.remedy}{link}".split())


def split_message(message: str) -> tuple[str, str]:
    """Splits a message of `tfdist.errors` into what is wrong and the remedy."""
    # The colons of JSON that is quoted in it follow a quotation mark.
    text, *remedy = re.split(r"(?<![\"']): (?=[a-z])", message, maxsplit=1)
    return text.rstrip("."), remedy[0] if remedy else "correct it"


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Puts the worst first, and says nothing twice."""
    return sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))


def name_tasks(tasks: Iterable[str], facts: AllFacts) -> str:
    """Names tasks with their hosts, as in "worker:1 on h2"."""
    return ", ".join(f"{task} on {facts[task]['host']}" for task in tasks)


def group_by_host(facts: AllFacts) -> dict[str, list[str]]:
    """Returns the tasks of each host."""
    hosts: dict[str, list[str]] = {}
    for task, own in facts.items():
        hosts.setdefault(own["host"], []).append(task)
    return hosts
