"""What the launcher counts, reads and decides when tasks fail; no process is started here but by the last tests."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tfdist.cluster.heartbeat import Beat, Heartbeat, render_beat
from tfdist.cluster.spec import Task
from tfdist.errors import ConfigError
from tfdist.launcher.job import Job, build_cluster, parse_num_workers
from tfdist.launcher.process.children import read_stop_mark
from tfdist.launcher.process.memory import is_memory_short
from tfdist.launcher.supervise.chaos import Chaos, Failure, parse_chaos
from tfdist.launcher.supervise.elastic import ElasticCluster
from tfdist.launcher.supervise.processes import killed_by
from tfdist.launcher.supervise.recovery import Recovery
from tfdist.launcher.supervise.restarts import Restarts
from tfdist.launcher.supervise.watch import FIRST_STEP_SECS, FROZEN_SECS, Watch

PS_CLUSTER = build_cluster(Job(command=["true"], num_workers=2, num_ps=1), range(1, 5))


class FakeChild:
    """A task with somebody else's process: only its id is looked at."""

    def __init__(self, task, pid=1):
        self.task = task
        self.process = type("Process", (), {"pid": pid})()

    @property
    def stop_mark(self):
        return read_stop_mark(self.process.pid)


@pytest.mark.parametrize(("text", "found"), [("4", (None, 4)), ("2:4", (2, 4)), ("4:4", (4, 4))])
def test_num_workers_may_be_a_range(text, found):
    assert parse_num_workers(text) == found


@pytest.mark.parametrize("text", ["", "two", "1:2:3", ":4", "2:", "-1", "1.5"])
def test_malformed_num_workers_is_refused(text):
    with pytest.raises(ConfigError, match="least:most"):
        parse_num_workers(text)


def test_least_above_most_is_refused():
    with pytest.raises(ConfigError, match="least:most"):
        Job(command=["true"], num_workers=2, min_workers=3)


def test_ps_that_is_back_before_its_chief_does_not_end_the_failure():
    """Its chief was killed with it: training goes on when that one's successor works, whoever comes first."""
    said, states, started = [], {}, []

    def start(task, env):
        started.append(RecoveringChild(task))
        return started[-1]

    chief, ps = RecoveringChild(Task("chief", 0)), RecoveringChild(Task("ps", 0), exit_code=137)
    processes = SimpleNamespace(all=[chief, ps], alive=[chief], say=said.append, start=start, has_room=False)
    watch = SimpleNamespace(state=states.get, forget=lambda task: states.pop(task, None))
    job = Job(command=["true"], num_workers=2, num_ps=1, max_restarts=3)
    recovery = Recovery(job, PS_CLUSTER, processes, restarts=Restarts(job), watch=watch, regrouping=None)
    states[chief.task] = "working"
    assert recovery.survives(ps, 10.0)
    processes.alive, states[ps.task] = [chief, started[0]], "ready"
    recovery.look(10.1)
    chief.exit_code, processes.alive = 137, [started[0]]
    recovery.look(10.2)
    assert recovery.survives(chief, 10.3)
    processes.alive = started
    recovery.look(12.0)
    assert "after the failure" not in " ".join(said)
    states[chief.task] = "working"
    recovery.look(14.5)
    assert said[-1] == "training goes on 4.5 s after the failure"


class RecoveringChild(FakeChild):
    """One that has ended, or that is told to."""

    has_lost_host, fault = False, ""

    def __init__(self, task, exit_code=None):
        super().__init__(task)
        self.exit_code = exit_code

    @property
    def is_alive(self):
        return self.exit_code is None

    def signal_group(self, number):
        assert number == signal.SIGKILL


def test_restarts_count_within_the_window():
    clock = [0.0]
    restarts = Restarts(Job(command=["true"], max_restarts=2, restart_window_secs=100), now=lambda: clock[0])
    restarts.use()
    clock[0] = 60.0
    restarts.use()
    assert not restarts.has_left
    clock[0] = 101.0
    assert restarts.has_left and restarts.num_recent == 1


@pytest.mark.parametrize(
    ("least", "num_lost", "size"), [(None, 1, 4), (2, 1, 3), (2, 2, 2), (2, 3, 2), (2, 0, 4)]
)
def test_places_of_the_dead_stay_empty_once(least, num_lost, size):
    restarts = Restarts(Job(command=["true"], num_workers=4, min_workers=least))
    restarts.resize(num_lost=num_lost)
    assert restarts.num_workers == size and restarts.is_shrunk == (size < 4)


