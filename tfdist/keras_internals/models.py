"""Models: how Keras builds, compiles and calls them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend import compute_output_spec
from keras.src.trainers.trainer import model_supports_jit
from tensorflow.python.distribute import values as distributed_values

from tfdist.keras_internals.attributes import holding
from tfdist.keras_internals.metrics import flat_metrics
from tfdist.keras_internals.optimizers import ApplyFn, find_optimizers, inner_optimizers
from tfdist.keras_internals.replica_binding import ReplicaBinding
from tfdist.keras_internals.variables import native


def build_model(model: keras.Model, batch: Any, *, is_trained: bool = True) -> None:
    """Creates every variable of a model: layers, loss, metrics and optimizer slots.

    Leans on `Trainer._symbolic_build`.

    Args:
        model: Call this inside the strategy's scope.
        batch: As `train_step` takes it: nest `x`, `(x, y)` or `(x, y, sample_weight)` of tensors with a leading batch
            axis.
        is_trained: False creates what a prediction needs: the layers alone.
    """
    if not is_trained:
        inputs = keras.utils.unpack_x_y_sample_weight(_symbolic(batch))[0]
        if not all(layer.built for layer in model._flatten_layers()):
            compute_output_spec(model, inputs, training=False)
        return
    try:
        model._symbolic_build(data_batch=batch)
    except Exception:
        # A model without `call()`, or one whose step makes no use of the loss that it is compiled with.
        if not has_own_step(model):
            raise
        _build_by_step(model, batch)
    for optimizer in find_optimizers(model):
        if not optimizer.built:
            # One that `train_step` uses for some weights only gets slots for all: Keras would build it at its
            # first step, when no variable can be made any more.
            optimizer.build(model.trainable_variables)


def _build_by_step(model: keras.Model, batch: Any) -> None:
    """Traces a model's own `train_step` until all that it uses is there: layers first, then gradients for them.

    Leans on `Layer._flatten_layers` and Keras's `compute_output_spec`, which creates variables when it has ended.
    """
    local_results = tf.distribute.get_strategy().experimental_local_results
    is_whole = False
    while not is_whole:
        num_built, optimizers = sum(layer.built for layer in model._flatten_layers()), find_optimizers(model)
        applied: list[tuple[keras.optimizers.Optimizer, list[keras.Variable]]] = []

        def note(optimizer: keras.optimizers.Optimizer, apply: ApplyFn, applied: Any = applied) -> ApplyFn:
            return lambda grads, variables=None: applied.append((optimizer, list(variables or ())))

        # Of variables that replicas share no gradient can be asked outside of them: the first replica's stand for all.
        bound = [(v, local_results(native(v))[0]) for v in all_variables(model, optimizers)]
        try:
            with ReplicaBinding(variables=bound, optimizers=optimizers, apply=note):
                compute_output_spec(model.train_step, _symbolic(batch))
            is_whole = True
        except Exception:
            # It cannot go on where a gradient is asked for of a variable that comes with this call's end.
            if sum(layer.built for layer in model._flatten_layers()) == num_built:
                raise
    for optimizer, variables in applied:
        if not optimizer.built and variables:
            optimizer.build(variables)


def _symbolic(batch: Any) -> Any:
    return keras.tree.map_structure(
        lambda t: keras.KerasTensor(t.shape, keras.backend.standardize_dtype(t.dtype)), batch
    )


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the state variable of every seed generator in the model.

    Leans on `Layer._flatten_layers` and `Layer._seed_generators`.
    """
    found: dict[int, keras.Variable] = {}
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            found[id(generator.state)] = generator.state
    return list(found.values())


def compiled_parts(model: keras.Model) -> tuple[Any, ...]:
    """Returns what `compile` has made: a function traced before holds the old ones.

    Leans on `Trainer._compile_loss` and `Trainer._compile_metrics`.
    """
    return (
        getattr(model, "optimizer", None),
        getattr(model, "_compile_loss", None),
        getattr(model, "_compile_metrics", None),
    )


def is_compiled(model: keras.Model) -> bool:
    """Tells whether `compile` was called."""
    return bool(getattr(model, "compiled", False))


def has_own_step(model: keras.Model) -> bool:
    """Tells whether a model has a `train_step` other than Keras's: what it computes and applies is its own affair."""
    return type(model).train_step is not keras.Model.train_step


def known_inputs(model: keras.Model) -> list[keras.KerasTensor]:
    """Returns a model's symbolic inputs; none where it takes whatever comes."""
    try:
        return list(model.inputs)
    except (AttributeError, ValueError):  # a subclass, a `Sequential` without `Input`
        return []


