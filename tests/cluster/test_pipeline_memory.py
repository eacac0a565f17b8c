"""A process needs memory for its own layers, and its own blocks of them, and for nobody else's."""

import re
import textwrap

import programs
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.ci]
# With Adam's slots and its gradients each of twelve layers takes 67 MB.
PROGRAM = """
    import re, resource, sys
    import keras, numpy as np
    import tfdist

    def memory_mb(name):
        return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

    _, stages, blocks, limit = map(int, ["0", *sys.argv[1:]])
    options = tfdist.PipelineOptions(num_micro_batches=2, num_stages=stages, tensor_parallel=blocks)
    run = tfdist.initialize(seed=1, pipeline=options if stages * blocks > 1 else None)

    def train(width, epochs):
        x = np.ones((8, width), np.float32)
        with run.strategy.scope():
            layers = [keras.layers.Dense(width, use_bias=False) for _ in range(12)]
            model = keras.Sequential([keras.Input((width,)), *layers])
            model.compile(keras.optimizers.Adam(1e-5), "mse")
        return run.fit(model, x, x, batch_size=8, epochs=epochs, verbose=0).history["loss"][-1]

    train(8, 1)  # makes the threads, whose stacks are memory too
    start = memory_mb("VmRSS")
    if limit:
        own = int((memory_mb("VmData") + limit) * 1024 * 1024)
        resource.setrlimit(resource.RLIMIT_DATA, (own, own))
    loss = train(2048, 3)
    print("grown by", round(memory_mb("VmHWM") - start), "loss", loss, flush=True)
"""
DIVISIONS = {"stages": (3, 1), "blocks": (1, 2)}


def run_program(folder, division=(1, 1), limit=0):
    """Returns what a run printed; the limit is of what a process may grow by, in MB, or 0 for none."""
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    num_processes = division[0] * division[1]
    launch = ["-m", "tfdist.launch", "--strategy=pipeline", f"--num_workers={num_processes}"]
    words = [*(launch if num_processes > 1 else []), "program.py", *map(str, division), str(limit)]
    return programs.run(words, cwd=folder)


@pytest.mark.everything
def test_processes_need_less_each_than_one_for_all(tmp_path):
    found = {}
    for name, division in {"alone": (1, 1), **DIVISIONS}.items():
        done = run_program(tmp_path, division)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = [int(size) for size in re.findall(r"grown by (\d+)", done.stdout)]
    (alone,) = found["alone"]
    # A third of the state, or half of it, what was grown for a moment, and TensorFlow's own.
    for name, size, most in (("stages", 3, 0.7), ("blocks", 2, 0.8)):
        assert len(found[name]) == size
        assert max(found[name]) < most * alone and min(found[name]) > 0.25 * alone, found


# MB that a process may ask for beyond what it has, stacks of threads included: one process for all asks for 1,110, of
# which 805 are weights, slots and gradients; divided, none asks for more than 620.
LIMIT, ENOUGH = 750, 1_600


@pytest.fixture(scope="module")
def is_too_large(tmp_path_factory):
    """Whether one process ends by the limit, and without it does not; how it ends is TensorFlow's and the kernel's."""
    folder = tmp_path_factory.mktemp("alone")
    trained, ended = run_program(folder, limit=ENOUGH), run_program(folder, limit=LIMIT)
    assert trained.returncode == 0, trained.stderr[-3000:]
    return ended.returncode != 0


@pytest.mark.parametrize("division", DIVISIONS.values(), ids=DIVISIONS)
def test_model_that_is_too_large_for_one_process_trains_when_divided(tmp_path, is_too_large, division):
    assert is_too_large
    done = run_program(tmp_path, division, limit=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"loss \d", done.stdout)) == division[0] * division[1]
