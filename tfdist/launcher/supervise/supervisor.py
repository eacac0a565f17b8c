"""Watches the processes of a job: sees them end, freeze and hang, and decides what follows."""

import signal
import time

from tfdist.cluster.heartbeat import DUMP_SIGNAL
from tfdist.cluster.spec import Cluster
from tfdist.errors import PEER_LOST_CODE
from tfdist.launcher.job import Job
from tfdist.launcher.process.children import Child
from tfdist.launcher.process.logs import log_path
from tfdist.launcher.process.memory import MemoryWatch
from tfdist.launcher.ssh.executors import LOST_HOST_SECS
from tfdist.launcher.supervise.chaos import CUT, SIGNALS, Chaos, Failure
from tfdist.launcher.supervise.processes import Processes, is_no_fault, killed_by, render_exit
from tfdist.launcher.supervise.recovery import Recovery
from tfdist.launcher.supervise.restarts import Restarts
from tfdist.launcher.supervise.watch import FROZEN_SECS, Watch

# For the workers and ps of a ps job whose chief is gone: they never return by themselves.
SERVER_GRACE_SECS = 1.0
SETTLE_SECS = 60.0  # after this long, workers that outlive their peers are mentioned
# Before a restart. What the others could save then is what they share: only a file may be half-written.
_RESTART_GRACE_SECS = 0.3
# How long the end of the peer that others have lost may take to be seen; that of a host takes longer.
_ECHO_SECS = 5.0
_DUMP_SECS = 1.0  # for the stacks of a task that hangs to reach its log
_LOOK_SECS = 0.5  # between two looks at the tasks' records
_FAILED_LOOK_SECS = 0.05  # while a failure is being got over
_CHAOS_LOOK_SECS = 0.005
_POLL_SECS = 0.02  # only where the system cannot wake us when a process ends


