"""Tasks on other machines, each behind an ssh connection of its own to an agent there (`tfdist.launcher.ssh.agent`)."""

import contextlib
import functools
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tfdist.cluster.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from tfdist.cluster.spec import Cluster, Task, join_address
from tfdist.errors import ConfigError, LaunchError
from tfdist.launcher.executors import LocalExecutor
from tfdist.launcher.hosts import Host, SshOptions, place_tasks
from tfdist.launcher.job import PMI_RANK, Job, build_cluster, render_dry_run, render_env
from tfdist.launcher.mpi.pmi import PmiWorld
from tfdist.launcher.process.children import Child
from tfdist.launcher.process.logs import TaskOutput
from tfdist.launcher.ssh import frames

# ssh says with it that it has lost the connection; the agent never ends with it.
_LOST_CODE = 255
_ALIVE_SECS, _ALIVE_COUNT = 4, 3
# After so long at the latest; TensorFlow's peers may hear of it before.
LOST_HOST_SECS = _ALIVE_SECS * (_ALIVE_COUNT + 1.0)
_HELLO_SECS = 60.0
_SIGN_OF_LIFE_SECS = 5.0
_SHOWN_PORT = 2222  # where nothing is started
# What belongs to a session on one machine, and means nothing on another.
_OWN_VARIABLES = {
    "HOME", "USER", "LOGNAME", "MAIL", "SHELL", "HOSTNAME", "PWD", "OLDPWD", "TERM", "TMPDIR", "DISPLAY",
}  # fmt: skip
_OWN_PREFIXES = ("SSH_", "XDG_", "DBUS_", "SUDO_", "BASH_")
_CHUNK_BYTES = 2**16


def render_ssh(host: Host, options: SshOptions, *, folder: str, python_path: str | None) -> list[str]:
    """Makes the command that starts an agent, in a folder of the same path on the far side.

    Host keys are checked as the user's ssh does; nothing is asked. Where `python_path` is None the far side's own
    PYTHONPATH stays.
    """
    settings = [
        "BatchMode=yes",
        "ConnectTimeout=10",
        f"ServerAliveInterval={_ALIVE_SECS}",
        f"ServerAliveCountMax={_ALIVE_COUNT}",
    ]
    words = ["ssh", "-T", "-x", *(word for setting in settings for word in ("-o", setting))]
    words += ["-F", options.ssh_config] if options.ssh_config else []
    words += ["-p", str(options.ssh_port)] if options.ssh_port else []
    words += ["-i", options.identity_file] if options.identity_file else []
    # `env`, since the far side's shell may be any.
    path = ["env", f"PYTHONPATH={python_path}"] if python_path else []
    agent = shlex.join([*path, options.python or sys.executable, "-m", "tfdist.launcher.ssh.agent"])
    return [*words, host.name, "--", f"cd {shlex.quote(folder)} && exec {agent}"]


