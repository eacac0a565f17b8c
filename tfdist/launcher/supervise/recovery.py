"""How a job goes on, in the same try, when some of its tasks have died: without them, with others, or as before."""

import signal
from collections.abc import Mapping

from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import PEER_LOST_CODE
from tfdist.launcher.job import RESTART_VARIABLE, Job
from tfdist.launcher.process.children import Child
from tfdist.launcher.process.memory import is_memory_short
from tfdist.launcher.supervise.elastic import ElasticCluster
from tfdist.launcher.supervise.processes import Processes, is_no_fault, render_exit
from tfdist.launcher.supervise.restarts import Restarts
from tfdist.launcher.supervise.watch import Watch


class Recovery:
    """Replaces single tasks of a ps job, and re-forms a sync job whose workers stay in their processes.

    Without `regrouping`, which forms clusters of the living, all start again when a worker of a sync job dies.
    """

    def __init__(
        self,
        job: Job,
        cluster: Cluster,
        processes: Processes,
        *,
        restarts: Restarts,
        watch: Watch,
        regrouping: ElasticCluster | None,
    ) -> None:
        self.num_lost = 0
        self._job = job
        self._cluster = cluster
        self._processes = processes
        self._restarts = restarts
        self._watch = watch
        self._regrouping = regrouping
        self._is_second_try = restarts.num_tries > 0
        self._returning: set[Child] = set()
        self._absent: list[Task] = []
        self._leaving: set[Child] = set()
        self._grows_at = float("inf")

    def note_failure(self, now: float) -> None:
        """Starts the clock that tells how long it took until the work went on."""
        if self._restarts.failed_at is None:
            self._restarts.failed_at = now
        ended = [child for child in self._processes.all if not child.is_alive]
        self.num_lost = max(1, sum(is_no_fault(child) for child in ended))

    def survives(self, child: Child, now: float) -> bool:
        """Does what lets the job go on without a task that has just ended; returns whether it goes on."""
        if not is_no_fault(child):
            return False
        if self._job.has_chief and self._may_replace(child):
            self._replace(child, now)
        elif self.may_spare(child):
            self._absent.append(child.task)
            self._processes.say(f"{child.task} {render_exit(child)}; {self._count_workers()} workers go on")
        elif self._regrouping is not None and self._may_regroup(self._regrouping, child):
            self._regroup(self._regrouping, child, now)
        else:
            return False
        return True

    def may_spare(self, child: Child) -> bool:
        """Says whether a ps job goes on without this worker: it may when it was given a least number of them."""
        num_others = self._count_workers() - child.is_alive
        least = self._restarts.min_workers
        is_elastic = self._job.has_chief and least < self._job.num_workers
        return is_elastic and child.task.type == "worker" and num_others >= least

    def let_go(self, child: Child, fault: str) -> None:
        """Kills a task without which the job goes on, or that is started again at once."""
        if child not in self._leaving:
            child.fault = fault
            self._leaving.add(child)
            self._processes.say(f"{child.task} {fault}")
            child.signal_group(signal.SIGKILL)

    def look(self, now: float) -> bool:
        """Does what the tasks' records ask for; returns whether all are to save and start again with more workers."""
        self._look_for_returns(now)
        if self._regrouping is not None:
            self._look_for_joiners(self._regrouping)
        if self._grows_at == float("inf") and self._wants_to_grow:
            self._grows_at = now + (self._job.rescale_every_secs or 0)
        if now < self._grows_at:
            return False
        self._grows_at = float("inf")
        if not self._job.has_chief:
            return True
        for task in self._absent:
            self._processes.say(f"starting {task} again, to go on with all workers")
            self._start(task, {})
        self._absent.clear()
        return False

    @property
    def _wants_to_grow(self) -> bool:
        """Whether there are fewer workers than asked for, and they work: before that there is nothing to save."""
        is_shrunk = self._restarts.is_shrunk or (self._job.has_chief and bool(self._absent))
        if not is_shrunk or self._job.rescale_every_secs is None:
            return False
        return self._watch.state(self._cluster.chief) == "working"

    def _look_for_returns(self, now: float) -> None:
        """Says when those who were started again are back at work."""
        if self._restarts.failed_at is None or not self._are_back:
            return
        who = ", ".join(sorted(str(child.task) for child in self._returning))
        what = "training goes on" if self._waits_for_steps else f"{who} is back"
        self._processes.say(f"{what} {now - self._restarts.failed_at:.1f} s after the failure")
        self._restarts.failed_at = None
        if self._regrouping is None:
            self._returning.clear()
        else:
            self._start_absent(self._regrouping)  # not before: starting takes the cores that the others need

    @property
    def _waits_for_steps(self) -> bool:
        has_chief = any(child.task.type == "chief" for child in self._returning)
        return self._is_second_try or has_chief or self._regrouping is not None

    @property
    def _loses_chief(self) -> bool:
        """Whether a chief was killed that is not started again yet."""
        return any(child.task.type == "chief" for child in self._leaving)

    @property
    def _are_back(self) -> bool:
        if self._regrouping is not None and not self._is_second_try:
            return self._regrouping.is_at_work(self._processes.alive)
        if self._loses_chief:
            return False
        if self._waits_for_steps:
            return any(self._watch.state(child.task) == "working" for child in self._processes.alive)
        return bool(self._returning) and all(self._watch.state(child.task) for child in self._returning)

    def _may_replace(self, child: Child) -> bool:
        # Its host may be away for long, and a cluster's addresses are fixed: elsewhere all start again.
        if child.has_lost_host and self._processes.has_room:
            return False
        if child.task.type == "worker":
            return child not in self._leaving and self._restarts.has_left
        if child in self._leaving:
            return True
        # The ps keep a dead chief's variables for about ten minutes, and get the new one's beside them.
        servers = [other.process.pid for other in self._processes.alive if other.task.type == "ps"]
        return self._restarts.has_left and not is_memory_short(servers)

    def _replace(self, child: Child, now: float) -> None:
        """Starts a ps job's task again on its own port, and keeps the others.

        While a worker is away the chief gives its work to the others. With a ps its variables are gone: the chief
        starts again too, from the checkpoint, and finds the workers and the other ps as they were.
        """
        if child in self._leaving:
            self._leaving.remove(child)
        else:
            self._use_restart(child, "starting it again", now)
        if child.task.type == "ps":
            for other in self._processes.alive:
                if other.task.type == "chief":
                    self.let_go(other, f"is started again too, since {child.task} took the variables along")
        self._returning.add(self._start(child.task, {}))

    def _may_regroup(self, regrouping: ElasticCluster, child: Child) -> bool:
        if child.exit_code == PEER_LOST_CODE or not self._restarts.has_left:
            return False
        return child in self._returning or regrouping.can_lose_one(self._members)

    @property
    def _members(self) -> list[Child]:
        return [child for child in self._processes.alive if child not in self._returning]

    def _regroup(self, regrouping: ElasticCluster, child: Child, now: float) -> None:
        """Lets the living go on in their processes; the dead one is started again to join them."""
        self._use_restart(child, "the others go on, and it is started again", now)
        if child not in self._returning:
            regrouping.lose(self._members)
        self._returning.discard(child)
        self._absent.append(child.task)
        if len(self._members) < self._restarts.min_workers:
            self._start_absent(regrouping)

    def _start_absent(self, regrouping: ElasticCluster) -> None:
        for task in self._absent:
            self._returning.add(self._start(task, regrouping.render_env(task, is_joining=True)))
        self._absent.clear()

    def _look_for_joiners(self, regrouping: ElasticCluster) -> None:
        if regrouping.has_joiners(self._returning, self._processes.alive):
            who = ", ".join(sorted(str(child.task) for child in self._returning))
            self._processes.say(f"{who} joins the others")
            self._returning.clear()
            regrouping.admit(self._processes.alive)

    def _use_restart(self, child: Child, what: str, now: float) -> None:
        self._restarts.use()
        self.note_failure(now)
        count = f"{self._restarts.num_recent} of {self._job.max_restarts}"
        self._processes.say(f"{child.task} {render_exit(child)}; {what} ({count})")

    def _start(self, task: Task, extra_env: Mapping[str, str]) -> Child:
        self._watch.forget(task)
        return self._processes.start(
            task, {RESTART_VARIABLE: str(self._restarts.num_tries)} | dict(extra_env)
        )

    def _count_workers(self) -> int:
        return sum(child.task.type == "worker" for child in self._processes.alive)
