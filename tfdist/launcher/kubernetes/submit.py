"""Runs a job on Kubernetes by way of kubectl, and shows what its pods print until it ends."""

import json
import os
import select
import shutil
import signal
import subprocess
import threading

from tfdist.errors import ConfigError, LaunchError
from tfdist.launcher.job import Job
from tfdist.launcher.kubernetes.manifest import render_kubernetes
from tfdist.launcher.kubernetes.pod_status import PodStatus, find_cause, parse_listing, render_end
from tfdist.launcher.kubernetes.pods import Pods, labels
from tfdist.launcher.process.logs import Display, TaskOutput, say
from tfdist.launcher.process.signals import SignalInbox

_LOOK_SECS = 2.0
_DRAIN_SECS = 5.0
_MAX_BLIND_LOOKS = 30


def run_kubernetes(job: Job, pods: Pods) -> int:
    """Hands a job to the cluster that kubectl knows, and follows it to its end.

    A signal to this process deletes the job.

    Returns:
        0 if the job ended well; else the exit code of the task that failed first, or 128 + n for signal n.

    Raises:
        ConfigError: If the job cannot be rendered, or there is one of that name.
        LaunchError: If kubectl is missing or refuses.
    """
    text = render_kubernetes(job, pods)
    if shutil.which("kubectl") is None:
        raise LaunchError(
            "kubectl is not on the PATH: install it, or save what --dry_run prints and apply it elsewhere"
        )
    kind = "jobset" if job.has_chief else "job"
    if _kubectl(pods, "get", kind, pods.name, "--ignore-not-found", "-o", "name"):
        raise ConfigError(
            f"there is a {kind} {pods.name!r} in namespace {pods.namespace!r}: choose another --name, or "
            f"kubectl delete {kind} {pods.name} -n {pods.namespace}"
        )
    say(_kubectl(pods, "apply", "-f", "-", stdin=text).replace("\n", ", "))
    with SignalInbox(lambda: None) as inbox:
        return _Follower(kind, pods).run(inbox)


class _Follower:
    """Shows the pods' lines as they come, and what Kubernetes says of them."""

    def __init__(self, kind: str, pods: Pods) -> None:
        self._kind = kind
        self._pods = pods
        self._display = Display(os.environ)
        self._lock = threading.Lock()
        self._seen: dict[str, PodStatus] = {}
        self._outputs: dict[str, TaskOutput] = {}
        self._readers: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []

    def run(self, inbox: SignalInbox) -> int:
        blind = 0
        try:
            while not inbox.received and not self._display.broken:
                try:
                    done = self._look()
                    blind = 0
                except json.JSONDecodeError:  # kubectl has said why on stderr
                    done, blind = None, blind + 1
                    if blind > _MAX_BLIND_LOOKS:
                        raise LaunchError("kubectl no longer sees the job, which may still run") from None
                if done is not None:
                    return self._report(done)
                select.select([inbox], [], [], _LOOK_SECS)
            # A display that is broken has lost its reader, as after `| head`.
            number = inbox.received[0] if inbox.received else signal.SIGPIPE
            say(f"{number.name}: deleting {self._kind} {self._pods.name}")
            _kubectl(self._pods, "delete", self._kind, self._pods.name, "--wait=false")
            return 128 + number
        finally:
            self._stop_readers()

    def _look(self) -> bool | None:
        selector = ",".join(f"{name}={value}" for name, value in labels(self._pods).items())
        get = ["get", f"{self._kind},pods", "-l", selector, "-o", "json"]
        words = ["kubectl", "-n", self._pods.namespace, *get]
        done, pods = parse_listing(json.loads(subprocess.run(words, stdout=subprocess.PIPE).stdout))
        for pod in pods:
            before = self._seen.get(pod.name)
            self._seen[pod.name] = pod
            if pod.has_started and pod.name not in self._outputs:
                self._follow(pod)
            if pod.exit_code and (before is None or before.exit_code is None):
                say(render_end(pod))
            elif not pod.has_started and pod.reason and (before is None or before.reason != pod.reason):
                say(f"{pod.task} waits: {pod.reason}")
        return done

    def _follow(self, pod: PodStatus) -> None:
        words = ["kubectl", "-n", self._pods.namespace, "logs", "--follow", pod.name]
        # In a session of its own: Ctrl-C is for this process, which still wants the pods' last words.
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, start_new_session=True
        )
        output = self._outputs[pod.name] = TaskOutput(pod.task, None)
        thread = threading.Thread(target=self._copy, args=(process, output), daemon=True)
        self._readers.append((process, thread))
        thread.start()

    def _copy(self, process: subprocess.Popen[bytes], output: TaskOutput) -> None:
        assert process.stdout is not None
        data = b"more"
        while data:
            data = process.stdout.read(2**16)
            with self._lock:
                self._display.show(output.task, "stdout", output.receive("stdout", data))

    def _report(self, done: bool) -> int:
        for _, thread in self._readers:
            thread.join(_DRAIN_SECS)
        kept = (
            f"kubectl delete {self._kind},service,networkpolicy {self._pods.name} -n {self._pods.namespace}"
        )
        if done:
            say(f"the {self._kind} has ended well; its objects are kept until {kept}")
            return 0
        cause = find_cause(self._seen)
        if cause is None or not cause.exit_code:
            say(f"the {self._kind} has failed: kubectl describe {self._kind} {self._pods.name} says why")
            return 1
        tail = list(self._outputs[cause.name].tail) if cause.name in self._outputs else []
        if tail:
            say(f"the last lines of {cause.task}, the first task to fail:")
            self._display.show(cause.task, "stderr", tail)
        say(f"{render_end(cause)}; the pods are kept until {kept}")
        return cause.exit_code

    def _stop_readers(self) -> None:
        for process, thread in self._readers:
            process.kill()
            process.wait()
            thread.join()
            if process.stdout is not None:
                process.stdout.close()


def _kubectl(pods: Pods, *words: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["kubectl", "-n", pods.namespace, *words], input=stdin, capture_output=True, text=True
    )
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise LaunchError(f"kubectl {words[0]} failed: {error}")
    return done.stdout.strip()
