"""A stage needs memory for its own layers: for their weights, slots and gradients, and for nobody else's."""

import re
import textwrap

import programs
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
# With Adam's slots and its gradients each of twelve layers takes 67 MB.
PROGRAM = """
    import re, sys
    import keras, numpy as np
    import tfdist

    def memory_mb(name):
        return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

    options = tfdist.PipelineOptions(num_micro_batches=2) if len(sys.argv) > 1 else None
    run = tfdist.initialize(seed=1, pipeline=options)
    x = np.ones((8, 2048), np.float32)
    warm = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    warm.compile("adam", "mse")
    warm.train_on_batch(x[:, :2], x[:, :2])
    start = memory_mb("VmRSS")
    with run.strategy.scope():
        layers = [keras.layers.Dense(2048, use_bias=False) for _ in range(12)]
        model = keras.Sequential([keras.Input((2048,)), *layers])
        model.compile(keras.optimizers.Adam(1e-5), "mse")
    run.fit(model, x, x, batch_size=8, epochs=3, verbose=0)
    print("grown by", round(memory_mb("VmHWM") - start), flush=True)
"""


def test_three_stages_need_less_each_than_one_process(tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    found = []
    launch = ["-m", "tfdist.launch", "--strategy=pipeline", "--num_workers=3"]
    for words in (["program.py"], [*launch, "program.py", "staged"]):
        done = programs.run(words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([int(size) for size in re.findall(r"grown by (\d+)", done.stdout)])
    alone, staged = found
    assert len(alone) == 1 and len(staged) == 3
    # A third of the state, what was grown for a moment, and TensorFlow's own.
    assert max(staged) < 0.7 * alone[0], found
    assert min(staged) > 0.25 * alone[0], found
