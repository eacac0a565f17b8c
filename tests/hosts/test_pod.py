"""A rendered pod really runs, by podman; the test does what a cluster does between the Job and its pod."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

import pytest
import yaml
from namespaces import ADDRESSES, two_hosts

from tfdist.launcher.flags import parse_flags

pytestmark = [pytest.mark.cluster, pytest.mark.ci]

REPOSITORY = Path(__file__).parents[2]
IMAGE = "localhost/tfdist-test:latest"
# Not needed, and large.
LEFT_OUT = {
    "test",
    "tests",
    "__pycache__",
    "site-packages",
    "dist-packages",
    "idlelib",
    "tkinter",
    "ensurepip",
}

PROGRAM = """
import json, os, pathlib, sys, tempfile
from tfdist.cluster.environments import detect_cluster

def may_write(folder):
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return True
    except OSError:
        return False

cluster = detect_cluster(os.environ)
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "task": str(cluster.task),
    "address": cluster.address(cluster.task),
    "host": os.uname().nodename,
    "user": os.getuid(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "seccomp": int(status["Seccomp"]),
    "may_gain": status["NoNewPrivs"].strip() == "0",
    "writes": [folder for folder in ("/", "/app", "/tmp", os.path.expanduser("~")) if may_write(folder)],
    "token": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount"),
    "arguments": sys.argv[1:],
}))
sys.exit(7)
"""


class Podman:
    """podman with storage of its own, all of it in one folder."""

    def __init__(self, folder):
        self._folder = folder
        # As many open files as we may have: podman would ask for more, and be refused in a container.
        (folder / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
        )

    def run(self, *words, check=True, stdin=subprocess.DEVNULL):
        done = subprocess.run(
            ["podman", f"--root={self._folder}/root", f"--runroot={self._folder}/run", "--runtime=runc",
             "--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none", *words],
            env={**os.environ, "CONTAINERS_CONF": f"{self._folder}/containers.conf"},
            stdin=stdin, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done


@pytest.fixture(scope="module")
def podman():
    missing = [program for program in ("podman", "runc", "catatonit") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"a pod needs root and {', '.join(missing) or 'nothing else'} (Debian's packages of these names)"
        )
    folder = Path(tempfile.mkdtemp(prefix="pod"))  # podman refuses a path of more than 50 characters
    podman = Podman(folder)
    with tarfile.open(folder / "image.tar", "w") as image:
        add_python(image)
        image.add(REPOSITORY / "tfdist", "app/tfdist", filter=is_wanted)
        (folder / "program.py").write_text(PROGRAM)
        image.add(folder / "program.py", "app/program.py")
        for name in ("tmp", "app"):  # only the read-only file system keeps a pod from writing to /app
            add_folder(image, name, 0o1777)
    try:
        with open(folder / "image.tar", "rb") as image:
            podman.run(
                "import", "--change=ENV PATH=/bin", "--change=ENV PYTHONPATH=/app", "-", IMAGE, stdin=image
            )
        yield podman
    finally:
        podman.run("pod", "rm", "--all", "--force", "--time=0", check=False)
        shutil.rmtree(folder)


def is_wanted(item):
    return None if LEFT_OUT & set(Path(item.name).parts) else item


def add_folder(image, name, mode):
    item = tarfile.TarInfo(name)
    item.type, item.mode = tarfile.DIRTYPE, mode
    image.addfile(item)


def add_python(image):
    """Puts this very Python into an image, where it lies here, and `python` on its PATH."""
    python = Path(sys.executable).resolve()
    standard = sysconfig.get_paths()["stdlib"]
    binaries = [str(python), *map(str, Path(standard, "lib-dynload").glob("*.so"))]
    linked = subprocess.run(["ldd", *binaries], capture_output=True, text=True, timeout=60).stdout
    for path in {str(python), *re.findall(r"(/\S+) \(0x", linked)}:
        # A link's target, since the folders on the way may be links themselves.
        image.add(os.path.realpath(path), path[1:])
    for folder in reversed(
        python.parents[:-1]
    ):  # in which user 1000 would find nothing, if it is root's home
        add_folder(image, str(folder)[1:], 0o755)
    image.add(standard, standard[1:], filter=is_wanted)
    link = tarfile.TarInfo("bin/python")
    link.type, link.linkname = tarfile.SYMTYPE, str(python)
    image.addfile(link)


def build_pod(job, index):
    """What the Job's controller makes of its template, and the kubelet of references to variables."""
    template = job["spec"]["template"]
    spec = json.loads(json.dumps(template["spec"]))
    container = spec["containers"][0]
    known = {"JOB_COMPLETION_INDEX": str(index)}

    def expand(text):
        return re.sub(r"\$\$|\$\((\w+)\)", lambda match: "$" if match[0] == "$$" else known[match[1]], text)

    container["command"] = [expand(word) for word in container["command"]]
    for variable in container["env"]:
        if "value" in variable:
            variable["value"] = expand(variable["value"])
    name = f"{job['metadata']['name']}-{index}"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": template["metadata"]["labels"],
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        },
        "spec": {**spec, "hostname": name},
    }


