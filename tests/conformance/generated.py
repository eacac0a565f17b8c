"""Small Keras programs made by chance: layers, losses, metrics, regularizers, weights, optimizers, callbacks and forms
of data, each drawn from a seed.

Run by Python: `generated.py OUT.npz STRATEGY [REPLICAS]`; the environment says which seeds. STRATEGY `keras` is the
reference: `keras.Model.fit` itself. `generated.py --show SEED` prints what a program is made of.

Activations are smooth, and data and rates small, so that rounding stays rounding; what replicas do otherwise by design
(dropout's masks, BatchNormalization of a part) is left to test_promises.py.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from building import build_in_scope, start, weights_of
from chosen import chosen

layers, losses, metrics = keras.layers, keras.losses, keras.metrics
optimizers, regularizers, constraints = keras.optimizers, keras.regularizers, keras.constraints
CLASSES = 3


class AddLoss(layers.Layer):
    """Adds the mean square of what passes through to the loss."""

    def call(self, x: Any) -> Any:
        """Passes it through."""
        self.add_loss(0.05 * keras.ops.mean(keras.ops.square(x)))
        return x


class Largest(metrics.Metric):
    """The largest prediction: a state that does not add up."""

    def __init__(self) -> None:
        super().__init__(name="largest")
        self.top = self.add_weight(
            name="top", initializer=lambda shape, dtype=None: keras.ops.full(shape, -1e9)
        )

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Looks at a batch."""
        self.top.assign(keras.ops.maximum(self.top, keras.ops.max(keras.ops.cast(y_pred, "float32"))))

    def reset_state(self) -> None:
        """Begins below everything."""
        self.top.assign(-1e9)

    def result(self) -> Any:
        """Returns it; no variable, which Keras could not return from an eager step."""
        return keras.ops.add(self.top, 0.0)


class OwnStep(keras.Model):
    """A functional model with a step of its own, that takes elements as they come."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Takes one."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(x, y, outputs, weight)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=keras.ops.shape(keras.tree.flatten(x)[0])[0])
            else:
                metric.update_state(y, outputs, sample_weight=weight)
        return self.get_metrics_result()


class Alone(keras.Model):
    """A functional model on data of `x` alone, which its step takes as they come."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Brings the outputs to one."""
        if isinstance(data, tuple):
            raise TypeError(f"x alone came as a tuple of {len(data)}")
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(self(data, training=True) - 1.0)) + sum(self.losses, 0.0)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"own": loss}


class Program(NamedTuple):
    """What was drawn.

    Attributes:
        parts: Its parts in words.
        build: Makes the compiled model.
        x: Inputs.
        y: Targets; None: the data are `x` alone.
        weight: Of each example, or None.
        options: Of `fit`, by Keras's names.
        is_stream: Whether the data come as a dataset of examples.
        asks: What follows the fit: nothing, `evaluate` or `predict`.
    """

    parts: list[str]
    build: Callable[[], keras.Model]
    x: Any
    y: Any
    weight: Any
    options: dict[str, Any]
    is_stream: bool
    asks: str


