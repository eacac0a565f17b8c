"""Who belongs to a cluster that changes while its processes live: a small file that the launcher writes anew."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import ClusterError

VARIABLE = "TFDIST_MEMBERS"  # Where the file is.
PLACE_VARIABLE = "TFDIST_PLACE"  # This process's place in it, which it keeps, whatever its index.
JOINS_VARIABLE = "TFDIST_JOINS"  # For a process that comes later: the generation after which it may join.
_POLL_SECS = 0.02


def write_members(path: str, generation: int, addresses: Mapping[int, str]) -> None:
    """Makes a generation of a cluster known; a reader sees the whole of it or the one before.

    Args:
        path: The file.
        generation: Counts up from 1; 0 is the cluster that everybody was started with.
        addresses: Place → `host:port`.
    """
    new = Path(f"{path}.new")
    new.write_text(json.dumps({"generation": generation, "addresses": dict(sorted(addresses.items()))}))
    os.replace(new, path)


class Membership:
    """What a process knows of its cluster's members.

    Args:
        path: The launcher's file.
        place: This process's place.
        generation: The one that it belongs to, or after which it may join.
        is_joining: Whether the others are already at work.
    """

    def __init__(self, path: str, place: int, *, generation: int = 0, is_joining: bool = False) -> None:
        self.generation = generation
        self.is_joining = is_joining
        self.rank = place
        self.num_members = 0
        self._path = path
        self._place = place

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Membership | None:
        """Returns what the launcher has told; None where the cluster does not change."""
        if VARIABLE not in environ:
            return None
        joins = environ.get(JOINS_VARIABLE)
        return cls(
            environ[VARIABLE],
            int(environ[PLACE_VARIABLE]),
            generation=int(joins or 0),
            is_joining=joins is not None,
        )

    @property
    def has_news(self) -> bool:
        """Whether the cluster is to be formed anew; one `stat` as long as it is not."""
        if not os.path.exists(self._path):
            return False
        return self._read()[0] > self.generation

    def wait_for_cluster(self, *, timeout_secs: float) -> Cluster:
        """Waits for a later generation with this process in it, and becomes its member.

        Raises:
            ClusterError: If none comes in time.
        """
        deadline = time.monotonic() + timeout_secs
        while time.monotonic() < deadline:
            if os.path.exists(self._path):
                generation, addresses = self._read()
                if generation > self.generation and self._place in addresses:
                    self.generation = generation
                    self.rank, self.num_members = sorted(addresses).index(self._place), len(addresses)
                    hosts = tuple(addresses[place] for place in sorted(addresses))
                    return Cluster(addresses={"worker": hosts}, task=Task("worker", self.rank))
            time.sleep(_POLL_SECS)
        raise ClusterError(
            f"no new cluster within {timeout_secs:g} s after generation {self.generation}; start the run again"
        )

    def _read(self) -> tuple[int, dict[int, str]]:
        values = json.loads(Path(self._path).read_text())
        return values["generation"], {int(place): address for place, address in values["addresses"].items()}
