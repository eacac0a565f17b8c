"""The doctor's checks, on facts as the tasks would tell them."""

import json

import pytest

from tfdist.cluster.spec import Cluster, parse_tf_config
from tfdist.diagnostics.facts import FactsRequest, find_proxied, gather_facts
from tfdist.diagnostics.findings import Finding, render_finding, sort_findings, split_message
from tfdist.diagnostics.flags import parse_flags
from tfdist.diagnostics.folders import check_folders
from tfdist.diagnostics.network import check_network
from tfdist.diagnostics.resources import check_resources
from tfdist.diagnostics.roster import check_roster
from tfdist.diagnostics.survey import check
from tfdist.diagnostics.versions import check_versions
from tfdist.errors import ConfigError

CLUSTER = {"worker": ["h1:1", "h2:2", "h2:3"]}
TASKS = {"worker:0": "h1", "worker:1": "h2", "worker:2": "h2"}


def healthy(task, host, cluster=CLUSTER):
    peers = [f"{role}:{i}" for role, own in cluster.items() for i in range(len(own)) if f"{role}:{i}" != task]
    return {
        "task": task,
        "host": host,
        "tf_config": json.dumps({"cluster": cluster}),
        "cluster": cluster,
        "cluster_error": None,
        "unused": None,
        "is_open": False,
        "python": "3.11.7",
        "executable": "/opt/python",
        "packages": {"tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6", "protobuf": "7.36.2"},
        "tfdist": "0123456789ab",
        "recipe": None,
        "recipe_error": None,
        "num_cores": 8,
        "threads": 4,
        "gpus": [],
        "memory_bytes": 16e9,
        "num_files": None,
        "proxies": [],
        "proxied_hosts": [],
        "disk": "/runs",
        "disk_bytes": 50e9,
        "peers": {peer: {"error": None, "reads_run_dir": True, "skew_secs": 0.0} for peer in peers},
        "heard": peers,
        "port_error": None,
        "run_dir_error": None,
    }


@pytest.fixture
def facts():
    return {task: healthy(task, host) for task, host in TASKS.items()}


def lines(findings):
    return [render_finding(finding) for finding in findings]


def test_healthy_tasks_have_no_findings(facts):
    assert check(facts, [], None) == []


def test_finding_is_one_line_with_its_issue():
    finding = Finding(severity="error", text="a\nb", remedy="do c", issue="https://x/1")
    assert render_finding(finding) == "error: a b: do c (https://x/1)"


def test_findings_are_sorted_and_said_once():
    note, error = (Finding(severity=severity, text="t", remedy="r") for severity in ("note", "error"))
    assert sort_findings([note, error, note]) == [error, note]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"cluster": {"worker": ["h1:1", "h1:1"]}, "task": {"type": "worker", "index": 0}}',
            "change one port",
        ),
        ('{"cluster": {"worker": ["h1:1"]}, "task": {"type": "worker", "index": 3}}', "out of range"),
        ('{"cluster": {"worker": ["h1:1"]}}', "add "),
        ('{"cluster": ', 'write {"cluster": {...}, "task": {...}} with double quotes'),
    ],
)
def test_cluster_that_contradicts_itself_is_an_error(facts, text, said):
    with pytest.raises(ConfigError) as error:
        parse_tf_config(text)
    facts["worker:1"] |= {"cluster": {}, "tf_config": text, "cluster_error": str(error.value)}
    (line,) = lines(check_roster(facts, None))
    assert line.startswith("error: worker:1 on h2: ") and said in line


def test_remedy_is_split_off_a_message():
    text, remedy = split_message("""TF_CONFIG '{"a": 1' is not JSON: write {"cluster": {...}} with quotes""")
    assert (text, remedy) == ("""TF_CONFIG '{"a": 1' is not JSON""", 'write {"cluster": {...}} with quotes')
    assert split_message("no such thing.") == ("no such thing", "correct it")


def test_evaluator_in_the_cluster_is_a_warning(facts):
    facts["worker:0"]["tf_config"] = json.dumps({"cluster": CLUSTER | {"evaluator": ["h9:1"]}})
    (line,) = lines(check_roster(facts, None))
    assert line.startswith("warning: ") and "46169" in line


@pytest.mark.parametrize(
    ("worker", "said"),
    [(["h2:2", "h1:1", "h2:3"], "in another order"), (["h1:1", "h2:2", "h3:3"], "other addresses")],
)
def test_clusters_that_differ_are_an_error(facts, worker, said):
    facts["worker:2"]["cluster"] = {"worker": worker}
    (line,) = lines(check_roster(facts, None))
    assert line.startswith("error: worker:2 on h2 ") and said in line


