"""Whether the cluster is one that can work, and whether all tasks know the same one."""

import json
from collections.abc import Mapping
from typing import Any

from tfdist.cluster.spec import EVALUATOR, Cluster, check_strategy
from tfdist.diagnostics.findings import AllFacts, Finding, name_tasks, split_message
from tfdist.errors import ConfigError

_EVALUATOR_ISSUE = "https://github.com/tensorflow/tensorflow/issues/46169"
_SRUN_ISSUE = "https://github.com/tensorflow/tensorflow/issues/36094"


def check_roster(facts: AllFacts, strategy: str | None) -> list[Finding]:
    """Looks at the cluster that each task has detected, and at the strategy; None: any that fits."""
    findings = []
    for task, own in facts.items():
        if own["cluster_error"]:
            text, remedy = split_message(own["cluster_error"])
            findings.append(Finding("error", f"{task} on {own['host']}: {text}", remedy))
        if EVALUATOR in _read_roles(own["tf_config"]):
            text = f"TF_CONFIG of {task} has an evaluator in the cluster; tfdist leaves it out, others hang"
            remedy = "take it out of 'cluster'; it names itself in 'task' alone"
            findings.append(Finding("warning", text, remedy, _EVALUATOR_ISSUE))
        if own["unused"]:
            text, _, remedy = own["unused"].partition("; ")
            findings.append(Finding("warning", text, remedy, _SRUN_ISSUE))
    return findings + _compare_clusters(facts) + _check_strategy(facts, strategy)


def _compare_clusters(facts: AllFacts) -> list[Finding]:
    clusters = {task: own["cluster"] for task, own in facts.items() if not own["cluster_error"]}
    if not clusters:
        return []
    first = next(iter(clusters))
    others = [task for task, cluster in clusters.items() if cluster != clusters[first]]
    if not others:
        return []
    same = all(_addresses(clusters[task]) == _addresses(clusters[first]) for task in others)
    what = "the same addresses in another order" if same else "other addresses"
    text = f"{name_tasks(others, facts)} have {what} than {name_tasks([first], facts)}"
    return [Finding("error", text, "give all tasks the same 'cluster'; only 'task' differs")]


def _check_strategy(facts: AllFacts, strategy: str | None) -> list[Finding]:
    own = next(iter(facts.values()), None)
    if own is None or not own["cluster"]:
        return []
    cluster = Cluster(addresses={role: tuple(addresses) for role, addresses in own["cluster"].items()})
    # Parameter servers, or a chief beside the workers, are of use to one strategy alone.
    strategy = strategy or ("ps" if cluster.num_ps else "multiworker")
    try:
        check_strategy(cluster, strategy)
    except ConfigError as error:
        return [Finding("error", *split_message(str(error)))]
    return []


def _read_roles(text: str | None) -> Mapping[str, Any]:
    try:
        return dict(json.loads(text or "{}").get("cluster") or {})
    except (ValueError, AttributeError, TypeError):  # which is an error of its own
        return {}


def _addresses(cluster: Mapping[str, list[str]]) -> list[str]:
    return sorted(address for own in cluster.values() for address in own)
