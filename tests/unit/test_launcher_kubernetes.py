"""What is rendered for Kubernetes, held against its published schemas and against the rules that these do not see."""

import re

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubernetes_validate.utils import all_versions

from tfdist.cluster.spec import Task, parse_tf_config
from tfdist.errors import ConfigError, LaunchError
from tfdist.launcher.job import Job
from tfdist.launcher.kubernetes.manifest import build_documents, render_kubernetes
from tfdist.launcher.kubernetes.pod_status import find_cause, parse_listing, render_end
from tfdist.launcher.kubernetes.pods import Pods, complete_job

PLAIN = Pods(image="registry.example.com/train:1")
FULL = Pods(
    image="registry.example.com/train:1", namespace="team-a", name="a" * 40, cpus=7.5, memory="1.5Gi", gpus=2,
    volume_claim="data.runs", port=3333,
)  # fmt: skip
MULTIWORKER = {"strategy": "multiworker", "num_workers": 3}
PS = {"strategy": "ps", "num_workers": 2, "num_ps": 2, "max_restarts": 3}
CASES = [
    (PLAIN, MULTIWORKER),
    (FULL, MULTIWORKER | {"max_restarts": 2}),
    (PLAIN, PS),
    (FULL, PS),
    (PLAIN, {}),
]


def build(pods=PLAIN, **changes):
    job = Job(**{"command": ["python", "train.py"], "env": {}, **MULTIWORKER, **changes})
    return build_documents(complete_job(job, pods), pods)


def documents_of(pods, changes):
    job = Job(command=["python", "train.py"], **changes)
    return list(yaml.safe_load_all(render_kubernetes(job, pods)))


# What a cluster would refuse, beside what its schemas say.

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTP]|[KMGTP]i)?")
JOBSET_ACTIONS = (
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts",
)  # fmt: skip


def check_name(name, *, suffix=""):
    assert NAME.fullmatch(name) and len(name + suffix) <= 63, f"name {name + suffix!r}"


def check_labels(labels):
    for key, value in labels.items():
        prefix, _, name = key.rpartition("/")
        assert len(prefix) <= 253 and 0 < len(name) <= 63 and LABEL.fullmatch(name), f"label {key!r}"
        assert len(value) <= 63 and LABEL.fullmatch(value), f"label {key}={value!r}"


def check_pod(spec):
    assert spec["restartPolicy"] == "Never", (
        "a pod failure policy wants restartPolicy Never; Always is never a Job's"
    )
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in spec["containers"]:
        check_name(container["name"])
        mounts = [mount["name"] for mount in container["volumeMounts"]]
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert set(mounts) == volumes and len(set(paths)) == len(paths), (
            "a volume without a mount, or the reverse"
        )
        for quantity in (q for kind in container["resources"].values() for q in kind.values()):
            assert QUANTITY.fullmatch(str(quantity)), f"quantity {quantity!r}"
        expand(container["env"], {})


def check_job_spec(spec):
    assert spec["completionMode"] == "Indexed" and spec.get("completions", 0) >= 1, (
        "Indexed wants completions"
    )
    assert spec["parallelism"] == spec["completions"], "tasks that wait for each other must all run"
    per_index = spec.get("backoffLimitPerIndex")
    assert ("maxFailedIndexes" in spec) == (per_index is not None)
    for rule in spec["podFailurePolicy"]["rules"]:
        values = rule["onExitCodes"]["values"]
        assert values == sorted(set(values)) and 0 not in values and len(values) <= 255
    check_labels(spec["template"]["metadata"]["labels"])
    check_pod(spec["template"]["spec"])


def check_jobset_spec(jobset, name):
    jobs = [job["name"] for job in jobset["replicatedJobs"]]
    assert len(set(jobs)) == len(jobs)
    assert set(jobset["successPolicy"]["targetReplicatedJobs"]) <= set(jobs), "no such replicated job"
    assert jobset["successPolicy"]["operator"] in ("All", "Any")
    for rule in jobset["failurePolicy"]["rules"]:
        assert rule["action"] in JOBSET_ACTIONS, f"action {rule['action']!r}"
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    for job in jobset["replicatedJobs"]:
        spec = job["template"]["spec"]
        check_job_spec(spec)
        # The pod's name; the five at the end are random.
        check_name(name, suffix=f"-{job['name']}-0-{spec['completions'] - 1}-abcde")


