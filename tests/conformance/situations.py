"""What users bring that is no plain classifier on arrays: each as a small program with the same lines for both.

Run by Python: `situations.py OUT.npz STRATEGY [REPLICAS]`; STRATEGY `keras` is `keras.Model` itself. A case that is
refused leaves the words.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from building import build_in_scope
from chosen import chosen

layers, ops = keras.layers, keras.ops
rng = np.random.default_rng(0)
X = rng.normal(size=(20, 6)).astype("float32")
Y = rng.integers(0, 3, 20)
BATCH = 10


class Side:
    """Plain Keras, or a run of tfdist: what a case calls."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def build(self, build: Callable[[], keras.Model]) -> keras.Model:
        """Builds a model, in the strategy's scope."""
        return build_in_scope(self.run, build)

    def fit(
        self, model: keras.Model, data: Any, *, batch: int | None = BATCH, **options: Any
    ) -> dict[str, Any]:
        """Fits in order, on batches as they are where `batch` is None; returns the history and the weights."""
        options = {"epochs": 2, "shuffle": False, "verbose": 0, **options}
        if self.run is not None:
            history = self.run.fit(model, data, batch_size=batch, **options)
        elif isinstance(data, tf.data.Dataset):
            options.pop("shuffle")
            history = model.fit(data if batch is None else data.batch(batch), **options)
        else:
            x, y = data if isinstance(data, tuple) else (data, None)
            history = model.fit(x, y, batch_size=batch, **options)
        found = {f"weight_{i}": np.asarray(v) for i, v in enumerate(model.get_weights())}
        return found | {name: np.asarray(values) for name, values in history.history.items()}

    def predict(self, model: keras.Model, x: Any) -> Any:
        """Predicts."""
        if self.run is None:
            return model.predict(x, batch_size=BATCH, verbose=0)
        return self.run.predict(model, x, batch_size=BATCH)


