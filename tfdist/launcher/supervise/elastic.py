"""A sync job whose living workers form a new cluster when one dies, and another when it is back."""

from collections.abc import Callable, Iterable, Sequence

from tfdist.cluster.membership import JOINS_VARIABLE, PLACE_VARIABLE, VARIABLE, write_members
from tfdist.cluster.spec import Task
from tfdist.launcher.process.children import Child
from tfdist.launcher.supervise.watch import Watch


class ElasticCluster:
    """Says who belongs to the cluster, one generation after the other.

    Args:
        watch: Reads the tasks' records.
        path: The file that the members read.
        reserve: Gives so many free ports: TensorFlow does not come up again on those of a cluster that died.
        min_members: With fewer the living wait for the others to be back.
    """

    def __init__(
        self, watch: Watch, *, path: str, reserve: Callable[[int], Sequence[int]], min_members: int
    ) -> None:
        self._watch = watch
        self._path = path
        self._reserve = reserve
        self._min_members = min_members
        self._generation = 0
        self._begun: dict[Task, int] = {}

    def render_env(self, task: Task, *, is_joining: bool = False) -> dict[str, str]:
        """Returns what a member must know."""
        env = {VARIABLE: self._path, PLACE_VARIABLE: str(task.index)}
        return env | ({JOINS_VARIABLE: str(self._generation)} if is_joining else {})

    def can_lose_one(self, alive: Iterable[Child]) -> bool:
        """Says whether the living are all at work, so that they bring their state along."""
        states = [self._watch.state(child.task) for child in alive]
        return bool(states) and all(state in ("working", "busy") for state in states)

    def lose(self, alive: Sequence[Child]) -> None:
        """Lets the living go on without the one that died, if they are enough."""
        self._generation += 1
        if len(alive) >= self._min_members:
            self._write(alive)

    def has_joiners(self, joining: Iterable[Child], alive: Sequence[Child]) -> bool:
        """Says whether some are ready to join, and the others to take them in."""
        joining = list(joining)
        if not joining or any(self._watch.state(child.task) != "waiting" for child in joining):
            return False
        members = [child for child in alive if child not in joining]
        return all(self._watch.state(child.task) == "working" for child in members)

    def admit(self, alive: Sequence[Child]) -> None:
        """Lets all who live form the next cluster."""
        self._generation += 1
        self._write(alive)

    def is_at_work(self, alive: Iterable[Child]) -> bool:
        """Says whether the members of the last generation make steps again."""
        for child in alive:
            beat = self._watch.read(child.task)
            begun = self._begun.get(child.task)
            # Its record begins anew when it joins a cluster.
            if beat is not None and beat.state == "working" and begun is not None and beat.begun != begun:
                return True
        return False

    def _write(self, members: Sequence[Child]) -> None:
        beats = {child.task: self._watch.read(child.task) for child in members}
        self._begun = {task: beat.begun for task, beat in beats.items() if beat is not None}
        ports = self._reserve(len(members))
        addresses = {
            child.task.index: f"127.0.0.1:{port}" for child, port in zip(members, ports, strict=True)
        }
        write_members(self._path, self._generation, addresses)