def check_schemas(document, version):
    if document["kind"] == "JobSet":
        # The published models forget what they do not know: whatever is not there afterwards is no field of a JobSet.
        assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document, (
            "not a field of a JobSet, or of another type"
        )
        for job in document["spec"]["replicatedJobs"]:
            whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **job["template"]}
            kubernetes_validate.validate(whole, version, strict=True)
    else:
        kubernetes_validate.validate(document, version, strict=True)


def check(documents, version):
    kinds = [document["kind"] for document in documents]
    policy, last = documents[0], documents[-1]
    assert kinds in (["NetworkPolicy", "Service", "Job"], ["NetworkPolicy", "JobSet"])
    for document in documents:
        check_schemas(document, version)
        check_name(document["metadata"]["name"])
        check_labels(document["metadata"]["labels"])
    spec, name = last["spec"], last["metadata"]["name"]
    if last["kind"] == "Job":
        check_job_spec(spec)
        check_name(name, suffix=f"-{spec['completions'] - 1}")
        assert spec["template"]["spec"]["subdomain"] == documents[1]["metadata"]["name"], "no such Service"
        templates = [spec["template"]]
    else:
        check_jobset_spec(spec, name)
        templates = [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
    selectors = [policy["spec"]["podSelector"]["matchLabels"]]
    selectors += [policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]]
    selectors += [document["spec"]["selector"] for document in documents if document["kind"] == "Service"]
    for labels in (template["metadata"]["labels"] for template in templates):
        assert all(selector.items() <= labels.items() for selector in selectors), "selects none of the pods"


def expand(env, annotations):
    """The environment that Kubernetes makes of a container's: a reference sees only what stands above it."""
    made = {}
    for variable in env:
        if "valueFrom" in variable:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            made[variable["name"]] = annotations.get(
                re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)[1], ""
            )
            continue

        def replace(match):
            assert match[0] == "$$" or match[1] in made, f"{match[0]} is not set above"
            return "$" if match[0] == "$$" else made[match[1]]

        made[variable["name"]] = re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)", replace, variable["value"])
    return made


@pytest.mark.parametrize("version", sorted(set(all_versions()))[-5:])
@pytest.mark.parametrize(("pods", "changes"), CASES)
def test_rendered_objects_are_valid(pods, changes, version):
    check(documents_of(pods, changes), version)


def test_a_kind_without_schema_is_no_pass():
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check_schemas({"apiVersion": "example.com/v1", "kind": "Strange"}, all_versions()[-1])


def change(document, path, value):
    """Puts a value somewhere into a document; None takes away what is there."""
    *way, last = (int(step) if step.isdigit() else step.replace("~", "/") for step in path)
    for step in way:
        document = document[step]
    if value is None:
        del document[last]
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("changes", "path", "value"),
    [
        (MULTIWORKER, "spec/template/spec/restartPolicy", "Always"),
        (MULTIWORKER, "spec/completions", None),
        (MULTIWORKER, "metadata/name", "Bad_Name"),
        (MULTIWORKER, "metadata/name", "a" * 62),
        (MULTIWORKER, "metadata/labels/app.kubernetes.io~part", "a" * 64),
        (MULTIWORKER, "spec/template/spec/subdomain", "elsewhere"),
        (MULTIWORKER, "spec/template/spec/containers/0/nonsense", 1),
        (MULTIWORKER, "spec/template/spec/containers/0/env/2/value", "$(LATER)"),
        (MULTIWORKER, "spec/template/spec/volumes/0/name", "other"),
        (PS, "spec/nonsense", 1),
        (PS, "spec/network/publishNotReadyAddresses", "yes"),
        (PS, "spec/successPolicy/operator", None),
        (PS, "spec/successPolicy/targetReplicatedJobs", ["boss"]),
        (PS, "spec/replicatedJobs/1/template/spec/nonsense", 1),
        (PS, "spec/replicatedJobs/1/template/spec/template/spec/nonsense", 1),
        (PS, "spec/replicatedJobs/1/template/spec/completions", None),
        (PS, "spec/failurePolicy/rules/0/action", "Panic"),
    ],
)
def test_mistake_would_be_seen(changes, path, value):
    documents = build(**changes)
    check(documents, all_versions()[-1])
    change(documents[-1], path.split("/"), value)
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError, ValueError)):
        check(documents, all_versions()[-1])