def test_rendered_pod_knows_its_task_and_may_do_little(podman, tmp_path):
    words = ["--kubernetes", f"--image={IMAGE}", "--num_workers=3", "/app/program.py", "$(PATH)", "$$"]
    flags = parse_flags(words, {})
    *_, job = yaml.safe_load_all(flags.backend.render(flags.job, flags.place))
    pod = tmp_path / "pod.yaml"
    pod.write_text(yaml.safe_dump(build_pod(job, 2)))
    podman.run("play", "kube", "--network=none", str(pod))
    code = podman.run("wait", "tfdist-2-task").stdout.strip()
    logs = podman.run("logs", "tfdist-2-task")
    assert code == "7", logs.stderr
    assert json.loads(logs.stdout) == {
        "task": "worker:2",
        "address": "tfdist-2.tfdist:2222",
        "host": "tfdist-2",
        "user": 1000,
        "capabilities": 0,
        "seccomp": 2,  # a filter
        "may_gain": False,
        "writes": ["/tmp", "/tmp"],
        "token": False,
        "arguments": ["$(PATH)", "$$"],
    }


@pytest.fixture
def named_hosts():
    """Two hosts that know each other by the names that a headless Service gives to the pods of a Job."""
    with two_hosts() as hosts:
        names = "".join(f"{address} tfdist-{i}.tfdist\n" for i, address in enumerate(ADDRESSES))
        folders = [
            Path("/etc/netns", host.name) for host in hosts
        ]  # where `ip netns exec` looks for /etc/hosts
        try:
            for folder in folders:
                folder.mkdir(parents=True)
                (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            yield hosts
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("strategy", "flags"),
    [
        ("pipeline", ["--recipe=text_lm", "--tensor_parallel=2"]),
        pytest.param("multiworker", [], marks=pytest.mark.everything),
    ],
)
def test_program_of_a_rendered_job_trains(named_hosts, tmp_path, strategy, flags):
    """Outside of containers, whose image has no TensorFlow, but with the pods' commands, variables and names."""
    train = [
        "-m",
        "tfdist.train",
        *flags,
        "--epochs=1",
        "--steps_per_epoch=2",
        "--verbose=2",
        "--run_dir=run",
    ]
    words = ["--kubernetes", "--image=i", "--num_workers=2", f"--strategy={strategy}", *train]
    parsed = parse_flags(words, {})
    *_, job = yaml.safe_load_all(parsed.backend.render(parsed.job, parsed.place))
    processes = []
    for index, host in enumerate(named_hosts):
        (container,) = build_pod(job, index)["spec"]["containers"]
        env = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
        python, *rest = container["command"]
        assert python == "python"
        process = subprocess.Popen(
            host.command(sys.executable, *rest),
            cwd=tmp_path,
            env={**os.environ, **env, "JOB_COMPLETION_INDEX": str(index), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "".join(outputs)[-4000:]
    assert f"under {strategy}" in outputs[0] and "the run is in run" in outputs[0]
