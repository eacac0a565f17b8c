"""What a job looks like on Kubernetes: a Service and an Indexed Job, or a JobSet where there are ps tasks."""

import json
import signal
from pathlib import PurePosixPath
from typing import Any

from tfdist.errors import PEER_LOST_CODE
from tfdist.launcher.job import RESTART_VARIABLE, Job, render_shared_env
from tfdist.launcher.kubernetes.pods import (
    INDEX,
    JOB_RESTARTS,
    JOBSET_RESTARTS,
    ROLE,
    SCRATCH,
    Pods,
    build_pod_cluster,
    complete_job,
    labels,
)

_USER = 1000
# Ends that say nothing against the program: it was killed, sent away, or lost the others. Others would come again.
_KILLS = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGSEGV", "SIGTERM")
_WORTH_A_RESTART = [PEER_LOST_CODE, *sorted(128 + signal.Signals[name] for name in _KILLS)]


def render_kubernetes(job: Job, pods: Pods) -> str:
    """Writes what `kubectl apply -f -` takes: YAML, one document per object.

    Raises:
        ConfigError: If the run_dir would be lost.
    """
    import yaml  # here, since nobody else needs it

    documents = build_documents(complete_job(job, pods), pods)
    return "---\n".join(yaml.safe_dump(one, sort_keys=False, width=2**20) for one in documents)


def build_documents(job: Job, pods: Pods) -> list[dict[str, Any]]:
    """Builds the objects that make up a job, as `complete_job` returns it.

    Returns:
        A NetworkPolicy first, so that no pod is open before it; then a headless Service and an Indexed Job, or, with ps
        tasks, a JobSet, which makes its own Service.
    """
    if job.has_chief:
        return [_build_network_policy(pods), _build_jobset(job, pods)]
    # The others leave when one is gone, with a code that lets them come back: so each is counted for itself.
    retries = {"backoffLimitPerIndex": job.max_restarts, "maxFailedIndexes": 0}
    return [
        _build_network_policy(pods),
        _build_service(pods),
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": _build_metadata(pods),
            "spec": _build_job_spec(job, pods, "worker", job.num_workers, retries),
        },
    ]


def _build_metadata(pods: Pods) -> dict[str, Any]:
    return {"name": pods.name, "namespace": pods.namespace, "labels": labels(pods)}


def _build_network_policy(pods: Pods) -> dict[str, Any]:
    """Admits the job's own pods alone, on every port: NCCL chooses its own."""
    own = {"matchLabels": labels(pods)}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _build_metadata(pods),
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": labels(pods)}}]}],
        },
    }


def _build_service(pods: Pods) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _build_metadata(pods),
        "spec": {
            "clusterIP": "None",
            # The tasks look for each other before any is ready.
            "publishNotReadyAddresses": True,
            "selector": labels(pods),
            "ports": [{"name": "grpc", "port": pods.port, "protocol": "TCP"}],
        },
    }


def _build_jobset(job: Job, pods: Pods) -> dict[str, Any]:
    """With ps tasks the chief's end is the job's; any other's end starts all again."""
    counts = {"chief": 1, "worker": job.num_workers, "ps": job.num_ps or 0}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _build_metadata(pods),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All", "targetReplicatedJobs": ["chief"]},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {"name": "program", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [
                {
                    "name": role,
                    "replicas": 1,
                    "template": {"spec": _build_job_spec(job, pods, role, count, {"backoffLimit": 0})},
                }
                for role, count in counts.items()
            ],
        },
    }


def _build_job_spec(job: Job, pods: Pods, role: str, count: int, retries: dict[str, int]) -> dict[str, Any]:
    policy = {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [*_WORTH_A_RESTART]}}
    return {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        **retries,
        "podFailurePolicy": {"rules": [policy]},
        "template": {
            "metadata": {"labels": {**labels(pods), ROLE: role}},
            "spec": _build_pod_spec(job, pods, role),
        },
    }


def _build_pod_spec(job: Job, pods: Pods, role: str) -> dict[str, Any]:
    mounts = [{"name": "scratch", "mountPath": SCRATCH}]
    volumes: list[dict[str, Any]] = [{"name": "scratch", "emptyDir": {}}]
    if pods.volume_claim and job.run_dir:
        mounts.append({"name": "runs", "mountPath": str(PurePosixPath(job.run_dir).parent)})
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": pods.volume_claim}})
    if pods.gpus > 1 and role != "ps":
        # NCCL passes tensors between GPUs through it, and finds 64 MB.
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    return {
        **({} if job.has_chief else {"subdomain": pods.name}),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": max(30, round(job.grace_secs)),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "task",
                "image": pods.image,
                "command": [_escape(word) for word in job.command],
                "env": _build_env(job, pods, role),
                # TensorFlow opens the port once it is up, and holds it to the end.
                "readinessProbe": {"tcpSocket": {"port": pods.port}, "periodSeconds": 5},
                "resources": _build_resources(pods, role),
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _build_env(job: Job, pods: Pods, role: str) -> list[dict[str, Any]]:
    """One environment for all pods of a role: Kubernetes puts each pod's index into its TF_CONFIG."""
    addresses = {role: list(hosts) for role, hosts in build_pod_cluster(job, pods).addresses.items()}
    task = f'{{"type": "{role}", "index": $(JOB_COMPLETION_INDEX)}}'
    restarts = JOBSET_RESTARTS if job.has_chief else JOB_RESTARTS
    shared = render_shared_env(job, cores=max(1, int(pods.cpus)), cores_per_task=None)
    return [
        # Before TF_CONFIG, which may refer only to what stands above it.
        {"name": "JOB_COMPLETION_INDEX", "valueFrom": _build_reference(INDEX)},
        {"name": RESTART_VARIABLE, "valueFrom": _build_reference(restarts)},
        {"name": "TF_CONFIG", "value": f'{{"cluster": {json.dumps(addresses)}, "task": {task}}}'},
        *({"name": name, "value": _escape(value)} for name, value in shared.items()),
        {"name": "HOME", "value": SCRATCH},
        {"name": "TMPDIR", "value": SCRATCH},
    ]


def _build_reference(annotation: str) -> dict[str, Any]:
    return {"fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}


def _build_resources(pods: Pods, role: str) -> dict[str, Any]:
    limits: dict[str, Any] = {"memory": pods.memory}
    if pods.gpus and role == "worker":
        limits["nvidia.com/gpu"] = pods.gpus
    return {"requests": {"cpu": f"{pods.cpus:g}", "memory": pods.memory}, "limits": limits}


def _escape(text: str) -> str:
    """Keeps Kubernetes from reading `$(NAME)` as a reference to a variable, and `$$` as one `$`."""
    return text.replace("$", "$$")