class _Draw:
    """Draws, and remembers what."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.parts: list[str] = []

    def one(self, name: str, choices: dict[str, Any] | Sequence[Any]) -> Any:
        """Draws one of several, by name."""
        key = self.random.choice(list(choices))
        self.parts.append(f"{name}={key}")
        return choices[key] if isinstance(choices, dict) else key

    def maybe(self, name: str, chance: float) -> bool:
        """Draws whether."""
        is_so = self.random.random() < chance
        if is_so:
            self.parts.append(name)
        return is_so


REGULARIZERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "l1": lambda: regularizers.L1(0.01),
    "l2": lambda: regularizers.L2(0.02),
    "l1l2": lambda: regularizers.L1L2(0.01, 0.01),
}
CONSTRAINTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "non_neg": constraints.NonNeg,
    "max_norm": lambda: constraints.MaxNorm(1.0),
    "min_max": lambda: constraints.MinMaxNorm(0.2, 1.2),
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda rate, **more: optimizers.SGD(rate, **more),
    "momentum": lambda rate, **more: optimizers.SGD(rate, momentum=0.9, **more),
    "nesterov": lambda rate, **more: optimizers.SGD(rate, momentum=0.8, nesterov=True, **more),
    # An epsilon above the rounding errors of gradients, which these would enlarge.
    "adam": lambda rate, **more: optimizers.Adam(rate, epsilon=1e-2, **more),
    "amsgrad": lambda rate, **more: optimizers.Adam(rate, epsilon=1e-2, amsgrad=True, **more),
    "adamw": lambda rate, **more: optimizers.AdamW(rate, epsilon=1e-2, weight_decay=0.01, **more),
    "nadam": lambda rate, **more: optimizers.Nadam(rate, epsilon=1e-2, **more),
    "rmsprop": lambda rate, **more: optimizers.RMSprop(rate, epsilon=1e-2, **more),
    "adagrad": lambda rate, **more: optimizers.Adagrad(rate, **more),
    "adadelta": lambda rate, **more: optimizers.Adadelta(rate, epsilon=1e-2, **more),
    "ftrl": lambda rate, **more: optimizers.Ftrl(rate, **more),
}
RATES: dict[str, Callable[[], Any]] = {
    "constant": lambda: 0.05,
    "cosine": lambda: optimizers.schedules.CosineDecay(0.05, 6),
    "steps": lambda: optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.05, 0.02, 0.01]),
}
CLIPPING: dict[str, dict[str, Any]] = {
    "none": {},
    "clipnorm": {"clipnorm": 0.3},
    "global": {"global_clipnorm": 0.3},
    "value": {"clipvalue": 0.05},
}
AVERAGING: dict[str, dict[str, Any]] = {
    "none": {},
    "ema": {"use_ema": True, "ema_momentum": 0.8},
    "overwrite": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 2},
}
SMOOTH = ("tanh", "sigmoid", "softplus", "gelu", "silu", "softsign")


def draw(seed: int) -> Program:
    """Returns the program of a seed."""
    d = _Draw(seed)
    rng = np.random.default_rng(seed)
    count = d.one("examples", [7, 9, 13, 14])
    kind = d.one("input", ["dense", *INPUTS])
    x, body = _draw_body(d, rng, kind, count)
    y, units, activation, loss, found = _draw_head(d, rng, count)
    weighting = d.one("weights", ["none", "none", "sample", "class"])
    weight = rng.uniform(0.3, 2.0, count).astype("float32") if weighting == "sample" else None
    if weighting == "class" and units == 1 and y.dtype.kind == "f" and len(np.unique(y)) > CLASSES:
        weighting = "none"  # of numbers there are no classes
    rate = d.one("rate", RATES)
    optimizer = d.one("optimizer", OPTIMIZERS)
    more = dict(d.one("clipping", CLIPPING)) | dict(d.one("averaging", AVERAGING))
    if d.maybe("accumulation", 0.15):
        more["gradient_accumulation_steps"] = 2
    is_own = d.maybe("own_step", 0.1)
    is_alone = weighting == "none" and not is_own and d.maybe("x_alone", 0.1)
    regularizer, bias = d.one("regularizer", REGULARIZERS), d.maybe("bias_regularizer", 0.1)
    constraint = d.one("constraint", CONSTRAINTS)
    is_weighted = d.maybe("weighted_metrics", 0.5)
    has_largest = d.maybe("largest", 0.08)

    def build() -> keras.Model:
        inputs, features = body()
        outputs = layers.Dense(
            units,
            activation=activation,
            kernel_regularizer=regularizer(),
            bias_regularizer=regularizers.L2(0.01) if bias else None,
            kernel_constraint=constraint(),
        )(features)
        if is_alone:
            model = Alone(inputs, outputs)
            model.compile(optimizer(rate(), **more))
            return model
        model = (OwnStep if is_own else keras.Model)(inputs, outputs)
        watched = [make() for make in found] + ([Largest()] if has_largest else [])
        which = "weighted_metrics" if is_weighted and weighting != "none" else "metrics"
        model.compile(optimizer(rate(), **more), loss(), **{which: watched})
        return model

    options = _draw_options(d, weighting, rate() if not callable(rate()) else None)
    is_stream = weighting != "sample" and "validation_split" not in options and d.maybe("stream", 0.25)
    asks = d.one("asks", ["nothing", "nothing", "evaluate", "predict"])
    if is_alone:
        options.pop("validation_split", None)
        y, asks = None, "nothing"
    return Program(d.parts, build, x, y, weight, options, is_stream, asks)


def _draw_body(d: _Draw, rng: Any, kind: str, count: int) -> tuple[Any, Callable[[], Any]]:
    activation = d.one("activation", SMOOTH)
    activity = d.one(
        "activity", {"none": None, "l2": 0.05, "l1": 0.02} if d.maybe("regular", 0.3) else {"none": None}
    )
    adds = d.maybe("add_loss", 0.15)
    norms = {
        "layer": layers.LayerNormalization,
        "batch": lambda: layers.BatchNormalization(synchronized=True),
        "unit": layers.UnitNormalization,
    }
    norm = d.one("norm", ["none", "none", *norms])
    width = d.one("width", [4, 7])
    x, read = INPUTS[kind](d, rng, count, activation)

    def build() -> Any:
        inputs, features = read()
        penalty = None if activity is None else regularizers.L2(activity)
        features = layers.Dense(width, activation=activation, activity_regularizer=penalty)(features)
        if norm != "none":
            features = norms[norm]()(features)
        return inputs, AddLoss()(features) if adds else features

    return x, build


Input = tuple[Any, Callable[[], Any]]


def _two(d: _Draw, rng: Any, count: int, activation: str) -> Input:
    del d
    a, b = (rng.normal(size=(count, n)).astype("float32") for n in (4, 3))

    def read() -> Any:
        inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((3,), name="b")}
        other = layers.Dense(3, activation=activation)(inputs["b"])
        return inputs, layers.Concatenate()([inputs["a"], other])

    return {"a": a, "b": b}, read


def _dense(d: _Draw, rng: Any, count: int, activation: str) -> Input:
    del d, activation

    def read() -> Any:
        inputs = keras.Input((6,))
        return inputs, inputs

    return rng.normal(size=(count, 6)).astype("float32"), read


def _image(d: _Draw, rng: Any, count: int, activation: str) -> Input:
    pool = d.one("pool", ["average", "global", "flatten"])

    def read() -> Any:
        inputs = keras.Input((6, 6, 2))
        features = layers.Conv2D(3, 3, activation=activation, padding="same")(inputs)
        if pool == "average":
            features = layers.AveragePooling2D(2)(features)
        return inputs, (layers.GlobalAveragePooling2D if pool == "global" else layers.Flatten)()(features)

    return rng.normal(size=(count, 6, 6, 2)).astype("float32"), read


def _ids(d: _Draw, rng: Any, count: int, activation: str) -> Input:
    del activation
    reader = d.one("reader", ["pool", "flatten", "masked"])

    def read() -> Any:
        inputs = keras.Input((5,), dtype="int32")
        features = layers.Embedding(11, 4, mask_zero=reader == "masked")(inputs)
        return inputs, (layers.Flatten if reader == "flatten" else layers.GlobalAveragePooling1D)()(features)

    ids = rng.integers(0 if reader != "masked" else 1, 11, (count, 5)).astype("int32")
    if reader == "masked":
        ids[:, 2:] *= rng.integers(0, 2, (count, 3)).astype("int32")
    return ids, read


def _sequence(d: _Draw, rng: Any, count: int, activation: str) -> Input:
    reader = d.one("reader", ["lstm", "gru", "simple", "conv", "bidirectional"])

    def read() -> Any:
        inputs = keras.Input((5, 3))
        if reader == "conv":
            features = layers.GlobalAveragePooling1D()(layers.Conv1D(4, 2, activation=activation)(inputs))
        elif reader == "bidirectional":
            features = layers.Bidirectional(layers.LSTM(3))(inputs)
        else:
            features = {"lstm": layers.LSTM, "gru": layers.GRU, "simple": layers.SimpleRNN}[reader](4)(inputs)
        return inputs, features

    return rng.normal(size=(count, 5, 3)).astype("float32"), read


INPUTS = {"dense": _dense, "sequence": _sequence, "ids": _ids, "image": _image, "two": _two}


def _draw_head(
    d: _Draw, rng: Any, count: int
) -> tuple[Any, int, Any, Callable[[], Any], list[Callable[[], Any]]]:
    labels = rng.integers(0, CLASSES, count)
    labels[:CLASSES] = range(CLASSES)
    task = d.one("task", ["numbers", "binary", "soft_binary", "classes", "one_hot", "soft"])
    if task == "numbers":
        loss = d.one(
            "loss",
            {
                "mse": losses.MeanSquaredError,
                "huber": losses.Huber,
                "log_cosh": losses.LogCosh,
                "sum": lambda: losses.MeanSquaredError(reduction="sum"),
                "text": lambda: "mse",
            },
        )
        found = _some(
            d, {"mae": metrics.MeanAbsoluteError, "rmse": metrics.RootMeanSquaredError, "r2": metrics.R2Score}
        )
        return rng.normal(size=(count, 1)).astype("float32"), 1, None, loss, found
    if task in ("binary", "soft_binary"):
        y = (labels > 0).astype("float32")[:, None]
        y = y * 0.9 + 0.05 if task == "soft_binary" else y
        loss = d.one(
            "loss",
            {
                "bce": losses.BinaryCrossentropy,
                "smoothed": lambda: losses.BinaryCrossentropy(label_smoothing=0.1),
                "focal": losses.BinaryFocalCrossentropy,
                "poisson": losses.Poisson,
            },
        )
        several = {
            "auc": metrics.AUC,
            "precision": metrics.Precision,
            "recall": metrics.Recall,
            "mae": metrics.MeanAbsoluteError,
        }
        # Thresholds of soft labels are no counts.
        found = _some(d, several if task == "binary" else {"mae": metrics.MeanAbsoluteError})
        return y, 1, "sigmoid", loss, found
    if task == "classes":
        logits = d.maybe("logits", 0.5)
        loss = d.one(
            "loss",
            {
                "sparse": lambda: losses.SparseCategoricalCrossentropy(from_logits=logits),
                "ignore": lambda: losses.SparseCategoricalCrossentropy(from_logits=logits, ignore_class=2),
            },
        )
        several = {"accuracy": lambda: "accuracy", "top2": lambda: metrics.SparseTopKCategoricalAccuracy(2)}
        return labels, CLASSES, None if logits else "softmax", loss, _some(d, several)
    y = np.eye(CLASSES, dtype="float32")[labels]
    y = y * 0.85 + 0.05 if task == "soft" else y
    loss = d.one(
        "loss",
        {
            "categorical": losses.CategoricalCrossentropy,
            "smoothed": lambda: losses.CategoricalCrossentropy(label_smoothing=0.1),
            "kl": losses.KLDivergence,
            "cosine": losses.CosineSimilarity,
        },
    )
    found = _some(
        d, {"accuracy": lambda: "accuracy", "f1": metrics.F1Score, "cosine": metrics.CosineSimilarity}
    )
    return y, CLASSES, "softmax", loss, found


def _some(d: _Draw, choices: dict[str, Any]) -> list[Any]:
    return [make for name, make in choices.items() if d.maybe(f"metric={name}", 0.4)]


def _draw_options(d: _Draw, weighting: str, rate: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"batch_size": d.one("batch", [5, 6, 8]), "epochs": d.one("epochs", [1, 1, 2])}
    if weighting == "class":
        options["class_weight"] = d.one(
            "class_weight",
            {"all": {0: 1.0, 1: 3.0, 2: 0.5}, "some": {0: 2.0}, "floats": {0.0: 0.5, 1.0: 2.0}},
        )
    if d.maybe("steps_per_epoch", 0.2):
        options |= {"steps_per_epoch": 2, "epochs": 2}  # the second goes on where the first has ended
    elif d.maybe("validation_split", 0.2):
        options["validation_split"] = 0.25
    callback = d.one("callback", ["none", "none", "early", "schedule", "stop"])
    if callback == "early":
        options["callbacks"] = lambda: [
            keras.callbacks.EarlyStopping("loss", patience=0, restore_best_weights=True)
        ]
    elif callback == "schedule" and rate is not None:
        options["callbacks"] = lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.7)]
    elif callback == "stop":
        options["callbacks"] = lambda: [StopAt(2)]
    return options


class StopAt(keras.callbacks.Callback):
    """Ends training inside an epoch."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._left = step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts down."""
        self._left -= 1
        if self._left == 0:
            self.model.stop_training = True


