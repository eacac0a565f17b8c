"""Every touch of a private Keras or TensorFlow name, checked on Keras 3.15.1 and TensorFlow 2.21.0.

Nothing else in tfdist may name one. Each function says which private name it leans on;
`tests/unit/test_keras_internals.py` fails when a version changes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend import compute_output_spec
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.losses import loss as keras_loss
from keras.src.models.functional import Functional
from keras.src.optimizers import base_optimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer
from keras.src.saving import saving_lib
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.trainer import model_supports_jit
from tensorflow.python.distribute import distribute_lib
from tensorflow.python.distribute import values as distributed_values
from tensorflow.python.eager import context
from tensorflow.python.framework.config import is_op_determinism_enabled

# By its private name: `tf.distribute.get_strategy` makes a graph, with which TensorFlow starts a thread and draws its
# first random names. Processes forked after that would share both.
DEFAULT_STRATEGY: tf.distribute.Strategy = distribute_lib._get_default_strategy()

_reduce_weighted_values = keras_loss.reduce_weighted_values
_ABSENT = object()
# Of a generator or `PyDataset` Keras looks at so many batches, to see which axes vary.
NUM_BATCHES_LOOKED_AT: int = data_adapter_utils.NUM_BATCHES_FOR_TENSOR_SPEC
# Of `ExternalStatePolicy`: saving says no, rather than leave something out.
_FAIL_ON_EXTERNAL_STATE = 2

# A day: whoever waits at a barrier is told at once of a task that dies.
_BARRIER_MSECS = 24 * 60 * 60 * 1000

ApplyFn = Callable[..., Any]
LossCorrection = Callable[[Any, Any, Any, str | None], Any]


@contextlib.contextmanager
def _holding(owner: Any, **values: Any) -> Iterator[None]:
    """Lets an object, a class or a module have other attributes meanwhile."""
    # Of an object past Keras's own __setattr__, which would track the value.
    put, remove = (setattr, delattr) if isinstance(owner, type) else (object.__setattr__, object.__delattr__)
    saved = {name: vars(owner).get(name, _ABSENT) for name in values}
    try:
        for name, value in values.items():
            put(owner, name, value)
        yield
    finally:
        for name, value in saved.items():
            if value is _ABSENT:
                remove(owner, name)
            else:
                put(owner, name, value)


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


def set_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Replaces a compiled model's optimizer, also in what `model.save` writes.

    Leans on `Trainer._compile_config`.
    """
    model.optimizer = optimizer
    if model._compile_config is not None:
        model._compile_config.config["optimizer"] = keras.saving.serialize_keras_object(optimizer)


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the state variable of every seed generator in the model.

    Leans on `Layer._flatten_layers` and `Layer._seed_generators`.
    """
    found: dict[int, keras.Variable] = {}
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            found[id(generator.state)] = generator.state
    return list(found.values())


def find_optimizers(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Returns the compiled optimizer and those that a model with its own `train_step` keeps as attributes.

    Leans on `Layer._flatten_layers`.
    """
    found: dict[int, keras.optimizers.Optimizer] = {}
    for layer in model._flatten_layers():
        for attribute in vars(layer).values():
            for value in attribute if isinstance(attribute, (list, tuple)) else [attribute]:
                if isinstance(value, keras.optimizers.Optimizer):
                    found[id(value)] = value
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


def has_metrics(model: keras.Model) -> bool:
    """Tells whether a model's metrics can be asked: not before they have seen a target.

    Leans on `Trainer._compile_metrics`.
    """
    metrics = getattr(model, "_compile_metrics", None)
    return metrics is None or metrics.built


def has_loss_by_output(model: keras.Model) -> bool:
    """Tells whether a built model logs the loss of each output: these means weigh batches by their static size."""
    loss = getattr(model, "_compile_loss", None)
    return loss is not None and len(loss.metrics) > 0


def flat_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Returns a built model's metrics one by one: what `compile` was given is one object that holds several."""
    found: list[keras.metrics.Metric] = []
    for metric in model.metrics:
        found += getattr(metric, "metrics", None) or [metric]
    return found


def asked_metrics(model: keras.Model) -> list[Any]:
    """Returns the metrics that `compile` was given, by name or as objects, one by one.

    Leans on `Trainer._compile_metrics`, and on its `_user_metrics` and `_user_weighted_metrics`.
    """
    asked = model._compile_metrics
    if asked is None:
        return []
    return [
        m for m in keras.tree.flatten([asked._user_metrics, asked._user_weighted_metrics]) if m is not None
    ]


def loss_axis(loss: keras.losses.Loss) -> int:
    """Returns the axis of the classes in a cross-entropy's outputs. Leans on `LossFunctionWrapper._fn_kwargs`."""
    return loss._fn_kwargs.get("axis", -1)