def pod_specs(documents):
    """Role, Job's name and pod's spec of each Job that will be."""
    last = documents[-1]
    name = last["metadata"]["name"]
    if last["kind"] == "Job":
        return [("worker", name, last["spec"])]
    return [
        (job["name"], f"{name}-{job['name']}-0", job["template"]["spec"])
        for job in last["spec"]["replicatedJobs"]
    ]


@pytest.mark.parametrize("changes", [MULTIWORKER, PS])
def test_every_pod_finds_itself_where_kubernetes_puts_it(changes):
    seen, clusters = set(), set()
    for role, job_name, spec in pod_specs(build(FULL, **changes)):
        for index in range(spec["completions"]):
            annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
            env = expand(spec["template"]["spec"]["containers"][0]["env"], annotations)
            cluster = parse_tf_config(env["TF_CONFIG"])
            assert cluster.task == Task(role, index)
            # An Indexed Job's pods have the host names NAME-INDEX, below the Service's; a JobSet's bears its own name.
            assert cluster.address(cluster.task) == f"{job_name}-{index}.{FULL.name}:3333"
            seen.add(cluster.task)
            clusters.add(cluster.with_task(None))
            assert (
                env["TFDIST_STRATEGY"] == changes["strategy"]
                and env["TFDIST_RUN_DIR"] == f"/runs/{FULL.name}"
            )
            probe = spec["template"]["spec"]["containers"][0]["readinessProbe"]
            assert probe["tcpSocket"]["port"] == 3333
            assert (env["OMP_NUM_THREADS"], env["TFDIST_LAUNCHED"]) == ("7", "1")
    assert len(clusters) == 1 and seen == set(clusters.pop().tasks)


def test_command_reaches_the_pod_as_it_was_written():
    words = ["sh", "-c", "echo $(date) $HOME $$ '$(JOB_COMPLETION_INDEX)'"]
    container = build(command=words)[-1]["spec"]["template"]["spec"]["containers"][0]
    sent = [{"name": str(i), "value": word} for i, word in enumerate(container["command"])]
    assert list(expand(sent, {}).values()) == words


def test_pod_may_do_little():
    for _, _, spec in pod_specs(build(FULL, **PS)):
        pod = spec["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        own = pod["containers"][0]["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        env = expand(pod["containers"][0]["env"], {})
        writable = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert env["HOME"] in writable and env["TMPDIR"] in writable and "/runs" in writable


def test_resources_are_asked_for_by_role():
    asked = {
        role: spec["template"]["spec"]["containers"][0]["resources"]
        for role, _, spec in pod_specs(build(FULL, **PS))
    }
    assert asked["ps"] == {"requests": {"cpu": "7.5", "memory": "1.5Gi"}, "limits": {"memory": "1.5Gi"}}
    assert asked["chief"] == asked["ps"]
    assert asked["worker"]["limits"] == {"memory": "1.5Gi", "nvidia.com/gpu": 2}


def test_restarts_are_for_ends_that_are_nobodys_fault():
    job = build(max_restarts=2)[-1]["spec"]
    assert (job["backoffLimitPerIndex"], job["maxFailedIndexes"]) == (2, 0)
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    assert {75, 137, 143} <= set(rule["onExitCodes"]["values"]) and not {1, 2, 3} & set(
        rule["onExitCodes"]["values"]
    )
    jobset = build(**PS)[-1]["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] == 3
    assert {job["template"]["spec"]["backoffLimit"] for job in jobset["replicatedJobs"]} == {0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": ""}, "--image"),
        ({"image": "a b"}, "'a b'"),
        ({"name": "Train"}, "'Train'"),
        ({"name": "1st"}, "a letter first"),
        ({"name": "a" * 41}, "at most 40"),
        ({"namespace": "a.b"}, "namespace"),
        ({"volume_claim": "-x"}, "volume_claim"),
        ({"memory": "4 GB"}, "'4 GB'"),
        ({"cpus": 0}, "cpus=0"),
        ({"cpus": float("nan")}, "cpus=nan"),
        ({"gpus": -1}, "gpus=-1"),
        ({"port": 80}, "port is 80"),
    ],
)
def test_impossible_pods_are_refused(changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Pods(**{"image": "i", **changes})


@pytest.mark.parametrize(
    ("claim", "run_dir", "said"),
    [(None, "/runs/a", "--volume_claim"), ("c", "/a", "cannot be /"), ("c", "/tmp/a", "/runs/tfdist")],
)
def test_run_dir_that_would_be_lost_is_refused(claim, run_dir, said):
    with pytest.raises(ConfigError, match=said):
        build(Pods(image="i", volume_claim=claim), run_dir=run_dir)


def test_run_dir_lies_on_the_claim():
    pod = build(Pods(image="i", volume_claim="c"), run_dir="/data/team/first")[-1]["spec"]["template"]["spec"]
    assert {"name": "runs", "mountPath": "/data/team"} in pod["containers"][0]["volumeMounts"]
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "c"}} in pod["volumes"]