# Wide: what may end a job, each with what must be remembered of it.
class Supervisor:
    """Starts a job's processes and stays until all have ended.

    The job ends well when every task has ended with 0, or in a ps job when the chief has. It fails with the first
    task that ends otherwise, unless this process had asked for the end already or `Recovery` knows how to go on; then
    all the others are stopped.
    """

    def __init__(
        self,
        job: Job,
        cluster: Cluster,
        processes: Processes,
        recovery: Recovery,
        *,
        restarts: Restarts,
        watch: Watch,
        chaos: Chaos,
    ) -> None:
        self.is_rescaling = False
        self._job = job
        self._cluster = cluster
        self._processes = processes
        self._recovery = recovery
        self._restarts = restarts
        self._watch = watch
        self._chaos = chaos
        self._memory = MemoryWatch()
        self._told_by: signal.Signals | None = None
        self._stop_signal: signal.Signals | None = None
        self._kill_at = self._last_exit_at = float("inf")
        self._next_look = 0.0
        self._echo: Child | None = None
        self._echo_until = self._dump_until = float("inf")

    def run(self) -> int:
        """Runs the job to its end.

        Returns:
            The exit code of the job: 0, that of the first task that failed (128 + n for signal n), or 128 + n if
            this process was told to end by signal n.

        Raises:
            ConfigError: If the run_dir cannot be written.
            LaunchError: If a process cannot be started.
        """
        with self._processes:
            for task in self._cluster.tasks:
                self._watch.forget(task)
                self._processes.start(task, {})
            while self._processes.alive:
                self._step()
            self._processes.speaker = self._cause or self._echo
        code = self._report()
        self._processes.note(f"ended with code {code}", kind="end", exit_code=code)
        return code

    @property
    def is_worth_a_restart(self) -> bool:
        """Whether the job failed by no fault of its program, nobody having asked for its end, and may try again."""
        return is_no_fault(self._cause) and self._told_by is None and self._restarts.has_left

    @property
    def num_lost(self) -> int:
        """How many workers died."""
        return self._recovery.num_lost

    @property
    def _cause(self) -> Child | None:
        """The first task to fail; its lines alone are shown from then on."""
        return self._processes.speaker

    def _step(self) -> None:
        ended = self._processes.wait(self._wait_secs())
        now = time.monotonic()
        for child in sorted(ended, key=self._exit_order):
            self._note_exit(child, now)
        received = self._processes.received
        if self._stop_signal is None and (received or self._processes.display.broken):
            self._obey(received[0] if received else signal.SIGPIPE)
        elif received and self._told_by is None:
            self._kill()  # the tasks are being stopped anyway: the person at the keyboard is tired of waiting
        if self._stop_signal is not None:
            self._ask_to_end(self._stop_signal)
        if now >= self._kill_at:
            self._kill()
        if now >= self._next_look and self._stop_signal is None:
            self._next_look = now + self._look_secs
            self._look(now)
        if now - self._last_exit_at > SETTLE_SECS:
            self._last_exit_at = float("inf")
            alive = ", ".join(str(child.task) for child in self._processes.alive)
            self._processes.say(
                f"{alive} still run {SETTLE_SECS:g} s after the others ended; Ctrl-C ends them"
            )

    def _wait_secs(self) -> float:
        if not self._processes.can_wake:
            return _POLL_SECS
        return max(0.0, min(self._look_secs, self._kill_at - time.monotonic()))

    @property
    def _look_secs(self) -> float:
        if not self._chaos.is_over:
            return _CHAOS_LOOK_SECS
        return _LOOK_SECS if self._restarts.failed_at is None else _FAILED_LOOK_SECS

    def _look(self, now: float) -> None:
        """Does what time and the tasks' records ask for."""
        alive = self._processes.alive
        self._memory.look(alive)
        for failure in self._chaos.take_due(self._watch.read, self._cluster, now):
            self._make(failure, alive, now)
        self._look_for_told(alive)
        if self._echo is not None and now >= self._echo_until:
            self._fail(self._echo, now)
        if now >= self._dump_until:
            self._stop(signal.SIGKILL, 0)
        elif self._dump_until == float("inf"):
            self._look_for_stalls(alive, now)
        if self._stop_signal is None and self._recovery.look(now):
            self.is_rescaling = True
            self._processes.say("saving, to go on with all workers")
            self._stop(signal.SIGTERM, self._job.grace_secs)

    def _make(self, failure: Failure, alive: list[Child], now: float) -> None:
        for child in alive:
            if child.task == failure.task:
                self._processes.say(f"chaos: {failure}", kind="chaos", task=str(child.task))
                self._restarts.failed_at = now
                if failure.action == CUT:
                    child.cut()
                else:
                    child.signal_group(SIGNALS[failure.action])

    def _look_for_told(self, alive: list[Child]) -> None:
        """Lets the job end, or go on without it, where SIGTERM came to a task that only serves."""
        for child in alive:
            if self._watch.state(child.task) != "told" or self._stop_signal is not None:
                continue
            if self._recovery.may_spare(child):
                self._recovery.let_go(child, "was told to go")
            else:
                self._obey(signal.SIGTERM)

    def _look_for_stalls(self, alive: list[Child], now: float) -> None:
        for child in self._watch.find_frozen(alive, now):
            child.fault = f"was stopped for {FROZEN_SECS:g} s, and killed"
            child.signal_group(signal.SIGKILL)
        hung = self._watch.find_hung(alive, now)
        if hung is None:
            return
        what = f"made no step for {self._watch.patience_secs(self._watch.read(hung.task)):g} s"
        self._processes.say(f"{hung.task} {what}; its stacks go to its log")
        hung.fault = f"{what}, and was killed"
        self._processes.speaker = hung
        self._recovery.note_failure(now)
        self._dump_until = now + _DUMP_SECS
        for child in alive:
            if self._watch.read(child.task) is not None:  # which says that it knows the signal
                child.send(DUMP_SIGNAL)

    def _exit_order(self, child: Child) -> tuple[bool, bool]:
        """Orders ends that were seen in the same moment, on a busy machine, from likely cause to likely echo."""
        is_good_end = self._job.has_chief and child.task.type == "chief" and child.exit_code == 0
        is_killed = killed_by(child.exit_code or 0) is not None
        return not is_good_end, not is_killed

    def _note_exit(self, child: Child, now: float) -> None:
        child.fault = child.fault or self._memory.explain(child)
        beat = self._watch.read(child.task)
        step = (beat and beat.step) or None
        self._note(child, "exit", f" at step {step}" if step else "", step=step)
        if self._stop_signal is not None or self._cause is not None or self._recovery.survives(child, now):
            return
        if child.exit_code == PEER_LOST_CODE:
            # Somebody else's end is the cause, and may be seen only after its echo: leaving takes TensorFlow seconds.
            if self._echo is None:
                self._echo = child
                self._echo_until = now + (LOST_HOST_SECS if self._job.hosts else _ECHO_SECS)
        elif child.exit_code != 0:
            self._fail(child, now)
        elif not self._job.has_chief:
            self._last_exit_at = now
        elif child.task.type == "chief":
            self._stop(signal.SIGTERM, SERVER_GRACE_SECS)

    def _fail(self, child: Child, now: float) -> None:
        self._processes.speaker = child
        self._recovery.note_failure(now)
        if self._processes.alive:
            self._processes.say(f"{child.task} {render_exit(child)}; stopping the others")
        self._stop(signal.SIGTERM, _RESTART_GRACE_SECS if self.is_worth_a_restart else self._job.grace_secs)

    def _obey(self, number: signal.Signals) -> None:
        self._told_by = number
        if number == signal.SIGPIPE:  # nobody reads our output any more, as after `| head`
            self._stop(signal.SIGTERM, self._job.grace_secs)
            return
        self._processes.say(
            f"{number.name}: asking the tasks to end (up to {self._job.grace_secs:g} s; "
            "another signal kills them at once)"
        )
        self._stop(number, self._job.grace_secs)

    def _stop(self, number: signal.Signals, grace_secs: float) -> None:
        self._stop_signal = number
        self._kill_at = time.monotonic() + grace_secs

    def _ask_to_end(self, number: signal.Signals) -> None:
        """Passes the signal on; in a ps job to the chief first, which may need the servers to save its work."""
        alive = self._processes.alive
        chief: list[Child] = []
        if self._job.has_chief:
            chief = [child for child in alive if child.task.type == "chief"]
            if not chief:
                self._kill_at = min(self._kill_at, time.monotonic() + SERVER_GRACE_SECS)
        for child in chief or alive:
            if not child.asked_to_end:
                child.asked_to_end = True
                # A server without a chief has nothing to save, and would wait for the chief that it tells of SIGTERM.
                is_idle_server = self._watch.state(child.task) == "started" and self._job.has_chief
                child.signal_group(signal.SIGKILL if is_idle_server and not chief else number)

    def _kill(self) -> None:
        self._kill_at = float("inf")
        self._processes.kill()

    def _report(self) -> int:
        """Shows the first cause, as the last thing, and gives the job's exit code."""
        cause, processes = self._cause, self._processes
        if cause is None or cause.exit_code is None:
            return 128 + self._told_by if self._told_by else 0
        if processes.num_hidden and self._job.run_dir:
            processes.say(
                f"{processes.num_hidden} later lines of the other tasks are in {self._job.run_dir}/logs"
            )
        tail = list(cause.output.tail)
        # A mistake in the settings is one line: once is enough.
        is_said = cause.exit_code == 2 and tail and tail[-1] == processes.display.last_shown
        if tail and not is_said:
            processes.say(f"the last lines of {cause.task}, the first task to fail:")
            processes.display.show(cause.task, "stderr", tail)
        end = f"; whole output: {log_path(self._job.run_dir, cause.task)}" if self._job.run_dir else ""
        if self.is_worth_a_restart:
            end += f"; starting all tasks again ({self._restarts.num_recent + 1} of {self._job.max_restarts})"
        self._note(cause, "verdict", end, say=True)
        return cause.exit_code

    def _note(self, child: Child, kind: str, end: str, *, say: bool = False, step: int | None = None) -> None:
        how = render_exit(child)
        write = self._processes.say if say else self._processes.note
        facts = {
            "kind": kind,
            "task": str(child.task),
            "how": how,
            "exit_code": child.exit_code,
            "step": step,
        }
        write(f"{child.task} {how}{end}", **facts)
