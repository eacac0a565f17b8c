"""A divided model's run is saved, ended and resumed as any other, however it is divided then."""

import os
import shutil
import textwrap

import numpy as np
import programs
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
# Of the shape of text_lm, with an optimizer that does not enlarge rounding. SIGTERM comes in the second epoch's middle.
PROGRAM = """
    import os, signal, sys
    import keras, numpy as np
    import tfdist
    from tfdist.recipe import load_recipe

    out, stages, blocks, stop = sys.argv[1], *map(int, sys.argv[2:])

    class Stop(keras.callbacks.Callback):
        writes = True  # on the chief alone
        def on_train_batch_end(self, batch, logs=None):
            if stop and self.model.optimizer.iterations.numpy() == stop:
                os.kill(os.getpid(), signal.SIGTERM)

    options = tfdist.PipelineOptions(num_stages=stages, tensor_parallel=blocks, num_micro_batches=2)
    run = tfdist.initialize(seed=1, pipeline=options if stages * blocks > 1 else None)
    recipe = load_recipe("text_lm")
    x, y = (part[:38] for part in recipe.build_data("train", sequence_length=16))
    with run.strategy.scope():
        model = recipe.build_model(num_layers=2, width=16, num_heads=2, sequence_length=16, dropout=0.0)
        sgd = keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=0.5)
        model.compile(sgd, model.loss, metrics=["accuracy"])
    history = run.fit(
        model, x, y, batch_size=16, epochs=3, verbose=0, callbacks=[Stop()],
        checkpoints=tfdist.Checkpoints(directory="checkpoints", every_steps=2, keep=10),
    )
    run.save(model, "model.keras")
    run.wait_for_others()
    is_cut = run.strategy_name == "pipeline"
    weights = run.get_weights(model) if is_cut else model.get_weights()
    if run.is_chief:
        found = {f"weight {i}": weight for i, weight in enumerate(weights)}
        whole = keras.models.load_model("model.keras")
        found |= {f"saved {i}": weight for i, weight in enumerate(whole.get_weights())}
        found |= {f"slot {i}": v.numpy() for i, v in enumerate(whole.optimizer.variables)}
        np.savez(out, **found, **{k: v[-1] for k, v in history.history.items()})
"""
STOP = 5


def train(folder, strategy, num_processes, stages=1, blocks=1, stop=0):
    """Runs the program, and returns its exit code and what it wrote."""
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    launch = ["-m", "tfdist.launch", "--preload", f"--strategy={strategy}", f"--num_workers={num_processes}"]
    out = folder / "out.npz"
    words = [*(launch if num_processes > 1 else []), "program.py", out, stages, blocks, stop]
    env = {**os.environ, "TFDIST_STRATEGY": strategy}
    done = programs.run(list(map(str, words)), cwd=folder, env=env)
    if done.returncode != 143:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done, dict(np.load(out)) if out.exists() else None