def test_chaos_is_read():
    found = parse_chaos("kill:worker:1@step=50, stop:ps@secs=2.5,term:chief:0@checkpoint", PS_CLUSTER)
    assert [str(failure) for failure in found] == [
        "kill:worker:1@step=50",
        "stop:ps:0@secs=2.5",
        "term:chief:0@checkpoint",
    ]
    assert parse_chaos("", PS_CLUSTER) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kill", "write it as"),
        ("burn:worker:1@step=1", "kill, stop, term"),
        ("kill:worker:1@noon", "start, step"),
        ("kill:worker:2@step=1", "worker:1"),
        ("kill:worker:1@step", "take a number"),
        ("kill:worker:1@end=3", "take a number"),
    ],
)
def test_malformed_chaos_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_chaos(text, PS_CLUSTER)


def test_connection_is_cut_only_where_there_is_one():
    (failure,) = parse_chaos("cut:worker:1@start", PS_CLUSTER, has_hosts=True)
    assert str(failure) == "cut:worker:1@start"
    with pytest.raises(ConfigError, match="no connection to cut on one machine; give --hosts"):
        parse_chaos("cut:worker:1@start", PS_CLUSTER)


def test_each_failure_comes_once_at_its_moment(tmp_path):
    chief, worker = Task("chief", 0), Task("worker", 1)
    beats = {}
    chaos = Chaos(
        parse_chaos(
            "kill:worker:1@start,kill:ps:0@step=5,stop:ps:0@secs=3,term:chief@checkpoint,kill:chief@end",
            PS_CLUSTER,
        ),
        run_dir=str(tmp_path),
        started_at=100.0,
    )

    def due(now=100.0):
        return [str(failure) for failure in chaos.take_due(beats.get, PS_CLUSTER, now)]

    assert due() == []
    beats[worker] = Beat(state="started")
    assert due() == ["kill:worker:1@start"]
    beats[chief] = Beat(state="working", step=4)
    assert due() == []
    beats[chief] = Beat(state="working", step=6)
    assert due() == ["kill:ps:0@step=5"]
    assert due(103.0) == ["stop:ps:0@secs=3"]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/.epoch-1.npz.tmp-7").touch()
    assert due() == ["term:chief:0@checkpoint"]
    assert not chaos.is_over
    beats[chief] = Beat(state="resting", step=6)
    assert due() == ["kill:chief:0@end"]
    assert chaos.is_over and due() == []


def test_worker_fails_after_its_own_step_and_not_after_anothers():
    first, second = Task("worker", 0), Task("worker", 1)
    cluster = build_cluster(Job(command=["true"], num_workers=2, strategy="multiworker"), range(1, 3))
    failures = parse_chaos("kill:worker:1@step=5", cluster)
    chaos = Chaos(failures, run_dir=None, started_at=0.0)
    beats = {first: Beat(state="working", step=5), second: Beat(state="working", step=4)}
    assert chaos.take_due(beats.get, cluster, 0.0) == []
    beats[second] = Beat(state="working", step=5)
    assert chaos.take_due(beats.get, cluster, 0.0) == failures


def test_task_that_makes_no_step_hangs_and_of_several_the_last_is_named(tmp_path):
    watch = Watch(str(tmp_path), hang_timeout_secs=10)
    children = [FakeChild(Task("worker", i)) for i in range(3)]

    def write(index, state, step):
        beat = Beat(state=state, step=step, num_beats=step)
        (tmp_path / f"worker-{index}").write_bytes(render_beat(beat))

    write(0, "working", 8)
    write(1, "working", 7)
    write(2, "resting", 1)
    assert watch.find_hung(children, 0.0) is None
    assert watch.find_hung(children, 9.9) is None
    assert watch.find_hung(children, 10.0) is children[1]
    write(1, "working", 8)
    assert watch.find_hung(children, 10.1) is children[0]
    patient = Watch(str(tmp_path), hang_timeout_secs=0)
    assert [patient.find_hung(children, now) for now in (0.0, 1e9)] == [None, None]


def test_task_that_evaluates_does_not_hang(tmp_path):
    """It makes no step, but beats."""
    watch, child = Watch(str(tmp_path), hang_timeout_secs=10), FakeChild(Task("worker", 0))
    heartbeat = Heartbeat(watch.path(child.task))
    heartbeat.beat(7)
    for now in (0.0, 9.0, 18.0):
        heartbeat.beat()
        assert watch.find_hung([child], now) is None
    assert watch.find_hung([child], 28.0) is child


def test_nobody_hangs_while_one_is_busy_between_two_steps(tmp_path):
    """A checkpoint or a callback of one, for which the others wait, takes as long as it takes."""
    watch = Watch(str(tmp_path), hang_timeout_secs=10)
    children = [FakeChild(Task("worker", i)) for i in range(2)]
    heartbeats = [Heartbeat(watch.path(child.task)) for child in children]
    for heartbeat in heartbeats:
        heartbeat.beat(5)
    with heartbeats[0].busy():
        assert [watch.find_hung(children, now) for now in (0.0, 11.0, 500.0)] == [None] * 3
    assert watch.find_hung(children, 505.0) is None
    assert watch.find_hung(children, 520.0) is not None


