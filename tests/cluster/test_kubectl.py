"""`python -m tfdist.launch --kubernetes` against a stand-in for kubectl: no cluster runs on a test machine.

The stand-in answers from a folder, in which each test plays the cluster's part, and keeps what it was told.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

REPOSITORY = str(Path(__file__).parents[2])
KUBECTL = """\
#!{python}
import json, pathlib, sys, time
folder = pathlib.Path({folder!r})
words = sys.argv[3:]  # after -n NAMESPACE
with open(folder / "told", "a") as told:
    print(*sys.argv[1:], file=told)
if words[0] == "apply":
    (folder / "applied.yaml").write_text(sys.stdin.read())
    print("job.batch/tfdist created")
elif words[0] == "logs":
    sys.stdout.write((folder / (words[-1] + ".log")).read_text())
elif words[0] == "get" and words[-1] == "json":
    listing = folder / "listing.json"
    sys.stdout.write(listing.read_text() if listing.exists() else '{{"items": [{{"kind": "Job"}}]}}')
elif words[0] == "get" and (folder / "exists").exists():
    print("job.batch/tfdist")
elif words[0] == "delete":
    print("deleted")
if (folder / "refuses").exists() and words[0] == "apply":
    sys.exit("some warning\\nerror: no matches for kind Job")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "kubectl"
    program.write_text(KUBECTL.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    return tmp_path


def start(folder, *words, path=None):
    return subprocess.Popen(
        [sys.executable, "-m", "tfdist.launch", "--kubernetes", "--image=i", "--namespace=team", *words],
        env={**os.environ, "PYTHONPATH": REPOSITORY, "PATH": path or f"{folder}/bin:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def put(folder, *pods, condition=None):
    """Says what the cluster shows from now on."""
    conditions = [{"type": condition, "status": "True"}] if condition else []
    text = json.dumps({"items": [{"kind": "Job", "status": {"conditions": conditions}}, *pods]})
    (folder / "new").write_text(text)
    (folder / "new").rename(folder / "listing.json")


def pod(index, **state):
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"tfdist-{index}-abcde",
            "labels": {"app.kubernetes.io/component": "worker"},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        },
        "status": {"containerStatuses": [{"state": state}]},
    }


def ended(code, at=0, reason="Error"):
    return {"exitCode": code, "finishedAt": f"2026-01-01T00:00:{at:02}Z", "reason": reason}


def write_logs(folder, *texts):
    for index, text in enumerate(texts):
        (folder / f"tfdist-{index}-abcde.log").write_text(text)


def wait_for(what):
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(folder):
    return (folder / "told").read_text().splitlines() if (folder / "told").exists() else []


def test_job_is_applied_and_followed_to_a_good_end(folder):
    write_logs(folder, "first\n", "second\n")
    put(folder, pod(0, terminated=ended(0)), pod(1, terminated=ended(0)), condition="Complete")
    code, out, err = finish(start(folder, "--num_workers=2", "train.py"))
    assert code == 0, err
    assert sorted(out.splitlines()) == ["[worker:0] first", "[worker:1] second"]
    assert "kind: Job" in (folder / "applied.yaml").read_text()
    assert all(line.startswith("-n team ") for line in told(folder))
    assert "kubectl delete job,service,networkpolicy tfdist -n team" in err


def test_first_failure_is_the_jobs(folder):
    write_logs(folder, "peers are gone\n", "I am the cause\n", "killed for it\n")
    pods = [ended(75, 1), ended(3, 2), ended(137, 3)]
    put(folder, *(pod(i, terminated=end) for i, end in enumerate(pods)), condition="Failed")
    code, _, err = finish(start(folder, "--num_workers=3", "train.py"))
    assert code == 3
    lines = err.splitlines()
    assert "tfdist.launch: the last lines of worker:1, the first task to fail:" in lines
    assert lines[-2] == "[worker:1] I am the cause"
    assert lines[-1].startswith("tfdist.launch: worker:1 ended with exit code 3; the pods are kept")


def test_job_that_failed_without_a_pod_fails(folder):
    put(folder, condition="Failed")
    code, _, err = finish(start(folder, "train.py"))
    assert code == 1 and "kubectl describe job tfdist" in err


def test_pod_that_cannot_start_is_shown_once_and_followed_later(folder):
    put(folder, pod(0, waiting={"reason": "ErrImagePull", "message": "no such image"}))
    process = start(folder, "train.py")
    wait_for(lambda: sum("json" in line for line in told(folder)) >= 2)
    write_logs(folder, "at last\n")
    put(folder, pod(0, terminated=ended(0)), condition="Complete")
    code, out, err = finish(process)
    assert (code, out) == (0, "[worker:0] at last\n")
    assert err.count("worker:0 waits: no such image") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_deletes_the_job(folder, number):
    process = start(folder, "train.py")
    wait_for(lambda: any("json" in line for line in told(folder)))
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number and f"{number.name}: deleting job tfdist" in err
    assert told(folder)[-1] == "-n team delete job tfdist --wait=false"


def test_job_whose_output_nobody_reads_is_deleted(folder):
    put(folder)
    process = start(folder, "train.py")
    process.stdout.close()
    write_logs(folder, "a line\n")
    put(folder, pod(0, running={}))
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    process.stderr.close()
    assert told(folder)[-1] == "-n team delete job tfdist --wait=false"


def test_job_that_somebody_deleted_ends(folder):
    (folder / "listing.json").write_text('{"items": []}')
    code, _, err = finish(start(folder, "train.py"))
    assert code == 2 and "somebody has deleted it" in err


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("exists", "choose another --name, or kubectl delete job tfdist -n team"),
        ("refuses", "no matches for kind Job"),
    ],
)
def test_refusal_is_one_line(folder, file, said):
    (folder / file).touch()
    code, out, err = finish(start(folder, "train.py"))
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert not any("json" in line for line in told(folder))


def test_missing_kubectl_is_one_line(folder):
    code, _, err = finish(start(folder, "train.py", path="/nowhere"))
    assert code == 2 and "kubectl is not on the PATH" in err and err.count("\n") == 1