def data_of(program: Program) -> Any:
    """Returns it in the form in which elements reach a step."""
    return program.x if program.y is None else (program.x, program.y)


def run_keras(program: Program) -> dict[str, Any]:
    """Returns what plain Keras makes of it."""
    model = build_in_scope(None, program.build)
    # Nothing is traced: most of the time that such a small program takes.
    model.run_eagerly = True
    options = dict(program.options)
    batch = options.pop("batch_size")
    callbacks = options.pop("callbacks", list)()
    more: dict[str, Any] = {"callbacks": callbacks, "verbose": 0, **options}
    if program.is_stream and "class_weight" not in options:
        dataset = tf.data.Dataset.from_tensor_slices(data_of(program)).batch(batch)
        history = model.fit(dataset, **more)
    else:  # of class weights Keras's rule for arrays is the rule
        history = model.fit(
            program.x, program.y, sample_weight=program.weight, batch_size=batch, shuffle=False, **more
        )
    found: Any = None
    if program.asks == "evaluate":
        found = model.evaluate(
            program.x, program.y, sample_weight=program.weight, batch_size=batch, verbose=0, return_dict=True
        )
    elif program.asks == "predict":
        found = {"outputs": model.predict(program.x, batch_size=batch, verbose=0)}
    return collect(model, history, found)


