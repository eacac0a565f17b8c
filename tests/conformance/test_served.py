"""A stream that a tf.data service prepares: each example comes once an epoch, in batches of whoever asks next."""

import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import programs
import pytest
import served
from chosen import VARIABLE
from tiers import rarely
from worlds import run_world

from tfdist.data import service as data_service
from tfdist.train import main

pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800), pytest.mark.ci]

SERVERS = """\
import sys, tensorflow as tf
service = tf.data.experimental.service
dispatcher = service.DispatchServer(service.DispatcherConfig(port=0))
address = dispatcher.target.split("://")[1].replace("localhost", "127.0.0.1")
workers = [service.WorkerServer(service.WorkerConfig(dispatcher_address=address)) for _ in range(2)]
print("dispatcher", address, flush=True)
sys.stdin.read()
"""
BACKENDS = rarely(["one_device", "mirrored-2", "multiworker-2", "ps-1"], "one_device", "mirrored-2", "ps-1")


def run_served(world, service, out, cases=None):
    """Returns what each process saw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVICE", service)
        if cases:
            patch.setenv(VARIABLE, cases)
        run_world(served.__file__, out, world)
    found = []
    for path in sorted(out.glob("*.npz")):
        with np.load(path) as stored:
            found.append(dict(stored))
    assert len(found) == (2 if world == "multiworker-2" else 1)
    return found


def assert_each_once(seen):
    np.testing.assert_array_equal(seen, np.ones([2, served.COUNT]))


@pytest.fixture(scope="module", params=BACKENDS)
def local(request, tmp_path_factory):
    """The world, and what each of its processes saw through the chief's own service."""
    return request.param, run_served(request.param, "local", tmp_path_factory.mktemp(request.param))


def test_each_example_comes_once_an_epoch(local):
    """In training and validation, whatever the batch and whoever prepares it; all processes agree on the weights."""
    _, found = local
    for process in found:
        for way in ("whole", "in_order", "odd", "python"):
            assert_each_once(process[f"{way}/seen"])
        assert_each_once(process["in_order/validated"])
        np.testing.assert_array_equal(process["whole/weights"], found[0]["whole/weights"])
        # At best ten; one worker may be ahead of the other at an epoch's end.
        assert 10 <= process["whole/steps"] <= 14


def test_dropped_remainder_leaves_whole_batches(local):
    """No example comes twice, and a batch is whole."""
    for process in local[1]:
        counts = process["dropped/seen"]
        assert counts.max() == 1 and counts.sum() == 8 * process["dropped/steps"] > 0


def test_repeated_stream_gives_the_steps_asked_for(local):
    """Of whole batches; the second epoch goes on where the first one ended."""
    for process in local[1]:
        assert process["steps/steps"] == 18
        np.testing.assert_array_equal(process["steps/seen"].sum(axis=1), [72, 72])


def test_local_service_is_closed_to_other_machines(local):
    """Each listening socket of the chief is bound to the loopback device or address."""
    if shutil.which("ss") is None:
        pytest.skip("listening sockets are asked for with the command ss (iproute2)")
    world, found = local
    ports = [str(line) for line in found[0]["ports"]]
    assert len(ports) >= 2
    # Under multiworker TensorFlow's own server is among them, and MPI's.
    assert all("%lo:" in line or " 127.0.0.1:" in line for line in ports), (world, ports)


def test_what_is_no_stream_is_refused(local):
    """By its name, with what to do."""
    for process in local[1]:
        for name in ("arrays", "own"):
            assert "leave it out" in str(process[f"refused/{name}"])


def test_service_of_several_workers_elsewhere(tmp_path):
    """Two workers of the service prepare, two of the run read."""
    servers = subprocess.Popen(
        [sys.executable, "-c", SERVERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = servers.stdout.readline().split()[1]
        found = run_served("multiworker-2", address, tmp_path, cases="whole odd")
    finally:
        servers.kill()
        servers.communicate(timeout=30)
    for process in found:
        for way in ("whole", "odd"):
            assert_each_once(process[f"{way}/seen"])
        np.testing.assert_array_equal(process["whole/weights"], found[0]["whole/weights"])


RECIPE = """\
import keras, tensorflow as tf, tfdist

def build_model() -> keras.Model:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model

def build_data(split: str):
    return tf.data.Dataset.range(20).map(lambda n: 2 * (tf.cast([n], tf.float32) / 20,))

RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=4, epochs=2)
"""


@pytest.fixture
def words(tmp_path):
    (tmp_path / "stream.py").write_text(RECIPE)
    return ["--recipe=stream.py", "--verbose=2"]


def test_command_takes_the_flag(tmp_path, words):
    """And leaves it in the run's config."""
    done = programs.run(["-m", "tfdist.train", *words, "--run_dir=run", "--data_service=local"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"data_service": "local"' in (tmp_path / "run" / "config.json").read_text()


def test_address_without_a_dispatcher_is_one_line(tmp_path, words, monkeypatch, capsys):
    """Nobody listens; or somebody does, and says nothing: TensorFlow would wait for ever."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_service, "_ANSWER_SECS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        for listener, reason in ((bound, "Connection refused"), (silent, "timed out")):
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            start = time.monotonic()
            assert main([*words, f"--run_dir={listener.fileno()}", f"--data_service={address}"]) == 2
            (last,) = capsys.readouterr().err.splitlines()
            assert f"data_service='{address}': no tf.data dispatcher answers there" in last
            assert reason in last and "--data_service=local" in last
            assert time.monotonic() - start < 100