def carried(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that a task on another machine gets."""
    return {
        name: value
        for name, value in env.items()
        if name not in _OWN_VARIABLES and not name.startswith(_OWN_PREFIXES)
    }


def render_dry_run_remote(job: Job) -> str:
    """Shows every TF_CONFIG and command that would run on a job's hosts; connects to none.

    The ports stand for those that the hosts will choose.

    Raises:
        ConfigError: If there are fewer slots than workers.
    """
    tasks = build_cluster(job).tasks
    places = place_tasks(tasks, job.hosts)
    ports = {task: _SHOWN_PORT + i for i, task in enumerate(tasks)}
    return "# by ssh; each host chooses free ports in place of these\n" + render_dry_run(
        job, _build_placed_cluster(places, ports)
    )


def _build_placed_cluster(places: Mapping[Task, Host], ports: Mapping[Task, int]) -> Cluster:
    addresses: dict[str, list[str]] = {}
    for task, host in places.items():
        addresses.setdefault(task.type, []).append(join_address(host.name, ports[task]))
    return Cluster(addresses={role: tuple(own) for role, own in addresses.items()})


# Wide: a process elsewhere, of which what is known comes in by and by.
class RemoteChild(Child):
    """A task on another machine, at a port there (0: any); its process here is the ssh client of `render_ssh`.

    Raises:
        LaunchError: If ssh cannot be started.
    """

    takes_orders = True
    process: subprocess.Popen[bytes]

    def __init__(self, output: TaskOutput, command: Sequence[str], *, host: Host, port: int = 0) -> None:
        super().__init__(output, command, os.environ)
        self.ask_pmi: Callable[[bytes], None] | None = None  # takes what the far task's MPI asks
        self.host = host
        self.port = self.num_cores = 0
        self.errors = b""  # what ssh itself said
        self._reader = frames.FrameReader()
        self._beat_path: Path | None = None
        self._stop_mark: str | None = None
        self._sign_at = 0.0
        self._order({"port": port})

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Lets the agent start the task."""
        self._beat_path = Path(env[HEARTBEAT_VARIABLE])
        self._order({"command": list(command), "env": carried(env)})

    @property
    def stop_mark(self) -> str | None:
        """What stays the same while the far process is stopped; see `Child`."""
        return self._stop_mark

    def decode(self, stream: str, data: bytes) -> list[tuple[str, bytes]]:
        """Takes the agent's frames apart; see `Child`."""
        if stream == "stderr":  # ssh's own, or of a far side where no agent came up
            self.errors = (self.errors + data)[-_CHUNK_BYTES:]
            return [(stream, data)]
        found = []
        for kind, content in self._reader.feed(data):
            if kind == frames.HELLO:
                hello = json.loads(content)
                self.port, self.num_cores = hello["port"], hello["cores"]
            elif kind == frames.BEAT and self._beat_path is not None:
                self._beat_path.write_bytes(content)
            elif kind == frames.PMI and self.ask_pmi is not None:
                self.ask_pmi(content)
            elif kind == frames.STATE:
                self._stop_mark = content.decode() or None
            elif kind in (frames.STDOUT, frames.STDERR):
                found.append(("stdout" if kind == frames.STDOUT else "stderr", content))
        return found if data else [("stdout", b"")]

    def poll(self) -> bool:
        """Looks whether the task has ended; see `Child`. A lost host counts as killed."""
        now = time.monotonic()
        if self.is_alive and now >= self._sign_at:
            self._sign_at = now + _SIGN_OF_LIFE_SECS
            self._write(b"\n")
        has_ended = super().poll()
        if has_ended and self.exit_code == _LOST_CODE:
            self.exit_code = 128 + signal.SIGKILL
            self.fault = f"lost its host {self.host.name}"
            self.has_lost_host = True
        return has_ended

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the far task and its group."""
        self._order({"signal": int(number)})

    def answer_pmi(self, text: bytes) -> None:
        """Sends the far task's MPI what it has asked for."""
        self._order({"pmi": text.decode()})

    def signal_group(self, number: signal.Signals) -> None:
        """Sends a signal to a process and all that it has started."""
        self.send(number)

    def _order(self, order: Mapping[str, object]) -> None:
        self._write(json.dumps(order).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended, which `poll` sees
                self.process.stdin.write(data)


class RemoteExecutor:
    """Starts tasks on the hosts of a job."""

    def __init__(self, job: Job) -> None:
        self._hosts = job.hosts
        self._options = job.ssh
        self._lost: set[str] = set()
        self._waiting: dict[Task, RemoteChild] = {}
        self._children: list[RemoteChild] = []
        self._places: Mapping[Task, Host] = {}
        self._ports: dict[Task, int] = {}
        self._cores: dict[str, int] = {}
        self._pmi: PmiWorld | None = None
        self._ranks: dict[int, RemoteChild] = {}

    def __enter__(self) -> "RemoteExecutor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._drop_waiting()

    @property
    def num_slots(self) -> float:
        """Slots of the hosts that have not been lost."""
        self._note_lost()
        return sum(host.num_slots for host in self._usable)

    def reserve(self, job: Job) -> Cluster:
        """Connects to the hosts, and gives each task of a try an address there.

        Raises:
            ConfigError: If there are fewer slots than workers.
            LaunchError: If a host cannot be reached, or has no agent.
        """
        self._note_lost()
        self._drop_waiting()
        tasks = build_cluster(job).tasks
        self._places = place_tasks(tasks, self._usable)
        self._check_interface(job)
        for task, host in self._places.items():
            self._waiting[task] = RemoteChild(TaskOutput(task, None), self._render(host), host=host)
        self._meet(list(self._waiting.values()))
        self._ports = {task: child.port for task, child in self._waiting.items()}
        self._cores = {child.host.name: child.num_cores for child in self._waiting.values()}
        self._ranks.clear()
        names = [self._places[task].name for task in tasks]
        self._pmi = PmiWorld(names) if job.uses_mpi else None
        return _build_placed_cluster(self._places, self._ports)

    def build_env(self, job: Job, cluster: Cluster, task: Task) -> dict[str, str]:
        """Returns a task's whole environment, as far as this side knows it."""
        host = self._places[task].name
        num_sharing = sum(t.type == "worker" and p.name == host for t, p in self._places.items())
        own = render_env(job, cluster, task, num_cores=self._cores[host], num_sharing=max(1, num_sharing))
        return {**job.env, **own}

    def start(self, output: TaskOutput, command: Sequence[str], env: Mapping[str, str]) -> Child:
        """Starts a task where `reserve` has put it.

        Raises:
            LaunchError: If ssh cannot be started.
        """
        task = output.task
        child = self._waiting.pop(task, None)
        if child is None:  # one that takes a dead one's place, and its port
            host = self._places[task]
            child = RemoteChild(output, self._render(host), host=host, port=self._ports[task])
        child.output = output
        if self._pmi is not None:
            rank = int(env[PMI_RANK])
            self._ranks[rank] = child
            child.ask_pmi = functools.partial(self._ask_pmi, rank)
        child.run(command, env)
        self._children.append(child)
        return child

    def _ask_pmi(self, rank: int, question: bytes) -> None:
        assert self._pmi is not None
        for to, answer in self._pmi.receive(rank, question):
            self._ranks[to].answer_pmi(answer)

    def _check_interface(self, job: Job) -> None:
        """What a machine says to itself comes over its loopback device, whatever address it names."""
        names = [host.name for host in self._places.values()]
        shared = next((name for name in names if names.count(name) > 1), None)
        if job.listen_interface is not None and shared is not None:
            raise ConfigError(
                f"listen_interface {job.listen_interface!r} with {names.count(shared)} tasks on {shared}: they could "
                "not reach each other; give each task a host of its own, or leave it out"
            )

    @property
    def _usable(self) -> list[Host]:
        return [host for host in self._hosts if host.name not in self._lost]

    def _note_lost(self) -> None:
        self._lost |= {child.host.name for child in self._children if child.has_lost_host}

    def _render(self, host: Host) -> list[str]:
        python_path = os.environ.get("PYTHONPATH")
        return render_ssh(host, self._options, folder=os.getcwd(), python_path=python_path)

    def _meet(self, children: Sequence[RemoteChild]) -> None:
        """Waits until every agent has said its port."""
        deadline = time.monotonic() + _HELLO_SECS
        with selectors.DefaultSelector() as selector:
            for child in children:
                for stream in ("stdout", "stderr"):
                    selector.register(getattr(child.process, stream), selectors.EVENT_READ, (child, stream))
            while any(not child.port for child in children):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    child, stream = key.data
                    data = os.read(key.fd, _CHUNK_BYTES)
                    child.decode(stream, data)
                    if not data:
                        selector.unregister(key.fileobj)
                        if not child.port and stream == "stdout":
                            self._refuse(child, "")
                if not ready:
                    late = next(child for child in children if not child.port)
                    self._refuse(late, f"no answer within {_HELLO_SECS:g} s")

    def _refuse(self, child: RemoteChild, reason: str) -> None:
        name = child.host.name
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(1.0)
        if child.process.stderr is not None and not reason:
            os.set_blocking(child.process.stderr.fileno(), False)
            child.decode("stderr", child.process.stderr.read() or b"")
        self._lost.add(name)
        said = child.errors.decode(errors="replace").strip().splitlines()
        reason = reason or (said[-1].strip() if said else f"ssh ended with {child.process.returncode}")
        self._drop_waiting()
        raise LaunchError(
            f"host {name}: {reason}; `ssh {name}` must work without a password, and its Python "
            f"({self._options.python or sys.executable}) must have tfdist: choose another by --python"
        )

    def _drop_waiting(self) -> None:
        """Ends the agents that have got nothing to run."""
        for child in self._waiting.values():
            child.process.kill()
            child.reap()
        self._waiting.clear()


Executor = LocalExecutor | RemoteExecutor