def all_variables(
    model: keras.Model, optimizers: Iterable[keras.optimizers.Optimizer]
) -> list[keras.Variable]:
    """Returns every Keras variable that a step may touch, each once: weights, seeds, metrics, slots."""
    found: dict[int, keras.Variable] = {}
    for variable in [*model.variables, *model.metrics_variables]:
        found[id(variable)] = variable
    for optimizer in optimizers:
        for variable in optimizer.variables:
            found[id(variable)] = variable
    return list(found.values())


@contextlib.contextmanager
def answering_alone(model: keras.Model, strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Lets a model's own `predict` and `evaluate`, as callbacks call them, use this process's first copy of it.

    Keras would have all replicas take part: that fails where they get parts of different sizes, and waits for ever
    where one worker asks alone. The metrics that training has counted so far stay as they are.

    Leans on `Variable._value`, `TensorFlowTrainer._distribute_strategy`, `predict_function` and `test_function`.

    Args:
        model: Built, in the strategy's scope.
        strategy: Any but the default one.
    """
    traced: dict[str, Any] = {"_distribute_strategy": None, "predict_function": None, "test_function": None}
    compiled = compiled_parts(model)

    def alone(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled
            if any(a is not b for a, b in zip(compiled, compiled_parts(model), strict=True)):
                compiled = compiled_parts(model)
                traced.update(predict_function=None, test_function=None)
            local = strategy.experimental_local_results
            variables = [(v, local(native(v))[0]) for v in all_variables(model, find_optimizers(model))]
            counted = [(own, own.numpy()) for own in (local(native(v))[0] for v in model.metrics_variables)]
            binding = ReplicaBinding(variables=variables)
            shared = {name: model.__dict__.get(name) for name in traced}
            binding.install()
            model.__dict__.update(traced)
            try:
                return method(*args, **kwargs)
            finally:
                traced.update({name: model.__dict__.get(name) for name in traced})
                model.__dict__.update(shared)
                binding.remove()
                for variable, value in counted:
                    variable.assign(value)

        return answer

    names = ("predict", "evaluate", "predict_on_batch", "test_on_batch")
    with holding(model, **{name: alone(getattr(model, name)) for name in names}):
        yield


def allow_bare_values() -> None:
    """Lets `float`, `int` and NumPy read a variable of several replicas, as callbacks do with the learning rate.

    Adds what `DistributedVariable` lacks beside a variable of one device.
    """
    cls = distributed_values.DistributedVariable
    cls.__float__ = lambda self: float(self.numpy())
    cls.__int__ = lambda self: int(self.numpy())
    cls.__array__ = lambda self, dtype=None: np.asarray(self.numpy(), dtype)


def supports_xla(model: keras.Model) -> bool:
    """Says whether Keras itself would let XLA compile the model."""
    return bool(model_supports_jit(model))


def creating_strategy(model: keras.Model) -> tf.distribute.Strategy | None:
    """Returns the strategy in whose scope the model was made, or None.

    Leans on `TensorFlowTrainer._distribute_strategy`.
    """
    return model._distribute_strategy


def is_compiled_within(model: keras.Model, strategy: tf.distribute.Strategy) -> bool:
    """Tells whether a model's optimizers and metrics were made in a strategy's scope.

    Leans on `Optimizer._distribution_strategy`.
    """
    optimizers = [inner for o in find_optimizers(model) for inner in (o, *inner_optimizers(o))]
    if any(optimizer._distribution_strategy is not strategy for optimizer in optimizers):
        return False
    if strategy.num_replicas_in_sync == 1:
        return True  # one copy serves all, as under ps
    made = [native(variable) for metric in flat_metrics(model) for variable in metric.variables]
    return all(strategy.extended.variable_created_in_scope(variable) for variable in made)


def output_structure(model: keras.Model) -> Any:
    """Returns the nest in which a functional or `Sequential` model returns its outputs.

    Leans on `Sequential._functional`, and on `Functional.call` returning a list of one as that one.
    """
    structure = (getattr(model, "_functional", None) or model).output
    return structure[0] if isinstance(structure, (list, tuple)) and len(structure) == 1 else structure


def standard_inputs(model: keras.Model, x: Any) -> list[Any]:
    """Returns a batch's inputs as a functional or `Sequential` model takes them, in the order of `model.inputs`.

    Leans on `Sequential._functional` and `Functional._standardize_inputs`.
    """
    return (getattr(model, "_functional", None) or model)._standardize_inputs(x)