def classifier(**options: Any) -> keras.Model:
    """A small one on six numbers."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(options.pop("optimizer", None) or keras.optimizers.SGD(0.1), loss, **options)
    return model


class Pair(keras.Model):
    """Two networks, two optimizers, no `call()`, not built; data of `x` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = keras.Sequential([layers.Dense(5, activation="tanh"), layers.Dense(1)])
        self.maker = keras.Sequential([layers.Dense(4, activation="tanh"), layers.Dense(6)])
        self.judged = keras.metrics.Mean(name="judged")

    def compile(self, first: Any, second: Any) -> None:
        """Takes both optimizers."""
        super().compile()
        self.first, self.second = first, second

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The one there is."""
        return [self.judged]

    def train_step(self, real: Any) -> dict[str, Any]:
        """Steps both."""
        with tf.GradientTape() as tape:
            judged = ops.mean(ops.square(self.judge(real) - 1.0)) + ops.mean(
                ops.square(self.judge(self.maker(real)))
            )
        weights = self.judge.trainable_weights
        self.first.apply_gradients(zip(tape.gradient(judged, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            made = ops.mean(ops.square(self.judge(self.maker(real)) - 1.0))
        weights = self.maker.trainable_weights
        self.second.apply_gradients(zip(tape.gradient(made, weights), weights, strict=True))
        self.judged.update_state(judged, sample_weight=ops.shape(real)[0])
        return {"judged": self.judged.result(), "made": made}


def pair(side: Side) -> dict[str, Any]:
    """As tutorials write GANs."""

    def build() -> keras.Model:
        model = Pair()
        model.compile(keras.optimizers.SGD(0.05), keras.optimizers.Adam(0.01, epsilon=1e-2))
        return model

    found = side.fit(side.build(build), X)
    # In the order in which Keras finds them, which is that of their making.
    return {
        "sum": sum(np.abs(v).sum() for k, v in found.items() if k.startswith("weight")),
        **{k: found[k] for k in ("judged", "made")},
    }


def stateful(side: Side) -> dict[str, Any]:
    """A network that goes on with its state in the next batch: its batch is fixed."""

    def build() -> keras.Model:
        inputs = keras.Input(batch_shape=(BATCH, 5, 3))
        model = keras.Model(inputs, layers.Dense(1)(layers.LSTM(3, stateful=True)(inputs)))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    x = np.random.default_rng(1).normal(size=(20, 5, 3)).astype("float32")
    return side.fit(side.build(build), (x, x[:, 0, :1]))


def strings(side: Side) -> dict[str, Any]:
    """Predictions that are texts."""

    class Words(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layers.Dense(3)
            self.words = layers.StringLookup(vocabulary=["a", "été"], invert=True)

        def call(self, x: Any) -> Any:
            return self.words(ops.argmax(self.inner(x), -1))

    def build() -> keras.Model:
        model = Words()
        model.compile()
        return model

    return {"texts": np.asarray([t.decode() for t in np.asarray(side.predict(side.build(build), X))])}


def batched(side: Side) -> dict[str, Any]:
    """A dataset of batches, the third of which is short, as the last one is."""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).take(13).batch(5).repeat(2)
    return side.fit(side.build(classifier), data, batch=None)


def batched_for_anything(side: Side) -> dict[str, Any]:
    """The same without an end, for a model that would take batches of batches."""

    def build() -> keras.Model:
        model = keras.Sequential([layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5).repeat()
    return side.fit(side.build(build), data, batch=None, steps_per_epoch=3, epochs=3)


def generator(side: Side) -> dict[str, Any]:
    """A Python generator of batches, which the epochs read on."""

    def batches() -> Any:
        while True:
            for start in range(0, len(X), 5):
                yield X[start : start + 5], Y[start : start + 5]

    return side.fit(side.build(classifier), batches(), batch=None, steps_per_epoch=3, epochs=3)


class Batches(keras.utils.PyDataset):
    """Batches by their number; the targets change with every epoch that has ended."""

    def __init__(self) -> None:
        super().__init__(workers=2)
        self.num_epochs = 0

    def __len__(self) -> int:
        return -(-len(X) // 5)

    def __getitem__(self, place: int) -> Any:
        some = slice(5 * place, 5 * place + 5)
        return X[some], (Y[some] + self.num_epochs) % 3

    def on_epoch_end(self) -> None:
        self.num_epochs += 1


def py_dataset(side: Side) -> dict[str, Any]:
    """A `keras.utils.PyDataset`."""
    return side.fit(side.build(classifier), Batches(), batch=None)


def tuple_of_inputs(side: Side) -> dict[str, Any]:
    """Several inputs in a tuple, and in an own step no targets."""

    def build() -> keras.Model:
        a, b = keras.Input((1,)), keras.Input((1,))
        model = keras.Model((a, b), layers.Dense(1)(layers.Concatenate()([a, b])))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    return side.fit(side.build(build), ((X[:, :1], X[:, 1:2]), X[:, :1]))


def sparse(side: Side) -> dict[str, Any]:
    """SciPy's matrices."""
    import scipy.sparse

    x = np.where(np.abs(X) > 0.5, X, 0)
    return side.fit(side.build(classifier), (scipy.sparse.csr_matrix(x), Y) if side.run else (x, Y))


def lists(side: Side) -> dict[str, Any]:
    """Python's lists."""
    return side.fit(side.build(classifier), (X.tolist(), Y.tolist()) if side.run else (X, Y))


def cached(side: Side) -> dict[str, Any]:
    """A stream that caches into a file."""
    folder = Path(os.environ.get("SITUATIONS_FOLDER") or tempfile.mkdtemp())
    data = (
        tf.data.Dataset.from_tensor_slices((X, Y)).map(lambda x, y: (2 * x, y)).cache(str(folder / "cache"))
    )
    return side.fit(side.build(classifier), data)


class Every(keras.Model):
    """Applies what two steps have gathered, in a branch of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(1)
        self.number = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.build((None, 6))

    def build(self, shape: Any) -> None:
        """Makes the sums."""
        self.dense.build(shape)
        self.sums = [
            self.add_weight(shape=v.shape, initializer="zeros", trainable=False)
            for v in self.dense.trainable_variables
        ]
        self.built = True

    def call(self, x: Any) -> Any:
        """Runs it."""
        return self.dense(x)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Adds, and applies every second time."""
        x, y = data
        self.number.assign_add(1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.cast(y, tf.float32)[:, None] - self(x, training=True)))
        for total, gradient in zip(
            self.sums, tape.gradient(loss, self.dense.trainable_variables), strict=True
        ):
            total.assign_add(gradient)

        def go() -> None:
            gradients = [total.value / 2 for total in self.sums]
            self.optimizer.apply_gradients(zip(gradients, self.dense.trainable_variables, strict=True))
            for total in self.sums:
                total.assign(tf.zeros_like(total.value))

        tf.cond(tf.equal(self.number.value % 2, 0), go, lambda: None)
        return {"loss": loss}