@pytest.mark.parametrize(
    ("cluster", "strategy", "said"),
    [
        ({"worker": ["h1:1"], "ps": ["h2:2"]}, None, "needs a chief"),
        ({"worker": ["h1:1", "h2:2"]}, "ps", "needs a chief"),
        ({"worker": ["h1:1", "h2:2"]}, "mirrored", "runs in one process"),
    ],
)
def test_cluster_that_lacks_a_role_is_an_error(cluster, strategy, said):
    (line,) = lines(check_roster({"worker:0": healthy("worker:0", "h1", cluster)}, strategy))
    assert line.startswith("error: ") and said in line


def test_unused_srun_is_a_warning(facts):
    facts["worker:0"]["unused"] = "Slurm has allocated 4 tasks: srun was not used; start with 'srun python'"
    (line,) = lines(check_roster(facts, None))
    assert line.startswith("warning: ") and "start with 'srun python'" in line


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("its name does not resolve", "add h2 to DNS"),
        ("Connection refused", "start the doctor on all tasks"),
        ("no answer", "open port 2 between"),
        ("worker:2 answers there", "h2 leads elsewhere"),
    ],
)
def test_peer_that_is_not_reached_is_an_error(facts, reason, remedy):
    facts["worker:0"]["peers"]["worker:1"] = {"error": reason}
    (line,) = lines(check_network(facts))
    assert line.startswith(
        f"error: worker:0 on h1 does not reach worker:1 on h2 at h2:2 ({reason}): {remedy}"
    )


def test_open_door_is_a_warning(facts):
    for task in ("worker:0", "worker:2"):
        facts[task]["is_open"] = True
    (line,) = lines(check_network(facts))
    assert line.startswith("warning: the servers of worker:0 on h1, worker:2 on h2 would obey anyone")


def test_taken_port_is_an_error(facts):
    facts["worker:0"]["port_error"] = (
        "port 1 of worker:0 (h1:1) cannot be bound (Address in use): stop the program"
    )
    (line,) = lines(check_network(facts))
    assert line.startswith("error: on h1: port 1 of worker:0") and line.endswith(": stop the program")


@pytest.mark.parametrize(("skew", "said"), [(3.0, "3.0 s ahead of"), (-3.0, "3.0 s behind"), (0.5, None)])
def test_clocks_apart_are_a_warning(facts, skew, said):
    facts["worker:0"]["peers"]["worker:2"]["skew_secs"] = skew
    found = lines(check_network(facts))
    assert [line.partition(" worker:0")[0] for line in found] == (
        [f"warning: the clock of worker:2 on h2 is {said}"] if said else []
    )


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, []),
        ({"https_proxy": "http://p:1"}, ["10.0.0.1", "h1.lab"]),
        ({"https_proxy": "http://p:1", "no_proxy": ".lab"}, ["10.0.0.1"]),
        ({"http_proxy": "http://p:1", "no_proxy": "x", "no_grpc_proxy": "h1.lab,10.0.0.1"}, []),
    ],
)
def test_proxy_that_would_catch_grpc_is_found(env, found):
    cluster = Cluster(addresses={"worker": ("h1.lab:1", "10.0.0.1:1")})
    assert find_proxied(env, cluster) == found


@pytest.mark.parametrize(("version", "severity"), [("3.12.1", "error"), ("3.11.9", "warning")])
def test_another_python_is_named_with_its_host(facts, version, severity):
    facts["worker:1"] |= {"python": version, "executable": "/usr/bin/python3"}
    (line,) = lines(check_versions(facts))
    assert line.startswith(
        f"{severity}: worker:1 on h2: Python is {version} (/usr/bin/python3), elsewhere 3.11.7"
    )


@pytest.mark.parametrize(
    ("own", "severity", "said"),
    [
        ({"tfdist": "ffff456789ab"}, "error", "tfdist's source is ffff456789ab"),
        ({"packages": {"tensorflow": "2.20.0", "keras": "3.15.1"}}, "error", "tensorflow is 2.20.0"),
        (
            {"packages": {"tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.0.0"}},
            "warning",
            "numpy is 2.0.0",
        ),
        ({"packages": {"tensorflow": None, "keras": "3.15.1"}}, "error", "has no tensorflow"),
        (
            {"recipe_error": "no module 'x' can be found: copy it there"},
            "error",
            "no module 'x' can be found",
        ),
    ],
)
def test_programs_that_differ_are_named(facts, own, severity, said):
    facts["worker:2"] |= own
    (line,) = lines(check_versions(facts))
    assert line.startswith(f"{severity}: worker:2 on h2") and said in line


