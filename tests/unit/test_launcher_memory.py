"""Which killed task was out of memory, told from a system's files of both kinds; the tasks are real processes."""

import contextlib
import sys
import time

import pytest

from tfdist.cluster.spec import Task
from tfdist.launcher.process.children import Child
from tfdist.launcher.process.logs import TaskOutput
from tfdist.launcher.process.memory import MemoryWatch

V1 = {"proc/self/cgroup": "4:memory:/job\n0::/\n", "limit": "memory/job/memory.limit_in_bytes"}
V1 |= {"count": "memory/job/memory.oom_control", "words": "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"}
V2 = {"proc/self/cgroup": "0::/job\n", "limit": "job/memory.max", "count": "job/memory.events"}
V2 |= {"words": "low 0\noom 3\noom_kill {}\noom_group_kill 0\n"}
CONTAINER = V2 | {"proc/self/cgroup": "0::/kubepods/pod1\n", "limit": "memory.max", "count": "memory.events"}
HOLD = "import os, signal, sys; held = bytearray(60_000_000); print(1, flush=True); sys.stdin.read() or "
KILLED = HOLD + "__import__('time').sleep(0.5) or os.kill(os.getpid(), signal.SIGKILL)"


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def system(root, kind, *, limit):
    """Writes a system's files, with the real processes."""
    write(root, "proc/self/cgroup", kind["proc/self/cgroup"])
    write(root, f"sys/fs/cgroup/{kind['limit']}", f"{limit}\n")
    write(root, f"sys/fs/cgroup/{kind['count']}", kind["words"].format(2))
    return MemoryWatch(root)


@contextlib.contextmanager
def ended(watch, root, code=KILLED):
    """A task that has ended, looked at while it lived."""
    with contextlib.closing(TaskOutput(Task(type="worker", index=1), None)) as output:
        child = Child(output, [sys.executable, "-c", code], {})
        try:
            assert child.process.stdout.read(1) == b"1"
            (root / f"proc/{child.process.pid}").symlink_to(f"/proc/{child.process.pid}")
            watch.look([child])
            while not child.poll():
                time.sleep(0.01)
            yield child
        finally:
            child.reap()


@pytest.mark.parametrize("kind", [V1, V2, CONTAINER], ids=["v1", "v2", "container"])
def test_counted_kill_is_named_with_peak_and_limit(tmp_path, kind):
    watch = system(tmp_path, kind, limit=8_000_000_000)
    with ended(watch, tmp_path) as child:
        write(tmp_path, f"sys/fs/cgroup/{kind['count']}", kind["words"].format(3))
        assert watch.explain(child) == "was killed by SIGKILL: out of memory (peak 0.1 GB of 8.0 GB)"
        # The count is used up: the next task that is killed needs one of its own.
        assert watch.explain(child) == ""


def test_peak_near_the_limit_counts_where_nobody_counts(tmp_path):
    watch = system(tmp_path, V2, limit=60_000_000)
    with ended(watch, tmp_path) as child:
        assert watch.explain(child).startswith("was killed by SIGKILL: out of memory (peak 0.1 GB of 0.1 GB)")


def test_killed_by_somebody_is_not_out_of_memory(tmp_path):
    watch = system(tmp_path, V2, limit=8_000_000_000)
    with ended(watch, tmp_path) as child:
        assert watch.explain(child) == ""


def test_other_ends_are_not_out_of_memory(tmp_path):
    watch = system(tmp_path, V2, limit=60_000_000)
    with ended(watch, tmp_path, HOLD + "__import__('time').sleep(0.5)") as child:
        write(tmp_path, f"sys/fs/cgroup/{V2['count']}", V2["words"].format(3))
        assert child.exit_code == 0 and watch.explain(child) == ""


def test_machine_is_the_limit_without_a_group(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal:       60000 kB\n")
    watch = MemoryWatch(tmp_path)
    with ended(watch, tmp_path) as child:
        assert "out of memory (peak 0.1 GB of 0.1 GB)" in watch.explain(child)
    assert MemoryWatch(tmp_path / "nothing").explain(child) == ""