# What `kubectl get job,pods -o json` says.


def pod_item(name, role, index, *, state, attempt=None, conditions=()):
    annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
    if attempt is not None:
        annotations["jobset.sigs.k8s.io/restart-attempt"] = str(attempt)
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/component": role},
            "annotations": annotations,
        },
        "status": {"containerStatuses": [{"state": state}] if state else [], "conditions": list(conditions)},
    }


def ended(code, at, reason="Error"):
    return {"terminated": {"exitCode": code, "finishedAt": f"2026-01-01T00:00:{at:02}Z", "reason": reason}}


def listing(*pods, condition=None):
    conditions = [{"type": "Suspended", "status": "False"}]
    if condition:
        conditions.append({"type": condition, "status": "True"})
    return {"items": [{"kind": "Job", "status": {"conditions": conditions}}, *pods]}


@pytest.mark.parametrize(
    ("condition", "done"), [(None, None), ("Complete", True), ("Completed", True), ("Failed", False)]
)
def test_listing_says_whether_the_job_is_over(condition, done):
    assert parse_listing(listing(condition=condition)) == (done, [])


def test_listing_without_its_job_is_an_error():
    with pytest.raises(LaunchError, match="deleted"):
        parse_listing({"items": [pod_item("a", "worker", 0, state={})]})


def test_pods_are_read():
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
    _, (lost, killed, pulling, making, waiting) = parse_listing(
        listing(
            pod_item("a", "worker", 0, state=ended(75, 5)),
            pod_item("b", "ps", 1, state=ended(137, 4, "OOMKilled"), attempt=2),
            pod_item(
                "c", "worker", 1, state={"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
            ),
            pod_item("d", "worker", 2, state={"waiting": {"reason": "ContainerCreating"}}),
            pod_item("e", "chief", 0, state={}, conditions=[unscheduled]),
        )
    )
    assert (lost.task, lost.exit_code, lost.has_started) == (Task("worker", 0), 75, True)
    assert (killed.task, killed.attempt) == (Task("ps", 1), 2)
    assert render_end(killed) == "ps:1 ended with exit code 137 (OOMKilled)"
    assert render_end(lost) == "worker:0 lost the others (exit code 75)"
    assert (pulling.reason, pulling.has_started) == ("no such image", False)
    assert (making.reason, waiting.reason) == ("", "0/3 nodes are available")


def test_cause_is_the_first_failure_of_the_last_attempt():
    _, pods = parse_listing(
        listing(
            pod_item("old", "worker", 0, state=ended(9, 1), attempt=0),
            pod_item("good", "chief", 0, state=ended(0, 1), attempt=1),
            pod_item("echo", "worker", 0, state=ended(75, 2), attempt=1),
            pod_item("cause", "worker", 1, state=ended(3, 3), attempt=1),
            pod_item("late", "worker", 2, state=ended(1, 4), attempt=1),
        )
    )
    assert find_cause({pod.name: pod for pod in pods}).name == "cause"
    assert find_cause({}) is None
