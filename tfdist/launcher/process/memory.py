"""Memory: whether a task was killed for want of it, and whether there is enough for another copy."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path

from tfdist.launcher.process.children import Child

# Where nobody counts such kills, a process this close to the limit is taken for one.
_NEAR = 0.95
# What cgroup v1 writes for "no limit" is the largest number of pages.
_UNLIMITED = 2**60


class MemoryWatch:
    """Remembers how much memory tasks have held: of a process that has ended the system says it no more.

    Args:
        root: Above `proc` and `sys`.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._folder = _find_cgroup(root)
        self._peaks: dict[int, int] = {}
        self._num_kills = self._count_kills()

    def look(self, children: Iterable[Child]) -> None:
        """Notes the most that each living task has held so far; to be called now and then."""
        for child in children:
            pid = child.process.pid
            if peak := _read_bytes(self._root / f"proc/{pid}/status", "VmHWM"):
                self._peaks[pid] = peak

    def explain(self, child: Child) -> str:
        """Says that a task that has ended was out of memory, "" if it was not or nobody knows."""
        if child.exit_code != 128 + signal.SIGKILL:
            return ""
        num_kills, before = self._count_kills(), self._num_kills
        self._num_kills = num_kills
        limit, peak = self.limit_bytes, self._peaks.get(child.process.pid, 0)
        if num_kills <= before and not (limit and peak >= _NEAR * limit):
            return ""
        numbers = f" (peak {peak / 1e9:.1f} GB of {limit / 1e9:.1f} GB)" if limit and peak else ""
        return f"was killed by SIGKILL: out of memory{numbers}"

    def _count_kills(self) -> int:
        files = [self._folder / name for name in ("memory.events", "memory.oom_control")]
        for path in (*files, self._root / "proc/vmstat"):
            if count := re.search(r"^oom_kill (\d+)$", _read(path), re.MULTILINE):
                return int(count[1])
        return 0

    @property
    def limit_bytes(self) -> int:
        """Returns what this job may hold: its control group's limit, else the machine's memory; 0 if unknown."""
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(self._folder / name).strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                return int(text)
        return _read_bytes(self._root / "proc/meminfo", "MemTotal") or 0


def read_available_bytes() -> int | None:
    """Returns how much memory can still be had here, by the machine and by its control group; None if unknown."""
    available = _read_bytes(Path("/proc/meminfo"), "MemAvailable")
    limit = MemoryWatch().limit_bytes
    return min(available, limit) if available is not None and limit else available


def is_memory_short(pids: Iterable[int]) -> bool:
    """Says whether the machine lacks the memory for what these processes hold, once more."""
    held = sum(_read_bytes(Path(f"/proc/{pid}/status"), "VmRSS") or 0 for pid in pids)
    available = _read_bytes(Path("/proc/meminfo"), "MemAvailable")
    return available is not None and held > available


def _find_cgroup(root: Path) -> Path:
    """Returns the folder of this process's control group for memory, of either version."""
    groups = _read(root / "proc/self/cgroup")
    for pattern, mount in ((r"^\d+:memory:(.*)$", "sys/fs/cgroup/memory"), (r"^0::(.*)$", "sys/fs/cgroup")):
        if group := re.search(pattern, groups, re.MULTILINE):
            # In a container the path may be the host's, and the group be what is mounted.
            folder = root / mount / group[1].lstrip("/")
            return folder if folder.is_dir() else root / mount
    return root / "sys/fs/cgroup"


def _read_bytes(path: Path, name: str) -> int | None:
    """Returns the amount that a file of the kernel's gives in kB behind a name; None if there is none."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _read(path), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # another system, or the process has just ended
        return ""