WAYS = {
    "alone": ("one_device", 1),
    "two workers": ("multiworker", 2),
    "two stages": ("pipeline", 2, 2, 1),
    "three stages": ("pipeline", 3, 3, 1),
    "two blocks": ("pipeline", 2, 1, 2),
    "two stages of two blocks": ("pipeline", 4, 2, 2),
}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """What a run leaves that nobody stopped."""
    return train(tmp_path_factory.mktemp("whole"), *WAYS["alone"])[1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders of runs that SIGTERM ended, by the way in which they trained."""
    found = {}

    def get(way):
        if way not in found:
            folder = tmp_path_factory.mktemp("stopped")
            done, results = train(folder, *WAYS[way], stop=STOP)
            assert done.returncode == 143 and results is None, done.stdout[-2000:] + done.stderr[-2000:]
            # The newest of those in the middle of an epoch; one that is due while another is written is left out.
            names = sorted(path.name for path in (folder / "checkpoints").iterdir())
            inside = [name for name in names if not name.endswith("-step-00000000.npz")]
            assert inside, done.stdout[-2000:] + done.stderr[-2000:]
            for name in names[names.index(inside[-1]) + 1 :]:
                (folder / "checkpoints" / name).unlink()
            found[way] = folder
        return found[way]

    return get


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("two stages", "three stages", marks=pytest.mark.ci),
        pytest.param("two stages", "two workers", marks=pytest.mark.ci),
        ("two blocks", "two stages of two blocks"),
        pytest.param("two blocks", "alone", marks=pytest.mark.everything),
        pytest.param("two stages", "two blocks", marks=pytest.mark.everything),
        pytest.param("two stages of two blocks", "two stages", marks=pytest.mark.everything),
        pytest.param("alone", "two blocks", marks=pytest.mark.everything),
    ],
)
def test_run_goes_on_in_another_division(tmp_path, wanted, stopped, before, after):
    folder = tmp_path / "run"
    shutil.copytree(stopped(before), folder)
    found = train(folder, *WAYS[after])[1]
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


def test_process_that_fails_ends_all_and_is_named(tmp_path):
    """Within seconds, in the middle of a step that the others wait for."""
    text = textwrap.dedent(PROGRAM).replace("os.kill(os.getpid(), signal.SIGTERM)", "os._exit(7)")
    (tmp_path / "program.py").write_text(text)
    launch = ["-m", "tfdist.launch", "--preload", "--strategy=pipeline", "--num_workers=2"]
    done = programs.run([*launch, "program.py", "out.npz", "1", "2", str(STOP)], cwd=tmp_path, timeout=120)
    assert done.returncode == 7
    assert "worker:0 exited with code 7" in done.stderr.splitlines()[-1]


SIDE_BY_SIDE = """
    import sys
    import keras, numpy as np
    import tfdist

    blocks = int(sys.argv[2])
    options = tfdist.PipelineOptions(tensor_parallel=blocks) if blocks > 1 else None
    run = tfdist.initialize(seed=1, pipeline=options)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)).astype("float32"), rng.integers(0, 5, 40)
    wrong = x.copy()
    wrong[13] = np.nan
    found = {}

    def fit(name, x, optimizer=None, **options):
        keras.utils.set_random_seed(2)
        with run.strategy.scope():
            layers = [keras.layers.Dense(9, "tanh"), keras.layers.Dense(8)]
            layers += [keras.layers.LayerNormalization(), keras.layers.Dense(5)]
            model = keras.Sequential([keras.Input((6,)), *layers])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), loss, metrics=["accuracy"])
        history = run.fit(model, x, y, batch_size=10, verbose=0, shuffle=False, **options)
        if name == "compiled anew":
            model.compile(keras.optimizers.Adam(0.01, epsilon=1e-3), loss, metrics=["accuracy"])
            history = run.fit(model, x, y, batch_size=10, verbose=0, shuffle=False, **options)
        weights = run.get_weights(model) if blocks > 1 else model.get_weights()
        found.update({f"{name} weight {i}": weight for i, weight in enumerate(weights)})
        found.update({f"{name} {key}": np.array(values) for key, values in history.history.items()})

    fit("compiled anew", x, epochs=2)
    fit("skipped", wrong, epochs=2, on_nan="skip")
    try:
        fit("stopped", wrong, on_nan="stop")
    except Exception as error:
        found["stopped"] = type(error).__name__
    # Other labels: what is learnt makes them less likely.
    back = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    fit("given back", x, optimizer=keras.optimizers.SGD(0.5), epochs=20, validation_data=(x, y[::-1]), callbacks=[back])
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    fit("bfloat16", x, epochs=2)
    if run.is_chief:
        np.savez(sys.argv[1], **found)
"""


@pytest.mark.ci
def test_blocks_do_what_one_process_does(tmp_path):
    """Steps with NaN are left out or end the run everywhere, the best weights come back, bfloat16 is exchanged."""
    (tmp_path / "program.py").write_text(textwrap.dedent(SIDE_BY_SIDE))
    launch = ["-m", "tfdist.launch", "--preload", "--strategy=pipeline", "--num_workers=2"]
    results = []
    for words in (["program.py", "alone.npz", "1"], [*launch, "program.py", "blocks.npz", "2"]):
        done = programs.run(words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        results.append(dict(np.load(tmp_path / next(word for word in words if word.endswith(".npz")))))
    alone, blocks = results
    assert sorted(alone) == sorted(blocks) and alone["stopped"] == blocks["stopped"] == "NonFiniteError"
    assert len(alone["given back loss"]) < 20 and np.isfinite(alone["skipped weight 0"]).all()
    for name, value in alone.items():
        if name != "stopped":
            atol = 2e-2 if name.startswith("bfloat16") else 2e-5
            np.testing.assert_allclose(blocks[name], value, rtol=atol, atol=atol, err_msg=name)
