"""Whether all tasks would run the same program."""

import collections
from collections.abc import Mapping
from typing import Any

from tfdist.diagnostics.findings import AllFacts, Finding, name_tasks, split_message

_NEEDED = ("tensorflow", "keras")
_HARMLESS = ("numpy", "protobuf")
_REMEDIES = {
    "tfdist's source": "install the same version, or carry the same checkout there",
    "the recipe's file": "copy the same one to all hosts",
}


def check_versions(facts: AllFacts) -> list[Finding]:
    """Compares Python, the packages, tfdist's own source and the recipe's file."""
    findings = []
    for task, own in facts.items():
        for name in _NEEDED:
            if own["packages"][name] is None:
                text = f"{task} on {own['host']} has no {name} ({own['executable']})"
                remedy = "install tfdist with its requirements there, or choose another by --python"
                findings.append(Finding("error", text, remedy))
        if own["recipe_error"]:
            text, remedy = split_message(own["recipe_error"])
            findings.append(Finding("error", f"{task} on {own['host']}: {text}", remedy))
    versions = {task: _list_versions(own) for task, own in facts.items()}
    for name in dict.fromkeys(name for own in versions.values() for name in own):
        known = {task: version for task, own in versions.items() if (version := own.get(name))}
        findings += _compare(name, known, facts)
    return findings


def _list_versions(own: Mapping[str, Any]) -> dict[str, str | None]:
    sources = {"tfdist's source": own["tfdist"], "the recipe's file": own["recipe"]}
    return {"Python": own["python"], **own["packages"], **sources}


def _compare(name: str, versions: Mapping[str, str], facts: AllFacts) -> list[Finding]:
    counts = collections.Counter(versions.values())
    usual, *others = [version for version, _ in counts.most_common()] or [""]
    findings = []
    for version in others:
        tasks = [task for task, own in versions.items() if own == version]
        where = f" ({facts[tasks[0]]['executable']})" if name == "Python" else ""
        is_patch = name == "Python" and version.split(".")[:2] == usual.split(".")[:2]
        severity = "warning" if is_patch or name in _HARMLESS else "error"
        text = f"{name_tasks(tasks, facts)}: {name} is {version}{where}, elsewhere {usual}"
        remedy = _REMEDIES.get(name, "install the same one everywhere, or choose another by --python")
        findings.append(Finding(severity, text, remedy))
    return findings