def branch(side: Side, exchange: str = "collective") -> dict[str, Any]:
    """`apply_gradients` inside `tf.cond`."""

    def build() -> keras.Model:
        model = Every()
        model.compile(keras.optimizers.SGD(0.1))
        return model

    options = {}
    if side.run is not None:
        import tfdist  # not where Keras is the reference

        options["sync"] = tfdist.SyncOptions(exchange=exchange)
    return side.fit(side.build(build), (X, Y), **options)


def branch_by_mpi(side: Side) -> dict[str, Any]:
    """The same where workers can meet in a branch."""
    return branch(side, "mpi")


def compiled_outside(side: Side) -> dict[str, Any]:
    """Transfer learning in stages, compiled anew where it occurs to one."""
    model = side.build(classifier)
    side.fit(model, (X, Y))
    model.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return side.fit(model, (X, Y))


class Looks(keras.callbacks.Callback):
    """Predicts and evaluates, reads bare values, and changes a weight and the rate."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Does it all."""
        optimizer = self.model.optimizer
        found = self.model.evaluate(X[:5], Y[:5], verbose=0, return_dict=True)
        self.seen.append(
            [
                float(self.model.predict(X[:5], verbose=0).sum()),
                found["loss"],
                float(optimizer.learning_rate),
                int(optimizer.iterations),
                float(np.asarray(optimizer.learning_rate)),
            ]
        )
        logs["own"] = self.seen[-1][0]
        kernel = self.model.layers[-1].kernel
        kernel.assign(kernel * 0.9)
        optimizer.learning_rate = 0.05


def callback(side: Side) -> dict[str, Any]:
    """A callback that asks the model."""
    looks = Looks()
    found = side.fit(side.build(classifier), (X, Y), callbacks=[looks], epochs=3)
    return found | {"seen": np.asarray(looks.seen)}