def test_members_of_a_new_cluster_are_at_work_however_far_they_are(tmp_path):
    """When the launcher looks they may have made more steps than before they lost a peer."""
    watch, child = Watch(str(tmp_path), hang_timeout_secs=10), FakeChild(Task("worker", 0))
    path = str(tmp_path / "members")
    regrouping = ElasticCluster(watch, path=path, reserve=lambda count: range(1, 1 + count), min_members=1)
    before = Heartbeat(watch.path(child.task))
    before.beat(5)
    regrouping.lose([child])
    before.beat(6)
    assert not regrouping.is_at_work([child])
    after = Heartbeat(watch.path(child.task))
    assert not regrouping.is_at_work([child])
    for step in range(6, 100):
        after.beat(step)
    assert regrouping.is_at_work([child])


def test_those_left_may_be_busy_when_one_dies(tmp_path):
    watch, child = Watch(str(tmp_path), hang_timeout_secs=10), FakeChild(Task("worker", 0))
    regrouping = ElasticCluster(watch, path=str(tmp_path / "members"), reserve=range, min_members=1)
    heartbeat = Heartbeat(watch.path(child.task))
    assert not regrouping.can_lose_one([child])
    with heartbeat.busy():
        assert regrouping.can_lose_one([child])


def test_hang_before_the_first_step_is_seen(tmp_path):
    """Late, since TensorFlow may compile it for long."""
    watch, child = Watch(str(tmp_path), hang_timeout_secs=10), FakeChild(Task("worker", 0))
    Heartbeat(watch.path(child.task)).prepare()
    assert watch.find_hung([child], 0.0) is None
    assert watch.find_hung([child], FIRST_STEP_SECS - 1) is None
    assert watch.find_hung([child], FIRST_STEP_SECS) is child
    assert watch.patience_secs(watch.read(child.task)) == FIRST_STEP_SECS


@pytest.mark.parametrize(
    ("code", "is_a_signal"), [(137, True), (139, True), (255, False), (254, False), (1, False)]
)
def test_only_a_signals_code_counts_as_killed(code, is_a_signal):
    """`sys.exit(-1)` leaves 255, which no signal does."""
    assert (killed_by(code) is not None) == is_a_signal


def test_stopped_process_is_frozen_and_a_sleeping_one_is_not(tmp_path):
    watch = Watch(str(tmp_path), hang_timeout_secs=0)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            child = FakeChild(Task("worker", 0), process.pid)
            assert watch.find_frozen([child], 0.0) == watch.find_frozen([child], 100.0) == []
            os.kill(process.pid, signal.SIGSTOP)
            deadline = time.monotonic() + 10
            now = 200.0  # goes on with each look: the signal may arrive between two
            while not watch.find_frozen([child], now) and time.monotonic() < deadline:
                now += FROZEN_SECS / 4
            os.kill(process.pid, signal.SIGCONT)
            while watch.find_frozen([child], now) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert time.monotonic() < deadline
            assert watch.find_frozen([child], now + FROZEN_SECS) == []
        finally:
            process.kill()


def test_process_that_is_stopped_again_and_again_is_slow_and_not_frozen(tmp_path):
    """Not even where it had nothing to do in between, and was stopped at each look."""
    watch = Watch(str(tmp_path), hang_timeout_secs=0)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            child = FakeChild(Task("worker", 0), process.pid)
            for look in range(20):
                os.kill(process.pid, signal.SIGSTOP)
                wait_until(lambda: child.stop_mark is not None)
                assert watch.find_frozen([child], look * FROZEN_SECS / 4) == []
                os.kill(process.pid, signal.SIGCONT)
        finally:
            process.kill()


def test_time_in_which_nobody_looked_does_not_count(tmp_path):
    """As on a machine that was suspended."""
    watch = Watch(str(tmp_path), hang_timeout_secs=0)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            child = FakeChild(Task("worker", 0), process.pid)
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: child.stop_mark is not None)
            looks = [0.0, *(100 + i * FROZEN_SECS / 4 for i in range(5))]
            assert [bool(watch.find_frozen([child], now)) for now in looks] == [False] * 5 + [True]
        finally:
            process.kill()


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_memory_is_short_only_for_what_does_not_fit():
    assert not is_memory_short([os.getpid()])
    assert not is_memory_short([])
    assert is_memory_short([os.getpid()] * 10**4)


def test_failure_says_what_it_is():
    assert str(Failure(action="kill", task=Task("ps", 0), moment="end")) == "kill:ps:0@end"