def resets_by_variables(model: keras.Model) -> bool:
    """Says whether a model's metrics begin anew by their variables alone: a `reset_state` of one's own may do more."""
    resets = [type(metric).reset_state for metric in flat_metrics(model)]
    return type(model).reset_metrics is keras.Model.reset_metrics and all(
        reset.__module__.startswith("keras.") for reset in resets
    )


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


def native(variable: keras.Variable) -> Any:
    """Returns the TensorFlow variable behind a Keras variable, free of casts and scopes.

    Leans on `Variable._value`.
    """
    return variable._value


class ReplicaBinding:
    """Points Keras variables at one replica's own TensorFlow variables, and its optimizers at one gradient exchange.

    With it in force a Keras step reads and writes plain local variables, as on one device. It must be
    lifted whenever another replica's thread may run, that is, around every exchange.

    Layers keep the losses that they add (`add_loss`, activity regularizers) until the model is called again: each
    replica has its own list of them, or one that meets the others inside its step would count theirs.

    Leans on `Variable._value`, `Layer._losses`, `Optimizer._distribution_strategy`, `Optimizer._var_key`,
    `Optimizer._all_reduce_sum_gradients` and `keras.src.losses.loss.reduce_weighted_values`, in which every
    `keras.Loss` ends; and on Keras looking `compute_loss` up in the model itself.
    """

    def __init__(
        self,
        *,
        variables: Sequence[tuple[keras.Variable, tf.Variable]] = (),
        optimizers: Sequence[keras.optimizers.Optimizer] = (),
        apply: Callable[[keras.optimizers.Optimizer, ApplyFn], ApplyFn] = lambda _, apply: apply,
        loss_correction: LossCorrection = lambda *args: None,
        model: keras.Model | None = None,
        note_loss: Callable[..., None] | None = None,
        updates: Sequence[tuple[keras.metrics.Metric, Callable[..., Any]]] = (),
    ) -> None:
        """Prepares the binding.

        Args:
            variables: Keras variable and this replica's own TensorFlow variable.
            optimizers: Those whose `apply` a step may call.
            apply: `(optimizer, its apply) → the apply to use`.
            loss_correction: `(values, sample_weight, mask, reduction) → factor on the reduced loss, or None`.
            model: Whose layers keep their losses apart, and whose `compute_loss` is listened to.
            note_loss: `(loss, is_total=…)`, told of each reduced loss and each total; None: of none.
            updates: Metrics, and what stands for their `update_state`.
        """
        self._model = model
        self._note_loss = note_loss
        self._loss_correction = loss_correction
        self._variables = variables
        self._optimizers = [o for outer in optimizers for o in (outer, *_inner_optimizers(outer))]
        self._applies = [(o, apply(o, o.apply)) for o in optimizers]
        self._updates = updates
        self._losses: list[tuple[Any, list[Any]]] = (
            [] if model is None else [(layer, []) for layer in model._flatten_layers()]
        )
        self._saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        self.install()

    def __exit__(self, *exc_info: Any) -> None:
        self.remove()

    def install(self) -> None:
        """Puts the binding in force."""
        for variable, local in self._variables:
            self._set(variable, "_value", local)
        for optimizer in self._optimizers:
            self._set(optimizer, "_distribution_strategy", DEFAULT_STRATEGY)
            self._set(optimizer, "_all_reduce_sum_gradients", list)
            self._set(optimizer, "_var_key", functools.partial(_key_of, optimizer))
        for optimizer, apply in self._applies:
            self._set(optimizer, "apply", apply)
        for metric, update in self._updates:
            self._set(metric, "update_state", update)
        for layer, losses in self._losses:
            self._set(layer, "_losses", losses)
        self._set(keras_loss, "reduce_weighted_values", self._reduced_loss)
        if self._model is not None and self._note_loss is not None:
            self._set(self._model, "compute_loss", self._total_loss)

    def remove(self) -> None:
        """Restores what `install` replaced."""
        for owner, name, value in reversed(self._saved):
            if value is _ABSENT:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = value
        self._saved.clear()

    def _reduced_loss(
        self,
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        loss = _reduce_weighted_values(
            values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
        )
        factor = self._loss_correction(
            values, sample_weight, mask, keras_loss.standardize_reduction(reduction)
        )
        loss = loss if factor is None else loss * tf.cast(factor, loss.dtype)
        if self._note_loss is not None and len(loss.shape) == 0:
            self._note_loss(loss, is_total=False)
        return loss

    def _total_loss(self, *args: Any, **kwargs: Any) -> Any:
        assert self._model is not None and self._note_loss is not None
        loss = type(self._model).compute_loss(self._model, *args, **kwargs)
        self._note_loss(loss, is_total=True)
        return loss

    def _set(self, owner: Any, name: str, value: Any) -> None:
        # Straight into __dict__: Keras's __setattr__ would track the value as a part of the layer.
        self._saved.append((owner, name, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value


def _key_of(optimizer: keras.optimizers.Optimizer, variable: Any) -> Any:
    """Returns by what an optimizer knows a variable, also after a step has assigned it and captured the value."""
    own = native(variable) if isinstance(variable, keras.Variable) else variable
    return type(optimizer)._var_key(optimizer, own)


def _inner_optimizers(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    return [optimizer.inner_optimizer] if isinstance(optimizer, LossScaleOptimizer) else []


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
    with _holding(model, **{name: alone(getattr(model, name)) for name in names}):
        yield


def allow_bare_values() -> None:
    """Lets `float`, `int` and NumPy read a variable of several replicas, as callbacks do with the learning rate.

    Adds what `DistributedVariable` lacks beside a variable of one device.
    """
    cls = distributed_values.DistributedVariable
    cls.__float__ = lambda self: float(self.numpy())
    cls.__int__ = lambda self: int(self.numpy())
    cls.__array__ = lambda self, dtype=None: np.asarray(self.numpy(), dtype)


def trainable_variables_of(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Returns the weights that an optimizer was built for, in the order in which it takes their gradients.

    Leans on `Optimizer._trainable_variables`.
    """
    return list(optimizer._trainable_variables)


def batch_counter(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """Returns the variable that counts batches, those that were only accumulated too.

    Leans on `Optimizer._iterations`; the public `iterations` is no variable where gradients are accumulated.
    """
    return optimizer._iterations


def accumulators(optimizer: keras.optimizers.Optimizer) -> dict[int, Any]:
    """Returns the TensorFlow variables in which an optimizer sums gradients, by the id of the Keras variable.

    Leans on `Optimizer._accumulated_gradients` and `Optimizer._trainable_variables`.
    """
    pairs = zip(optimizer._trainable_variables, optimizer._accumulated_gradients, strict=True)
    return {id(v): native(a) for v, a in pairs if a is not None}


@contextlib.contextmanager
def accumulating_with(
    optimizer: keras.optimizers.Optimizer,
    gather: Callable[[Sequence[Any], Sequence[keras.Variable]], Sequence[Any] | None],
) -> Iterator[None]:
    """Lets `gather` decide, instead of a shared counter, when an optimizer that accumulates updates its weights.

    Leans on `Optimizer._backend_apply_gradients` and what it calls: `_clip_gradients`, `_apply_weight_decay`,
    `_backend_update_step`, `_update_model_variables_moving_average`, `_overwrite_model_variables_with_average_value`.

    Args:
        optimizer: One with `gradient_accumulation_steps`.
        gather: `(gradients, variables) → gradients to apply, or None: not yet`.
    """

    def apply(grads: Sequence[Any], variables: Sequence[keras.Variable]) -> None:
        ready = gather(grads, variables)
        if ready is not None:
            ready = optimizer._clip_gradients(ready)
            optimizer._apply_weight_decay(variables)
            optimizer._backend_update_step(ready, variables, optimizer.learning_rate)
        if optimizer.use_ema:
            everything = optimizer._trainable_variables
            optimizer._update_model_variables_moving_average(everything)
            if optimizer.ema_overwrite_frequency:
                keras.ops.cond(
                    (optimizer.iterations + 1) % optimizer.ema_overwrite_frequency == 0,
                    lambda: optimizer._overwrite_model_variables_with_average_value(everything),
                    lambda: None,
                )

    with _holding(optimizer, _backend_apply_gradients=apply):
        yield


@contextlib.contextmanager
def updating_with(
    optimizer: keras.optimizers.Optimizer, update: Callable[[Any, Any, Any], None]
) -> Iterator[None]:
    """Lets `update` take the place of an optimizer's `update_step`, which Keras looks up in the optimizer itself.

    Args:
        optimizer: Any.
        update: `(gradient, TensorFlow variable, learning rate)`.
    """
    with _holding(optimizer, update_step=update):
        yield


def adam_slots(optimizer: keras.optimizers.Adam, variable: Any) -> tuple[Any, Any]:
    """Returns the TensorFlow variables of a weight's two moments.

    Leans on `Adam._momentums`, `Adam._velocities` and `Optimizer._get_variable_index`.

    Args:
        optimizer: Built.
        variable: The TensorFlow variable of the weight.
    """
    index = optimizer._get_variable_index(variable)
    return native(optimizer._momentums[index]), native(optimizer._velocities[index])


@contextlib.contextmanager
def scaling_rate(optimizer: keras.optimizers.Optimizer, factor: Any) -> Iterator[None]:
    """Multiplies an optimizer's learning rate, a schedule's too.

    Leans on `Optimizer._get_current_learning_rate`, which `learning_rate` asks.
    """
    current = optimizer._get_current_learning_rate

    def scaled() -> Any:
        rate = tf.convert_to_tensor(current())
        return rate * tf.cast(factor, rate.dtype)

    with _holding(optimizer, _get_current_learning_rate=scaled):
        yield


def is_deterministic() -> bool:
    """Says whether TensorFlow may run deterministic operations alone, as a call or TF_DETERMINISTIC_OPS has told it."""
    return bool(is_op_determinism_enabled())


def supports_xla(model: keras.Model) -> bool:
    """Says whether Keras itself would let XLA compile the model."""
    return bool(model_supports_jit(model))


def forget_cluster() -> None:
    """Lets this process forget its cluster and everything made in it, so that it may join another.

    Leans on `tensorflow.python.eager.context._reset_context`.
    """
    keras.backend.clear_session()
    # What is left of the old cluster would be deleted in the new context, where its devices are unknown.
    gc.collect()
    context._reset_context()


def wait_at_barrier() -> None:
    """Returns once every task of a sync cluster has called it, by TensorFlow's coordination service.

    Leans on `context.wait_at_barrier`. It takes 1 to 4 ms, and Python runs nothing else while it waits.

    Raises:
        tf.errors.OpError: If a task is gone, or the one that keeps the barrier.
    """
    context.context().wait_at_barrier("tfdist", _BARRIER_MSECS)


@contextlib.contextmanager
def watching_outputs(model: keras.Model, look: Callable[[Any, Any], None]) -> Iterator[None]:
    """Shows what every layer of a model returns, and every operation between layers, the innermost first.

    Leans on `Layer._flatten_layers`, and on `Operation.__call__` looking `call` up in the instance.

    Args:
        model: Built.
        look: `(layer or operation, its outputs)`, called after each call.
    """
    found: dict[int, Any] = {}
    for layer in model._flatten_layers():
        for operation in (layer, *getattr(layer, "operations", ())):
            found[id(operation)] = operation

    def watch(operation: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            look(operation, outputs)
            return outputs

        return watched

    with contextlib.ExitStack() as watching:
        for operation in found.values():
            watching.enter_context(_holding(operation, call=watch(operation, operation.call)))
        yield


def replace_call(operation: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts what `make` returns of a layer's `call` in its place. Leans on Keras calling what it finds in `__dict__`.

    Args:
        operation: The layer, built.
        make: `(the call of the layer's class) → another`, with the same arguments; an earlier one is gone.
    """
    # Straight into __dict__: Keras's __setattr__ would track the value.
    operation.__dict__["call"] = make(functools.partial(type(operation).call, operation))


def attention_parts(layer: keras.layers.MultiHeadAttention) -> tuple[list[Any], keras.layers.Dropout]:
    """Returns the projections of a built attention layer to its heads, and what drops scores of theirs.

    Leans on `MultiHeadAttention._gate_dense`, `._use_gate` and `._dropout_layer`.
    """
    projections = [layer.query_dense, layer.key_dense, layer.value_dense]
    return [*projections, *([layer._gate_dense] if layer._use_gate else [])], layer._dropout_layer


def is_plain(layer: keras.Layer) -> bool:
    """Tells whether a layer's weights are those that it was built with: not quantized, without LoRA."""
    return not getattr(layer, "lora_enabled", False) and layer.dtype_policy.quantization_mode is None


def keep_mask(source: Any, target: Any) -> Any:
    """Returns a tensor with the mask that another carries by the side. Leans on `_keras_mask`."""
    mask = getattr(source, "_keras_mask", None)
    if mask is not None:
        target._keras_mask = mask
    return target


def creating_strategy(model: keras.Model) -> tf.distribute.Strategy | None:
    """Returns the strategy in whose scope the model was made, or None.

    Leans on `TensorFlowTrainer._distribute_strategy`.
    """
    return model._distribute_strategy


def is_compiled_within(model: keras.Model, strategy: tf.distribute.Strategy) -> bool:
    """Tells whether a model's optimizers and metrics were made in a strategy's scope.

    Leans on `Optimizer._distribution_strategy`.
    """
    optimizers = [inner for o in find_optimizers(model) for inner in (o, *_inner_optimizers(o))]
    if any(optimizer._distribution_strategy is not strategy for optimizer in optimizers):
        return False
    if strategy.num_replicas_in_sync == 1:
        return True  # one copy serves all, as under ps
    made = [native(variable) for metric in flat_metrics(model) for variable in metric.variables]
    return all(strategy.extended.variable_created_in_scope(variable) for variable in made)


def save_iterator(iterator: Any) -> bytes:
    """Returns where a `tf.data` iterator stands, with what its buffers hold.

    Leans on `OwnedIterator._iterator_resource`; the public `tf.train.Checkpoint` takes the same way to a file.

    Raises:
        OpError: `tf.errors.OpError` if a part of the pipeline cannot be saved.
    """
    state = tf.raw_ops.SerializeIterator(
        resource_handle=iterator._iterator_resource, external_state_policy=_FAIL_ON_EXTERNAL_STATE
    )
    return tf.io.serialize_tensor(state).numpy()


def stop_data_server(server: Any) -> None:
    """Stops a server of a tf.data service at once; its public end is that of the process, or of the last reference.

    Leans on `DispatchServer._stop` and `WorkerServer._stop`.
    """
    server._stop()


def restore_iterator(iterator: Any, content: bytes) -> None:
    """Brings a fresh iterator over the same pipeline to where `save_iterator` found another.

    Leans on `OwnedIterator._iterator_resource`.

    Raises:
        OpError: `tf.errors.OpError` if the pipeline is another one.
    """
    tf.raw_ops.DeserializeIterator(
        resource_handle=iterator._iterator_resource, serialized=tf.io.parse_tensor(content, tf.variant)
    )


def find_layers(model: keras.Model, kind: type) -> list[Any]:
    """Returns the model's layers of a class, however deep they are nested.

    Leans on `Layer._flatten_layers`.
    """
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


class ClipsSlices:
    """Mixed into an optimizer, clips row-sparse gradients as the dense ones that they stand for.

    Their rows must be unique: then the missing ones, which are zeros, change neither a norm nor what is clipped.

    Leans on `Optimizer._clip_gradients`.
    """

    def _clip_gradients(self, grads: Sequence[Any]) -> list[Any]:
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads]
        clipped = super()._clip_gradients(values)  # type: ignore[misc]
        return [
            tf.IndexedSlices(new, old.indices, old.dense_shape) if isinstance(old, tf.IndexedSlices) else new
            for old, new in zip(grads, clipped, strict=True)
        ]


class OptimizerView:
    """An optimizer as its own `update_step` sees it, but with other variables in place of its slots.

    Leans on `Optimizer._get_variable_index` and on slots being kept in lists, one entry for each weight.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, variable: Any, replace: Callable[[Any], Any]
    ) -> None:
        """Prepares the view.

        Args:
            optimizer: A built optimizer.
            variable: The TensorFlow variable of the weight that is updated.
            replace: `TensorFlow variable of a slot → what stands for it`.
        """
        self._optimizer = optimizer
        self._index = optimizer._get_variable_index(variable)
        self._replace = replace

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._optimizer, name)
        # Keras hands its lists back wrapped, as a kind of list too.
        return [self._replace(native(value[self._index]))] if isinstance(value, list) and value else value

    def _get_variable_index(self, variable: Any) -> int:
        del variable
        return 0  # The lists hold this weight's slot alone.


def decays(optimizer: keras.optimizers.Optimizer, variable: Any) -> bool:
    """Tells whether an optimizer's weight decay reaches a variable.

    Leans on `Optimizer._use_weight_decay`.
    """
    return optimizer.weight_decay is not None and bool(optimizer._use_weight_decay(variable))


def is_available(value: tf.distribute.experimental.coordinator.RemoteValue) -> bool:
    """Tells whether a coordinator's closure has ended; its public `get` and `fetch` wait until it has.

    Leans on `RemoteValueImpl._status_available_event`.
    """
    return bool(value._status_available_event.is_set())


def num_ps(strategy: tf.distribute.Strategy) -> int:
    """Returns how many ps tasks hold a strategy's variables, 0 where there are none.

    Leans on `ParameterServerStrategyV2Extended._num_ps`; the strategy's public `cluster_resolver` is None. A cluster is
    needed to make one: `tests/conformance/test_tables.py` fails when a version changes the name.
    """
    if not isinstance(strategy, tf.distribute.ParameterServerStrategy):
        return 0
    return int(strategy.extended._num_ps)


def reuse_instance_keys(strategy: tf.distribute.MirroredStrategy) -> None:
    """Lets a sum keep its number, where TensorFlow gives it another one each step, and 1.6 kB that stay.

    One process traces once for all replicas, which then number alike; workers, who may trace at different times, need
    new ones. So does what changes its shape, as what is gathered does.

    Leans on `MirroredExtended._collective_ops`, its `_launchers`, their `all_reduce` and `_use_unique_instance_key`.
    """
    for launcher in getattr(strategy.extended._collective_ops, "_launchers", ()):
        launcher.all_reduce = functools.partial(_reduce_by_one_key, launcher)


def _reduce_by_one_key(launcher: Any, tensor: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
    with _holding(launcher, _use_unique_instance_key=lambda: not tensor.shape.is_fully_defined()):
        return type(launcher).all_reduce(launcher, tensor, *args, **kwargs)


def place_by_bytes(strategy: tf.distribute.ParameterServerStrategy) -> None:
    """Lets every new variable go to the ps task that holds the fewest bytes; TensorFlow deals them out in turn.

    What is created beside another variable, as an optimizer's slots are, stays with that one.

    Leans on `ParameterServerStrategyV2Extended._create_variable`, `._variable_count` and `._num_ps`.
    """
    extended = strategy.extended
    create = extended._create_variable
    num_bytes = [0] * extended._num_ps

    def create_variable(next_creator: Any, **kwargs: Any) -> Any:
        extended._variable_count = num_bytes.index(min(num_bytes))
        variable = create(next_creator, **kwargs)
        place = tf.DeviceSpec.from_string(variable.device)
        if place.job == "ps":
            num_bytes[place.task] += variable.shape.num_elements() * variable.dtype.size
        return variable

    extended._create_variable = create_variable


@contextlib.contextmanager
def saving_in_blocks(blocks_of: Callable[[keras.Variable], Iterator[Any] | None]) -> Iterator[None]:
    """Within it `Model.save` holds a block of a variable at a time; Keras gathers the whole model if it may fit.

    Leans on `saving_lib._MEMORY_UPPER_BOUND` (the share of the free memory that a model may take), on
    `H5IOStore.__setitem__` and what it makes a group with, and on numbers as keys in `Optimizer.save_own_variables`.

    Args:
        blocks_of: Returns a large variable's runs of rows, in order; None for a small one.
    """
    set_item = saving_lib.H5IOStore.__setitem__

    def set_in_blocks(store: Any, key: str, value: Any) -> None:
        blocks = blocks_of(value) if isinstance(value, keras.Variable) else None
        if blocks is None:
            set_item(store, key, value)
            return
        if not store._h5_entry_initialized:
            store._create_h5_group(store._h5_entry_path)
        dataset = store._h5_entry_group.create_dataset(key, whole_shape(value), value.dtype)
        if not value.shape:
            (dataset[()],) = blocks
            return
        start = 0
        for block in blocks:
            dataset[start : start + len(block)] = block
            start += len(block)

    def save_own_variables(optimizer: keras.optimizers.Optimizer, store: Any) -> None:
        for place, variable in enumerate(optimizer.variables):
            store[str(place)] = variable if blocks_of(variable) is not None else variable.numpy()

    with (
        _holding(saving_lib, _MEMORY_UPPER_BOUND=0),
        _holding(saving_lib.H5IOStore, __setitem__=set_in_blocks),
        _holding(keras.optimizers.Optimizer, save_own_variables=save_own_variables),
    ):
        yield


def batch_spec(batches: Sequence[Any]) -> Any:
    """Returns the nest of `tf.TypeSpec` that batches have in common, axes in which they differ left open.

    Leans on `data_adapter_utils.get_tensor_spec`.
    """
    return data_adapter_utils.get_tensor_spec(batches)


def batch_reader(data: keras.utils.PyDataset) -> Callable[[int], Any]:
    """Returns what reads a batch by its number, as Keras would hand it to `train_step`.

    Leans on `PyDatasetAdapter._standardize_batch`.
    """
    adapter = PyDatasetAdapter(data)
    return lambda place: adapter._standardize_batch(data[place])


def is_torch_loader(data: Any) -> bool:
    """Tells whether data are a PyTorch `DataLoader`, without PyTorch. Leans on `data_adapters.is_torch_dataloader`."""
    return bool(data_adapters.is_torch_dataloader(data))


def is_grain_dataset(data: Any) -> bool:
    """Tells whether data are grain's, without grain. Leans on `data_adapters.is_grain_dataset`."""
    return bool(data_adapters.is_grain_dataset(data))


def adapt_batches(data: Any) -> tuple[tf.data.Dataset, int | None]:
    """Returns what Keras makes of data that yield batches, and how many they are. Leans on `get_data_adapter`."""
    adapter = data_adapters.get_data_adapter(data)
    return adapter.get_tf_dataset(), adapter.num_batches


def flatten_logs(model: keras.Model, logs: dict[str, Any]) -> Any:
    """Returns what `keras.Model.evaluate` does without `return_dict`. Leans on `Trainer._flatten_metrics_in_order`."""
    return model._flatten_metrics_in_order(logs)


@contextlib.contextmanager
def deferring_variables() -> Iterator[list[tuple[keras.Variable, keras.Variable]]]:
    """Lets variables that have an initializer be made without memory: `materialize` gives them their first value.

    It is the one that they would have had, since every initializer has a seed of its own. An optimizer's slots need not
    lie beside a weight, which has no place yet.

    Leans on `Variable._initialize_with_initializer`, `._deferred_initialize`, `._initializer` and `._value`, and on
    what `TFOptimizer` asks of a weight when it is built: `_var_key`, `add_variable_from_reference`.

    Yields:
        The optimizers' slots that are made while it is in force, each with its weight.
    """
    slots: list[tuple[keras.Variable, keras.Variable]] = []
    create = {
        "_initialize_with_initializer": _keep_initializer,
        "_deferred_initialize": lambda variable: None,
    }
    add = {"_var_key": _key_of_any(TFOptimizer._var_key), "add_variable_from_reference": _add_slot(slots)}
    with _holding(keras.Variable, **create), _holding(TFOptimizer, **add):
        yield slots


def _keep_initializer(variable: keras.Variable, initializer: Callable[..., Any]) -> None:
    variable._value = None
    variable._initializer = initializer
    variable._was_deferred = True


def _key_of_any(var_key: Callable[..., Any]) -> Callable[..., Any]:
    def key_of(optimizer: keras.optimizers.Optimizer, variable: Any) -> Any:
        is_absent = isinstance(variable, keras.Variable) and variable._value is None
        return id(variable) if is_absent else var_key(optimizer, variable)

    return key_of


def _add_slot(slots: list[tuple[keras.Variable, keras.Variable]]) -> Callable[..., Any]:
    def add(optimizer: Any, reference_variable: Any, *args: Any, **kwargs: Any) -> Any:
        slot = super(TFOptimizer, optimizer).add_variable_from_reference(reference_variable, *args, **kwargs)
        slots.append((slot, reference_variable))
        return slot

    return add


def was_deferred(variable: keras.Variable) -> bool:
    """Tells whether a variable was made within `deferring_variables`."""
    return getattr(variable, "_was_deferred", False)


def has_memory(variable: keras.Variable) -> bool:
    """Tells whether a variable has its value here, or a part of it. Leans on `Variable._value`."""
    return variable._value is not None


def own_part(variable: keras.Variable) -> tuple[slice, ...] | None:
    """Returns what of a variable's value is here, as `materialize` was told; None: all, or nothing."""
    return getattr(variable, "_own_part", None)


def whole_shape(variable: keras.Variable) -> tuple[int, ...]:
    """Returns the shape of all of a variable's value, of which a part may be here."""
    return getattr(variable, "_whole_shape", tuple(variable.shape))


def is_whole(variable: keras.Variable) -> bool:
    """Tells whether all of a variable's value is here."""
    return has_memory(variable) and own_part(variable) is None


def count_parameters(model: keras.Model) -> int:
    """Returns the numbers in a built model's weights, wherever they are."""
    return sum(math.prod(whole_shape(weight)) for weight in model.weights)


def materialize(
    variable: keras.Variable,
    part: tuple[slice, ...] | None = None,
    *,
    beside: keras.Variable | None = None,
) -> None:
    """Gives a variable that was made within `deferring_variables` its first value; one that has it keeps it.

    Leans on `Variable._deferred_initialize`, `._initializer` and `._shape`.

    Args:
        variable: It.
        part: What of its value is to be here, with a slice for each of its first axes; its `shape` is that part's from
            now on.
        beside: The weight for which an optimizer keeps it, if it was made in the shape of the weight's part.
    """
    if variable._value is not None:
        return
    if part is not None:
        whole, shape = variable._initializer, tuple(variable.shape)
        variable._initializer = lambda own_shape, dtype: whole(shape, dtype=dtype)[part]
        variable._own_part, variable._whole_shape = part, shape
        cuts = (len(range(size)[cut]) for size, cut in zip(shape, part, strict=False))
        variable._shape = (*cuts, *shape[len(part) :])
    elif beside is not None and own_part(beside) is not None and variable.shape == beside.shape:
        variable._own_part, variable._whole_shape = own_part(beside), whole_shape(beside)
    variable._deferred_initialize()


class _Refusing:
    """An initializer that computes nothing but what is built, or traced to see shapes."""

    def __init__(self, initializer: Callable[..., Any], why: str) -> None:
        self._initializer = initializer
        self._why = why

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if keras.Variable._initialize_with_initializer is not _keep_initializer:
            raise RuntimeError(self._why)
        return self._initializer(*args, **kwargs)


def refuse_reading(variable: keras.Variable, why: str) -> None:
    """Lets whoever reads a variable that has no value be told so; Keras would make up its first value.

    Leans on `Variable._initializer`.
    """
    if not isinstance(variable._initializer, _Refusing):
        variable._initializer = _Refusing(variable._initializer, why)


@contextlib.contextmanager
def loading_present() -> Iterator[None]:
    """Lets each variable keep what it has of what is assigned to it, as when a whole model's file is read.

    Leans on `Variable._value`, and on Keras assigning by `Variable.assign`.
    """
    assign = keras.Variable.assign

    def assign_if_present(variable: keras.Variable, value: Any) -> Any:
        if variable._value is not None:
            assign(variable, value if own_part(variable) is None else value[own_part(variable)])
        return value

    with _holding(keras.Variable, assign=assign_if_present):
        yield


@contextlib.contextmanager
def updating_only(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable], *, norm: Any = None
) -> Iterator[None]:
    """Lets an optimizer that was built for all weights of a model update some, as if there were no others.

    Leans on `Optimizer._trainable_variables`, `._accumulated_gradients` and `._model_variables_moving_average`, lists
    of which Keras walks through all, and on `base_optimizer.global_norm`.

    Args:
        optimizer: Built for all.
        variables: Those that have their values here, in their order.
        norm: Of the gradients by all weights, by which a global norm is clipped; None: of those that are updated.
    """
    wanted = {id(v) for v in variables}
    is_kept = [id(v) in wanted for v in optimizer._trainable_variables]
    names = ("_trainable_variables", "_accumulated_gradients", "_model_variables_moving_average")
    saved = {name: optimizer.__dict__[name] for name in names if name in optimizer.__dict__}
    found = {name: list(itertools.compress(values, is_kept)) for name, values in saved.items()}
    if (
        "_accumulated_gradients" in saved
    ):  # Keras finds these by a weight's place among all, and passes over None
        pairs = zip(saved["_accumulated_gradients"], is_kept, strict=False)
        found["_accumulated_gradients"] = [value if kept else None for value, kept in pairs]
    norms = {} if norm is None else {"global_norm": lambda gradients: norm}
    with _holding(optimizer, **found), _holding(base_optimizer, **norms):
        yield


def square_norm(gradients: Sequence[Any]) -> Any:
    """Returns the sum of the squares of gradients, as an optimizer that clips by the global norm counts them.

    Leans on `base_optimizer.global_norm`.
    """
    return tf.square(base_optimizer.global_norm(list(gradients))) if gradients else tf.constant(0.0)


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A call of a layer, or of an operation between layers, in a functional model's graph.

    Attributes:
        operation: The layer or operation.
        inputs: Symbolic tensors that it takes.
        outputs: Symbolic tensors that it makes.
    """

    operation: Any
    inputs: Sequence[keras.KerasTensor]
    outputs: Sequence[keras.KerasTensor]
    _node: Any

    @property
    def options(self) -> dict[str, Any]:
        """What it was given by name."""
        return dict(self._node.arguments.kwargs)

    def run(self, values: dict[int, Any]) -> None:
        """Makes the call.

        Args:
            values: What stands for each symbolic tensor, by its id; the outputs are added.
        """
        args, kwargs = self._node.arguments.fill_in(values)
        made = keras.tree.flatten(self.operation(*args, **kwargs))
        values.update((id(tensor), value) for tensor, value in zip(self.outputs, made, strict=True))


def layer_calls(model: keras.Model) -> list[LayerCall] | None:
    """Returns the calls of a functional or `Sequential` model in an order in which they can be made; None of others.

    Leans on `Sequential._functional`, `Function._nodes_by_depth`, and on `Node`.
    """
    functional = getattr(model, "_functional", None) or model
    if not isinstance(functional, Functional):
        return None
    depths = sorted(functional._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in functional._nodes_by_depth[depth] if not node.is_input]
    return [LayerCall(n.operation, list(n.input_tensors), list(n.outputs), n) for n in nodes]


def has_mask(tensor: keras.KerasTensor) -> bool:
    """Tells whether a symbolic tensor carries a mask by the side. Leans on `_keras_mask`."""
    return getattr(tensor, "_keras_mask", None) is not None


def compiled_loss(model: keras.Model) -> Callable[..., Any]:
    """Returns the loss that a model was compiled with, `(y, y_pred, sample_weight) → scalar`, without its layers' own.

    Leans on `Trainer._compile_loss`.
    """
    return model._compile_loss


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Returns the metric that is logged as `loss`. Leans on `Trainer._loss_tracker`."""
    return model._loss_tracker


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
