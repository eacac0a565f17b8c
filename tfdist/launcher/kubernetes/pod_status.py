"""What Kubernetes says of a job and its pods."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tfdist.cluster.spec import Task
from tfdist.errors import PEER_LOST_CODE, LaunchError
from tfdist.launcher.kubernetes.pods import INDEX, JOB_RESTARTS, JOBSET_RESTARTS, ROLE

_BEING_MADE = ("ContainerCreating", "PodInitializing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodStatus:
    """What Kubernetes says of one pod.

    Attributes:
        name: Its name.
        task: The task that it runs.
        attempt: How often the task was started before.
        has_started: Whether it may have printed something.
        exit_code: Of its process, once that has ended.
        reason: Why it ended, such as `OOMKilled`, or why it does not start.
        finished_at: When it ended, in a form that sorts.
    """

    name: str
    task: Task
    attempt: int
    has_started: bool
    exit_code: int | None
    reason: str
    finished_at: str


def parse_listing(listing: Mapping[str, Any]) -> tuple[bool | None, list[PodStatus]]:
    """Reads what `kubectl get job,pods -o json` prints: whether the job ended well, None while it runs; and its pods.

    Raises:
        LaunchError: If the job itself is not in it.
    """
    owners = [item for item in listing["items"] if item["kind"] != "Pod"]
    if not owners:
        raise LaunchError("the job is gone: somebody has deleted it")
    ends = {
        condition["type"]
        for condition in owners[0].get("status", {}).get("conditions", [])
        if condition["status"] == "True"
    }
    done = True if ends & {"Complete", "Completed"} else False if "Failed" in ends else None
    return done, [_parse_pod(item) for item in listing["items"] if item["kind"] == "Pod"]


def find_cause(pods: Mapping[str, PodStatus]) -> PodStatus | None:
    """Finds the pod whose end was the job's, among all that were seen, by name.

    Returns:
        Of the last attempt's that failed the first, one that only lost the others last; None if none failed.
    """
    failed = [pod for pod in pods.values() if pod.exit_code]
    last = max((pod.attempt for pod in failed), default=0)
    return min(
        (pod for pod in failed if pod.attempt == last),
        key=lambda pod: (pod.exit_code == PEER_LOST_CODE, pod.finished_at),
        default=None,
    )


def render_end(pod: PodStatus) -> str:
    """Says how a pod ended, as in "worker:1 ended with exit code 137 (OOMKilled)"."""
    if pod.exit_code == PEER_LOST_CODE:
        return f"{pod.task} lost the others (exit code {pod.exit_code})"
    reason = f" ({pod.reason})" if pod.reason not in ("", "Error") else ""
    return f"{pod.task} ended with exit code {pod.exit_code}{reason}"


def _parse_pod(item: Mapping[str, Any]) -> PodStatus:
    metadata, status = item["metadata"], item.get("status", {})
    annotations = metadata.get("annotations", {})
    attempt = annotations.get(JOBSET_RESTARTS) or annotations.get(JOB_RESTARTS) or "0"
    state: dict[str, Any] = next((one["state"] for one in status.get("containerStatuses", [])), {})
    ended, waiting = state.get("terminated", {}), state.get("waiting", {})
    reason = ended.get("reason") or waiting.get("message") or waiting.get("reason") or ""
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            reason = condition.get("message", "")
    return PodStatus(
        name=metadata["name"],
        task=Task(metadata["labels"][ROLE], int(annotations.get(INDEX, 0))),
        attempt=int(attempt),
        has_started="running" in state or bool(ended),
        exit_code=ended.get("exitCode"),
        reason="" if reason in _BEING_MADE else reason,
        finished_at=ended.get("finishedAt") or "",
    )