def ragged(side: Side) -> dict[str, Any]:
    """Sentences of different lengths."""

    def sentences() -> Any:
        for i in range(20):
            yield np.arange(1, 2 + i % 4), i % 3

    def build() -> keras.Model:
        model = keras.Sequential([layers.Embedding(20, 4), layers.GlobalAveragePooling1D(), layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    spec = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)
    data = tf.data.Dataset.from_generator(sentences, output_signature=spec)
    return side.fit(side.build(build), data if side.run else data.padded_batch(BATCH).unbatch())


class Extremes(keras.metrics.Metric):
    """The smallest and the largest output: states that start at infinity and do not add up."""

    def __init__(self) -> None:
        super().__init__(name="range")
        self.low, self.high = (self.add_weight(name=name, initializer="zeros") for name in ("low", "high"))

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Looks at a batch."""
        self.low.assign(ops.minimum(self.low, ops.min(y_pred)))
        self.high.assign(ops.maximum(self.high, ops.max(y_pred)))

    def reset_state(self) -> None:
        """Begins outside of everything."""
        self.low.assign(np.inf)
        self.high.assign(-np.inf)

    def result(self) -> Any:
        """Returns what lies between."""
        return self.high - self.low


def extremes(side: Side) -> dict[str, Any]:
    """A metric that is no sum."""
    return side.fit(
        side.build(lambda: classifier(metrics=[Extremes()])), (X, Y), validation_data=(X[:7], Y[:7])
    )


def vectors(side: Side) -> dict[str, Any]:
    """A metric of several numbers, with everything that writes logs."""

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3, activation="softmax")])
        model.compile(
            keras.optimizers.SGD(0.1), "categorical_crossentropy", metrics=[keras.metrics.F1Score()]
        )
        return model

    model = side.build(build)
    data = X, np.eye(3, dtype="float32")[Y]
    if side.run is None:
        return side.fit(model, data)
    import tfdist
    from tfdist.config.run_dir import RunDir
    from tfdist.training.monitoring.callbacks import MetricsFile, TensorBoardScalars

    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        found = side.fit(
            model,
            data,
            verbose=2,
            callbacks=[MetricsFile(run_dir=run_dir), TensorBoardScalars(run_dir=run_dir)],
            checkpoints=tfdist.Checkpoints(directory=Path(folder) / "checkpoints", every_steps=1),
        )
    return found


def spectral(side: Side) -> dict[str, Any]:
    """A layer that assigns its own vectors."""

    def build() -> keras.Model:
        model = keras.Sequential(
            [keras.Input((6,)), layers.SpectralNormalization(layers.Dense(5)), layers.Dense(3)]
        )
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    return side.fit(side.build(build), (X, Y))


def muon(side: Side) -> dict[str, Any]:
    """An optimizer that treats matrices and the rest differently."""
    return side.fit(side.build(lambda: classifier(optimizer=keras.optimizers.Muon(0.01))), (X, Y))


def never_fitted(side: Side) -> dict[str, Any]:
    """Predicts with a compiled model that has seen no target."""
    return {"outputs": side.predict(side.build(lambda: classifier(metrics=["accuracy"])), X)}


def ragged_model() -> keras.Model:
    """Takes rows of any length."""
    rows = keras.Input((None,), dtype="int32", ragged=True)
    mean = layers.Lambda(lambda t: tf.reduce_mean(t, axis=1), output_shape=(4,))(
        layers.Embedding(20, 4)(rows)
    )
    model = keras.Model(rows, layers.Dense(3)(mean))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def sparse_model() -> keras.Model:
    """Takes rows of which most is zero."""
    rows = keras.Input((6,), sparse=True)
    model = keras.Model(rows, layers.Dense(3)(rows))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def make_ragged() -> tuple[tf.RaggedTensor, np.ndarray]:
    """Returns rows of one to four numbers, and classes."""
    return tf.ragged.constant([list(range(1, 2 + i % 4)) for i in range(20)], tf.int32), np.arange(20) % 3


def make_sparse() -> tuple[tf.SparseTensor, np.ndarray]:
    """Returns rows of which half is zero, and classes."""
    return tf.sparse.from_dense(np.where(np.abs(X) > 0.5, X, 0)), Y


def stream_of_ragged(side: Side) -> dict[str, Any]:
    """A stream of tf.RaggedTensor, as TensorFlow's own tutorials on text have them."""
    return side.fit(side.build(ragged_model), tf.data.Dataset.from_tensor_slices(make_ragged()))


def stream_of_sparse(side: Side) -> dict[str, Any]:
    """A stream of tf.SparseTensor."""
    return side.fit(side.build(sparse_model), tf.data.Dataset.from_tensor_slices(make_sparse()))


def ragged_arrays(side: Side) -> dict[str, Any]:
    """The same, not in a stream."""
    return side.fit(side.build(ragged_model), make_ragged())


def sparse_arrays(side: Side) -> dict[str, Any]:
    """The same, not in a stream."""
    return side.fit(side.build(sparse_model), make_sparse())


CASES: dict[str, Callable[[Side], dict[str, Any]]] = {
    case.__name__: case
    for case in (
        pair,
        stateful,
        strings,
        batched,
        batched_for_anything,
        sparse,
        lists,
        cached,
        branch,
        branch_by_mpi,
        generator,
        py_dataset,
        tuple_of_inputs,
        compiled_outside,
        callback,
        ragged,
        extremes,
        vectors,
        spectral,
        muon,
        never_fitted,
        stream_of_ragged,
        stream_of_sparse,
        ragged_arrays,
        sparse_arrays,
    )
}


def main(path: str, strategy: str, replicas: str | None = None) -> None:
    """Runs the cases that are asked for."""
    run: Any = None
    refusal: Any = ()
    if strategy != "keras":
        import tfdist

        run = tfdist.initialize(strategy=strategy, num_replicas=replicas and int(replicas), seed=1)
        refusal = tfdist.ConfigError
    found: dict[str, Any] = {}
    for name in chosen(CASES):
        try:
            results = CASES[name](Side(run))
        except refusal as error:
            results = {"refused": np.asarray(str(error))}
        found |= {f"{name}/{key}": np.asarray(value) for key, value in results.items()}
    if run is None or run.is_chief:
        np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