def test_recipes_that_differ_are_an_error(facts):
    for task, digest in zip(facts, ("aaaaaaaaaaaa", "aaaaaaaaaaaa", "bbbbbbbbbbbb"), strict=True):
        facts[task]["recipe"] = digest
    (line,) = lines(check_versions(facts))
    assert line.startswith("error: worker:2 on h2: the recipe's file is bbbbbbbbbbbb")


@pytest.mark.parametrize(
    ("threads", "cores", "said"),
    [(4, 8, None), (8, 8, "to 4 there"), (None, 8, "to 4 there"), (1, 1, "at most 1 workers")],
)
def test_more_threads_than_cores_are_a_warning(facts, threads, cores, said):
    for task in ("worker:1", "worker:2"):
        facts[task] |= {"threads": threads, "num_cores": cores}
    found = lines(check_resources(facts))
    assert all(line.startswith("warning: 2 workers on h2 compute with") for line in found)
    assert [said in line for line in found] == ([True] if said else [])


def test_gpu_of_two_tasks_is_a_warning(facts):
    for task in facts:
        facts[task]["gpus"] = ["0"]
    (line,) = lines(check_resources(facts))
    assert line.startswith("warning: GPU 0 is shared by worker:1 on h2, worker:2 on h2")
    assert "NCCL refuses two on one" in line


def test_little_memory_and_disk_are_warnings(facts):
    for task in ("worker:1", "worker:2"):
        facts[task] |= {"memory_bytes": 0.5e9, "disk_bytes": 1e6}
    found = lines(check_resources(facts))
    assert [line.split(" free ")[0] for line in found] == [
        "warning: h2 has 0.5 GB of",
        "warning: h2 has 0.00 GB",
    ]


def test_run_dir_matters_most_to_the_chief(facts):
    for task in ("worker:0", "worker:1"):
        facts[task]["run_dir_error"] = "Permission denied"
    found = lines(check_folders(facts))
    assert [line.partition(" cannot")[0] for line in found] == [
        "error: worker:0 on h1",
        "warning: worker:1 on h2",
    ]


def test_run_dir_that_is_not_shared_is_a_warning(facts):
    facts["worker:2"]["peers"]["worker:0"]["reads_run_dir"] = False
    facts["worker:0"]["peers"]["worker:2"]["reads_run_dir"] = False  # what a worker writes nobody needs
    (line,) = lines(check_folders(facts))
    assert line.startswith("warning: worker:2 on h2 does not see what worker:0 on h1 writes")


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ((8, 8, 8), []),
        ((2, 2, 2), ["warning: 2 files on h1", "warning: 2 files on h2"]),
        ((8, 0, 0), ["error: no file on h2", "error: the tasks see different numbers"]),
    ],
)
def test_files_are_counted(facts, counts, found):
    for task, count in zip(facts, counts, strict=True):
        facts[task]["num_files"] = count
    said = lines(check_folders(facts))
    assert [line[: len(start)] for line, start in zip(said, found, strict=True)] == found


def test_facts_of_this_machine_have_nothing_that_json_cannot_hold(tmp_path):
    (tmp_path / "a.csv").touch()
    asked = FactsRequest(run_dir=str(tmp_path / "run"), recipe="digits_cnn", data_files=f"{tmp_path}/*.csv")
    facts = gather_facts({"OMP_NUM_THREADS": "2", "TF_NUM_INTRAOP_THREADS": "3"}, asked)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["threads"], facts["num_files"], len(facts["recipe"])) == (3, 1, 12)
    assert set(healthy("worker:0", "h1")) == set(facts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_flags_say_who_is_to_be_asked():
    cluster = {"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}'}
    assert parse_flags([], cluster, "").job is None
    assert parse_flags(["--hosts=h1:2,h2"], cluster, "").job.num_workers == 3
    job = parse_flags(["--num-workers=2", "--strategy=parameter_server"], {}, "").job
    assert (job.num_tasks, job.strategy) == (4, "ps")
    assert parse_flags(["logs", "run", "--json"], {}, "").logs_of == "run"
    with pytest.raises(ConfigError):
        parse_flags(["--no_such"], {}, "")