def run_tfdist(run: Any, program: Program) -> dict[str, Any]:
    """Returns what a strategy makes of it."""
    model = build_in_scope(run, program.build)
    options = dict(program.options)
    batch = options.pop("batch_size")
    callbacks = options.pop("callbacks", list)()
    data = data_of(program)
    if program.is_stream:
        data = tf.data.Dataset.from_tensor_slices(data)
    elif program.weight is not None:
        data = (*data, program.weight)
    history = run.fit(model, data, batch_size=batch, shuffle=False, verbose=0, callbacks=callbacks, **options)
    found: Any = None
    if program.asks == "evaluate":
        whole = (program.x, program.y) if program.weight is None else (program.x, program.y, program.weight)
        found = run.evaluate(model, whole, batch_size=batch, return_dict=True)
    elif program.asks == "predict":
        found = {"outputs": run.predict(model, (program.x,), batch_size=batch)}
    return collect(model, history, found, run)


def collect(
    model: keras.Model, history: Any, asked: dict[str, Any] | None, run: Any = None
) -> dict[str, Any]:
    """Returns everything that must agree, flat."""
    found: dict[str, Any] = weights_of(run, model)
    found |= {f"history_{name}": np.asarray(values) for name, values in history.history.items()}
    found |= {f"asked_{name}": np.asarray(value) for name, value in (asked or {}).items()}
    return found | {"iterations": np.asarray(model.optimizer.iterations.numpy())}


def main(path: str, strategy: str, replicas: str | None = None) -> None:
    """Runs the programs that are asked for, and keeps what they gave, or how they were refused."""
    if path == "--show":
        print(*draw(int(strategy)).parts)
        return
    run: Any = None
    refusal: Any = ()
    if strategy != "keras":
        import tfdist

        run, refusal = start(strategy, replicas), tfdist.ConfigError
    found: dict[str, Any] = {}
    for name in sorted(chosen(os.environ.get("TFDIST_TEST_CASES", "").split())):
        program = draw(int(name))
        try:
            results = run_keras(program) if run is None else run_tfdist(run, program)
        except refusal as error:
            results = {"refused": np.asarray(str(error))}
        except Exception as error:  # noqa: BLE001 - one program's failure is one test's
            results = {"failed": np.asarray(f"{type(error).__name__}: {error}"[:2000])}
        found |= {f"{name}/{key}": value for key, value in results.items()}
        # Metrics of one kind get numbered names.
        keras.backend.clear_session(free_memory=False)
    if run is None or run.is_chief:
        np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
