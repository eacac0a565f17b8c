import os
import pickle
import socket
import sys
from pathlib import Path

import keras
import numpy as np
import programs
import pytest
import tensorflow as tf
from keras.src.losses import loss as keras_loss
from keras.src.saving import saving_lib
from tensorflow.python.distribute.coordinator.values import RemoteValueImpl
from tensorflow.python.eager import context

from tfdist import keras_internals
from tfdist.keras_internals import (
    ClipsSlices,
    OptimizerView,
    ReplicaBinding,
    accumulating_with,
    accumulators,
    adam_slots,
    all_variables,
    batch_counter,
    build_model,
    creating_strategy,
    decays,
    find_layers,
    find_optimizers,
    has_metrics,
    is_compiled,
    native,
    saving_in_blocks,
    scaling_rate,
    seed_states,
    set_optimizer,
    trainable_variables_of,
    updating_with,
    watching_outputs,
)
from tfdist.runtime.strategies import build_strategy

X = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
Y = X[:, :1] ** 2
TESTS = str(Path(programs.__file__).parent)
KINDS = ("plain", "loss scale")
OPTIMIZER = keras.optimizers.Optimizer
LOSS_SCALE_OPTIMIZER = keras.mixed_precision.LossScaleOptimizer


class NoExchange(tf.distribute.ReplicaContext):
    """A replica in which nothing may be summed over replicas."""

    def __init__(self):
        super().__init__(tf.distribute.get_strategy(), 0)

    def all_reduce(self, reduce_op, value, options=None):
        raise AssertionError("the optimizer summed gradients by itself")


class OwnOptimizer(keras.Model):
    """Trains one half with the compiled optimizer, the other with one that `compile` never sees."""

    def __init__(self, optimizers):
        super().__init__()
        self.first = keras.layers.Dense(2)
        self.second = keras.layers.Dense(1)
        self.own = optimizers

    def call(self, x):
        return self.second(self.first(x))


class Nested(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(2)])
        self.generator = keras.random.SeedGenerator(5)

    def call(self, x):
        return self.inner(x)


def make_model(optimizer="adam", loss="mse", **kwargs):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    )
    model.compile(optimizer, loss, **kwargs)
    build_model(model, (tf.constant(X), tf.constant(Y)))
    return model


def plain_apply(optimizer, apply):
    return apply


def bind(model, *, local=(), apply=plain_apply, loss_correction=lambda *args: None):
    return ReplicaBinding(
        variables=local,
        optimizers=find_optimizers(model),
        apply=apply,
        loss_correction=loss_correction,
    )


def values_of(variables):
    return [v.numpy() for v in variables]


def assert_all_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def make_optimizer(kind):
    inner = keras.optimizers.Adam(0.01)
    return inner if kind == "plain" else LOSS_SCALE_OPTIMIZER(inner, initial_scale=4.0)


def bound_step(model, **kwargs):
    binding = bind(model, **kwargs)
    with NoExchange():
        binding.install()
        model.train_step((tf.constant(X), tf.constant(Y)))
        binding.remove()


def step_values(kind):
    """The values of all variables after one ordinary step."""
    model = make_model(make_optimizer(kind))
    model.train_step((tf.constant(X), tf.constant(Y)))
    return values_of(all_variables(model, find_optimizers(model)))


def kind_of_instance_key(strategy, shape):
    """The kind of operation that numbers an exchange: what it holds is fixed in the graph, or comes with a call."""

    def total(value):
        context = tf.distribute.get_replica_context()
        own = value + tf.cast(context.replica_id_in_sync_group, tf.float32)
        return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

    function = tf.function(lambda value: strategy.run(total, args=(value,)))
    graph = function.get_concrete_function(tf.TensorSpec(shape)).graph
    exchanges = [op for op in graph.get_operations() if op.type == "CollectiveReduceV2"]
    (kind,) = {op.inputs[3].op.type for op in exchanges}
    return kind


def facts_under_mirrored():
    """What tests ask about a mirrored model; MirroredStrategy is made once a process, so in one of its own."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = build_strategy(strategy="mirrored", cluster=None, num_replicas=2)
    facts = {"keys": [kind_of_instance_key(strategy, [3]), kind_of_instance_key(strategy, [None])]}
    for kind in KINDS:
        with strategy.scope():
            model = make_model(make_optimizer(kind))
        variables = all_variables(model, find_optimizers(model))
        copies = [strategy.experimental_local_results(native(v)) for v in variables]
        before = values_of(second for _, second in copies)
        bound_step(model, local=[(v, first) for v, (first, _) in zip(variables, copies, strict=True)])
        facts[kind] = {
            "is creating strategy": creating_strategy(model) is strategy,
            "before": before,
            "bound replica": values_of(first for first, _ in copies),
            "other replica": values_of(second for _, second in copies),
        }
    return facts


@pytest.fixture(scope="module")
def mirrored_facts(tmp_path_factory):
    out = tmp_path_factory.mktemp("facts") / "facts.pickle"
    done = programs.run([__file__, out], env={**os.environ, "PYTHONPATH": TESTS})
    assert done.returncode == 0, done.stderr
    return pickle.loads(out.read_bytes())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (keras.Model, "_symbolic_build"),
        (keras.Model, "_flatten_layers"),
        (context.Context, "wait_at_barrier"),
        (OPTIMIZER, "_all_reduce_sum_gradients"),
        (OPTIMIZER, "_backend_apply_gradients"),
        (OPTIMIZER, "_clip_gradients"),
        (OPTIMIZER, "_apply_weight_decay"),
        (OPTIMIZER, "_backend_update_step"),
        (OPTIMIZER, "_update_model_variables_moving_average"),
        (OPTIMIZER, "_overwrite_model_variables_with_average_value"),
        (LOSS_SCALE_OPTIMIZER, "apply"),
        (keras_loss, "reduce_weighted_values"),
        (keras_loss, "standardize_reduction"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_private_function_is_there(owner, name):
    assert callable(getattr(owner, name, None))


# In __dict__, since ReplicaBinding replaces some of them there.
@pytest.mark.parametrize(
    ("name", "of_model"),
    [
        ("_compile_config", lambda m: m),
        ("_distribute_strategy", lambda m: m),
        ("_seed_generators", lambda m: m),
        ("_value", lambda m: m.trainable_variables[0]),
        ("_iterations", lambda m: m.optimizer),
        ("_trainable_variables", lambda m: m.optimizer),
        ("_distribution_strategy", lambda m: m.optimizer),
        ("_distribution_strategy", lambda m: m.optimizer.inner_optimizer),
    ],
)
def test_private_attribute_is_there(name, of_model):
    owner = of_model(make_model(LOSS_SCALE_OPTIMIZER(keras.optimizers.SGD())))
    assert name in vars(owner)


@pytest.mark.parametrize("weights", [(), (np.ones(8, "float32"),)], ids=["x-y", "x-y-weight"])
def test_symbolic_build_creates_every_variable(weights):
    model = keras.Sequential(
        [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile("adam", "mse", metrics=["mae"], weighted_metrics=["mse"])
    build_model(model, tuple(map(tf.constant, (X, Y, *weights))))
    assert len(model.trainable_variables) == 6
    assert len(model.optimizer.variables) == 2 + 2 * 6
    assert {m.name for m in model.metrics} >= {"loss", "compile_metrics"}
    made = {id(v) for v in all_variables(model, find_optimizers(model))}
    assert len(model.metrics_variables) == 6

    model.train_on_batch(X, Y, *weights)
    assert {id(v) for v in all_variables(model, find_optimizers(model))} == made


def test_symbolic_build_runs_nothing():
    model = make_model(metrics=["mae"])
    assert int(model.optimizer.iterations) == 0
    assert all(not np.any(v.numpy()) for v in model.metrics_variables)


@pytest.mark.parametrize("kind", [list, tuple])
def test_build_model_gives_slots_to_the_models_own_optimizers(kind):
    own = keras.optimizers.SGD(0.1, momentum=0.9)
    model = OwnOptimizer(kind([own]))
    model.compile("sgd", "mse")
    build_model(model, (tf.constant(X), tf.constant(Y)))
    assert own.built
    assert len(own.variables) == 2 + 4


class TwoParts(keras.Model):
    """No `call()`, nothing built, two optimizers for a part each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(2), keras.layers.Dense(1)
        self.optimizers = [keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.Adam(0.1)]

    def train_step(self, x):
        for part, optimizer in zip((self.first, self.second), self.optimizers, strict=True):
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(keras.ops.square(self.second(self.first(x))))
            weights = part.trainable_weights
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


def test_model_without_call_is_built_by_its_step():
    """Nothing is computed, and each optimizer gets slots for what it is asked to change."""
    model = TwoParts()
    model.compile()
    build_model(model, tf.constant(X))
    assert [len(layer.weights) for layer in (model.first, model.second)] == [2, 2]
    assert [len(o.variables) for o in model.optimizers] == [2 + 2, 2 + 4]
    assert all(int(o.iterations) == 0 for o in model.optimizers)


def test_step_that_cannot_be_built_says_why():
    class Broken(keras.Model):
        def train_step(self, x):
            raise ZeroDivisionError("of its own")

    model = Broken()
    model.compile()
    with pytest.raises(ZeroDivisionError, match="of its own"):
        build_model(model, tf.constant(X))


def test_prediction_needs_the_layers_alone():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    build_model(model, tf.constant(X), is_trained=False)
    assert len(model.weights) == 2
    assert not has_metrics(model)
    build_model(model, (tf.constant(X), tf.constant(Y)))
    assert has_metrics(model)


def test_losses_of_layers_are_kept_apart_while_bound():
    """Each binding has its own, and the model's own come back."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, activity_regularizer="l2")])
    model.compile("sgd", "mse")
    build_model(model, (tf.constant(X), tf.constant(Y)))
    bindings = [
        ReplicaBinding(
            variables=(), optimizers=(), apply=plain_apply, loss_correction=lambda *args: None, model=model
        )
        for _ in range(2)
    ]
    for binding in bindings:
        binding.install()
        model(tf.constant(X))
        assert len(model.losses) == 1
        binding.remove()
        assert model.losses == []
    bindings[0].install()
    assert len(model.losses) == 1
    bindings[0].remove()


def test_optimizer_knows_a_variable_whose_value_a_scope_has_captured():
    model = make_model(keras.optimizers.Adam(0.1))
    (optimizer,) = find_optimizers(model)
    binding = bind(model)
    binding.install()
    with keras.StatelessScope() as scope:
        weight = model.trainable_variables[0]
        scope.add_update((weight, tf.zeros_like(weight.value)))
        assert optimizer._get_variable_index(weight) == 0
    binding.remove()


def test_compile_config_is_what_save_writes(tmp_path):
    model = make_model("sgd")
    set_optimizer(model, keras.optimizers.Adam(0.25))
    build_model(model, (tf.constant(X), tf.constant(Y)))
    model.train_on_batch(X, Y)
    model.save(tmp_path / "model.keras")

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is keras.optimizers.Adam
    assert float(loaded.optimizer.learning_rate) == 0.25
    assert loaded.optimizer.built
    assert_all_equal(values_of(loaded.optimizer.variables), values_of(model.optimizer.variables))


def test_set_optimizer_changes_the_step():
    model = make_model("adam")
    before = values_of(model.trainable_variables)
    set_optimizer(model, keras.optimizers.SGD(0.0))
    model.train_on_batch(X, Y)
    assert_all_equal(values_of(model.trainable_variables), before)


def test_flatten_layers_and_seed_generators_find_nested_seeds():
    nested, outer = Nested(), keras.layers.Dropout(0.1)
    model = keras.Sequential([keras.Input((3,)), nested, outer, keras.Sequential([outer])])
    expected = [nested.generator, nested.inner.layers[0].seed_generator, outer.seed_generator]
    states = seed_states(model)
    assert {id(s) for s in states} == {id(g.state) for g in expected}
    assert len(states) == 3


def test_seed_states_move_when_random_layers_draw():
    model = keras.Sequential([keras.Input((3,)), Nested(), keras.layers.GaussianNoise(0.1)])
    before = values_of(seed_states(model))
    model(X, training=True)
    moved = [not np.array_equal(a, b) for a, b in zip(before, values_of(seed_states(model)), strict=True)]
    assert sum(moved) == 2


def test_find_optimizers_looks_into_attributes_lists_and_nested_models():
    first, second, third = (keras.optimizers.SGD() for _ in range(3))
    inner = OwnOptimizer([first, second])
    model = keras.Sequential([keras.Input((3,)), inner])
    model.own = third
    model.again = third
    model.compile("adam", "mse")
    found = find_optimizers(model)
    assert {id(o) for o in found} == {id(o) for o in (first, second, third, model.optimizer)}
    assert len(found) == 4


def test_find_optimizers_of_an_uncompiled_model_is_empty():
    assert find_optimizers(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])) == []


def test_is_compiled_tells_whether_compile_was_called():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    assert not is_compiled(model)
    model.compile("sgd", "mse")
    assert is_compiled(model)


def test_all_variables_names_each_once():
    model = make_model(metrics=["mae"])
    variables = all_variables(model, [model.optimizer, model.optimizer])
    expected = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    assert len({id(v) for v in variables}) == len(variables)
    assert {id(v) for v in variables} == {id(v) for v in expected}


def test_value_is_the_tensorflow_variable_free_of_autocast():
    seen = {}

    class Look(keras.layers.Dense):
        def call(self, x):
            seen["cast"] = keras.ops.dtype(keras.ops.convert_to_tensor(self.kernel))
            seen["native"] = native(self.kernel).dtype
            return super().call(x)

    layer = Look(2, dtype="mixed_bfloat16")
    layer(X)
    assert isinstance(native(layer.kernel), tf.Variable)
    assert seen == {"cast": "bfloat16", "native": tf.float32}


def test_creating_strategy_is_none_outside_any_scope():
    assert creating_strategy(make_model()) is None


def test_distribute_strategy_is_the_strategy_in_whose_scope_the_model_was_made(mirrored_facts):
    assert mirrored_facts["plain"]["is creating strategy"]


def test_use_unique_instance_key_numbers_anew_what_may_change_its_shape(mirrored_facts):
    assert mirrored_facts["keys"] == ["Const", "Placeholder"]


def test_value_under_a_binding_is_the_local_variable():
    model = make_model()
    dense = model.layers[0]
    own = values_of([dense.kernel, dense.bias])
    kernel, bias = tf.Variable(tf.ones((3, 4))), tf.Variable(tf.zeros(4))
    binding = bind(model, local=[(dense.kernel, kernel), (dense.bias, bias)])
    binding.install()
    kernel_seen = dense.kernel.numpy()
    dense.bias.assign(tf.fill((4,), 7.0))
    hidden = dense(X).numpy()
    binding.remove()

    np.testing.assert_array_equal(kernel_seen, np.ones((3, 4)))
    np.testing.assert_array_equal(bias.numpy(), np.full(4, 7.0))
    np.testing.assert_allclose(hidden, np.tanh(X.sum(1, keepdims=True) + np.full(4, 7.0)), rtol=1e-6)
    assert_all_equal(values_of([dense.kernel, dense.bias]), own)


def test_remove_restores_everything_exactly():
    model = make_model(LOSS_SCALE_OPTIMIZER(keras.optimizers.SGD(momentum=0.9)), metrics=["mae"])
    optimizers = [model.optimizer, model.optimizer.inner_optimizer]
    owners = [*all_variables(model, optimizers), *optimizers, keras_loss]

    def state():
        return [{name: id(value) for name, value in vars(owner).items()} for owner in owners]

    before = state()
    local = [(v, tf.Variable(native(v))) for v in all_variables(model, optimizers)]
    binding = bind(model, local=local, apply=lambda optimizer, apply: lambda *args: None)
    for _ in range(2):
        binding.install()
        assert all(now != then for now, then in zip(state(), before, strict=True))
        binding.remove()
        assert state() == before


@pytest.mark.parametrize("kind", KINDS)
def test_distribution_strategy_does_not_reach_a_bound_step(mirrored_facts, kind):
    facts = mirrored_facts[kind]
    assert_all_equal(facts["other replica"], facts["before"])
    for got, expected in zip(facts["bound replica"], step_values(kind), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_reduce_sum_gradients_is_left_to_the_binding(kind):
    model = make_model(make_optimizer(kind))
    bound_step(model)
    assert_all_equal(values_of(all_variables(model, find_optimizers(model))), step_values(kind))


@pytest.mark.parametrize("method", ["apply", "apply_gradients"])
def test_apply_goes_through_the_wrapper(method):
    model = make_model(keras.optimizers.SGD(1.0))
    calls = []

    def halve(optimizer, apply):
        def halved(grads, trainable_variables=None):
            calls.append(optimizer)
            return apply([g / 2 for g in grads], trainable_variables)

        return halved

    binding = bind(model, apply=halve)
    before = values_of(model.trainable_variables)
    grads = [tf.ones(v.shape) for v in model.trainable_variables]
    binding.install()
    if method == "apply":
        model.optimizer.apply(grads, model.trainable_variables)
    else:
        model.optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    binding.remove()
    assert calls == [model.optimizer]
    for old, new in zip(before, values_of(model.trainable_variables), strict=True):
        np.testing.assert_allclose(new, old - 0.5, rtol=1e-6)


def test_inner_optimizer_is_bound_but_applies_only_once():
    calls = []

    def count(optimizer, apply):
        def counted(*args, **kwargs):
            calls.append(optimizer)
            return apply(*args, **kwargs)

        return counted

    model = make_model(LOSS_SCALE_OPTIMIZER(keras.optimizers.SGD(0.1)))
    bound_step(model, apply=count)
    assert calls == [model.optimizer]


LABELS = np.float32([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
OUTPUTS = np.float32([[0.3, 0.7], [0.6, 0.4], [0.9, 0.1]])


@pytest.mark.parametrize(
    "name",
    [
        "MeanSquaredError",
        "MeanAbsoluteError",
        "MeanAbsolutePercentageError",
        "MeanSquaredLogarithmicError",
        "Huber",
        "LogCosh",
        "CosineSimilarity",
        "KLDivergence",
        "Poisson",
        "BinaryCrossentropy",
        "BinaryFocalCrossentropy",
        "CategoricalCrossentropy",
        "CategoricalFocalCrossentropy",
        "CategoricalHinge",
        "Hinge",
        "SquaredHinge",
    ],
)
def test_reduce_weighted_values_is_where_every_loss_ends(name):
    loss = getattr(keras.losses, name)()
    plain = loss(LABELS, OUTPUTS).numpy()
    binding = bind(make_model(), loss_correction=lambda *args: 3.0)
    binding.install()
    bound = loss(LABELS, OUTPUTS).numpy()
    binding.remove()
    assert plain != 0
    np.testing.assert_allclose(bound, 3 * plain, rtol=1e-6)
    assert loss(LABELS, OUTPUTS).numpy() == plain


def test_loss_factor_reaches_the_compiled_loss_and_none_leaves_it():
    model = make_model(loss="mse")
    plain = model.compute_loss(X, Y, model(X)).numpy()
    got = {}
    for factor in (2.0, None):
        binding = bind(model, loss_correction=lambda *args, factor=factor: factor)
        binding.install()
        got[factor] = model.compute_loss(X, Y, model(X)).numpy()
        binding.remove()
    np.testing.assert_allclose(got[2.0], 2 * plain, rtol=1e-6)
    assert got[None] == plain


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none", None]
)
def test_standardize_reduction_leaves_the_names_that_a_loss_correction_knows(reduction):
    seen = []
    binding = bind(make_model(), loss_correction=lambda *args: seen.append(args))
    weight = tf.constant([1.0, 2.0, 0.0])
    binding.install()
    keras.losses.MeanSquaredError(reduction=reduction)(LABELS, OUTPUTS, sample_weight=weight)
    binding.remove()
    ((values, sample_weight, mask, name),) = seen
    np.testing.assert_allclose(values, np.mean((LABELS - OUTPUTS) ** 2, -1), rtol=1e-6)
    np.testing.assert_array_equal(sample_weight, weight)
    assert mask is None
    assert name == reduction


def test_loss_correction_is_given_the_outputs_mask():
    seen = []
    binding = bind(make_model(), loss_correction=lambda *args: seen.append(args))
    outputs = keras.layers.Masking()(tf.constant([[[0.0], [1.0], [2.0]]]))
    binding.install()
    keras.losses.MeanSquaredError()(tf.zeros((1, 3, 1)), outputs)
    binding.remove()
    np.testing.assert_array_equal(seen[0][2], [[False, True, True]])


def accumulating(**kwargs):
    """An accumulating optimizer and its variables."""
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3, **kwargs)
    variables = [keras.Variable(np.float32([1.0, -2.0])), keras.Variable(np.float32([[3.0]]))]
    optimizer.build(variables)
    return optimizer, variables


def gradients(batch):
    return [tf.constant([batch + 1.0, 2.0]), tf.constant([[-2.0 * batch]])]


def test_iterations_count_the_batches_that_were_only_accumulated():
    optimizer, variables = accumulating()
    seen = []
    for batch in range(4):
        optimizer.apply(gradients(batch), variables)
        seen.append((int(batch_counter(optimizer).numpy()), int(optimizer.iterations)))
    assert seen == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert isinstance(batch_counter(optimizer), keras.Variable)


def test_optimizer_knows_its_weights_in_the_order_of_their_gradients():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD()
    optimizer.build(model.trainable_variables)
    found = trainable_variables_of(optimizer)
    assert [id(v) for v in found] == [id(v) for v in model.trainable_variables]


def test_accumulated_gradients_are_found_by_variable():
    optimizer, variables = accumulating()
    for batch in range(2):
        optimizer.apply(gradients(batch), variables)
    sums = accumulators(optimizer)
    assert set(sums) == {id(v) for v in variables}
    for variable, first, second in zip(variables, gradients(0), gradients(1), strict=True):
        assert isinstance(sums[id(variable)], tf.Variable)
        np.testing.assert_allclose(sums[id(variable)].numpy(), first + second)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9, "nesterov": True},
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.5},
        {"clipvalue": 0.25},
        {"weight_decay": 0.1},
        {"use_ema": True, "ema_momentum": 0.5},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_backend_apply_gradients_can_be_told_when_to_update(settings):
    (optimizer, variables), (twin, expected) = accumulating(**settings), accumulating(**settings)
    held = []

    def gather(grads, given):
        held.append(grads)
        if len(held) < 3:
            return None
        mean = [sum(parts) / 3 for parts in zip(*held, strict=True)]
        held.clear()
        return mean

    for batch in range(7):
        twin.apply(gradients(batch), expected)
        with accumulating_with(optimizer, gather):
            optimizer.apply(gradients(batch), variables)
        for own, theirs in zip(variables, expected, strict=True):
            np.testing.assert_allclose(own.numpy(), theirs.numpy(), rtol=1e-6)
    assert int(batch_counter(optimizer).numpy()) == 7
    optimizer.finalize_variable_values(variables)
    twin.finalize_variable_values(expected)
    for own, theirs in zip(variables, expected, strict=True):
        np.testing.assert_allclose(own.numpy(), theirs.numpy(), rtol=1e-6)


def test_accumulating_with_is_lifted_also_after_an_error():
    optimizer, variables = accumulating()
    before = set(vars(optimizer))

    def fail(grads, given):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), accumulating_with(optimizer, fail):
        optimizer.apply(gradients(0), variables)
    assert set(vars(optimizer)) == before
    optimizer.apply(gradients(0), variables)


def test_watching_outputs_sees_layers_and_operations_the_innermost_first():
    inputs = keras.Input((3,))
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="in_sequence")], name="sequence")
    keras.backend.clear_session(free_memory=False)  # the second `log` of a process is `log_1`
    logs = keras.ops.log(keras.ops.abs(inner(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(1, name="last")(logs), name="whole")
    before = {id(layer): set(vars(layer)) for layer in model._flatten_layers()}
    seen = []
    with watching_outputs(model, lambda operation, outputs: seen.append((operation.name, outputs.shape))):
        model(tf.constant(X), training=True)
    names = [name for name, _ in seen if "input" not in name]
    assert [name for name in names if name in ("in_sequence", "sequence", "last", "whole")] == [
        "in_sequence",
        "sequence",
        "last",
        "whole",
    ]
    assert names.index("sequence") < names.index("absolute") < names.index("log") < names.index("last")
    assert seen[-1] == ("whole", (8, 1))
    assert {id(layer): set(vars(layer)) for layer in model._flatten_layers()} == before
    model(tf.constant(X))
    assert seen[-1] == ("whole", (8, 1)) and len(names) == len([n for n, _ in seen if "input" not in n])


def test_binding_tells_of_losses_and_of_their_total():
    model = make_model(loss=keras.losses.MeanSquaredError())
    told = []
    binding = ReplicaBinding(
        variables=[],
        optimizers=find_optimizers(model),
        apply=plain_apply,
        loss_correction=lambda *args: 3.0,
        model=model,
        note_loss=lambda loss, *, is_total: told.append((is_total, float(loss))),
    )
    binding.install()
    model.train_step((tf.constant(X), tf.constant(Y)))
    binding.remove()
    assert "compute_loss" not in vars(model)
    (first, part), (second, total) = told
    assert (first, second) == (False, True) and part == total
    model.train_step((tf.constant(X), tf.constant(Y)))
    assert len(told) == 2


def test_find_layers_looks_into_nested_ones():
    nested = Nested()
    model = keras.Sequential([keras.Input((3,)), nested, keras.layers.Dense(1)])
    assert find_layers(model, keras.layers.Dropout) == [nested.inner.layers[0]]
    assert len(find_layers(model, keras.layers.Dense)) == 2


class ClippingAdam(ClipsSlices, keras.optimizers.Adam):
    """Clips slices."""


@pytest.mark.parametrize("setting", [{"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"clipvalue": 0.5}, {}])
def test_clips_slices_as_the_dense_gradient(setting):
    slices = tf.IndexedSlices(tf.constant([[3.0, 4.0], [0.1, 0.0]]), tf.constant([2, 0]), tf.constant([4, 2]))
    other = tf.constant([[1.0, 2.0]])
    found = ClippingAdam(**setting)._clip_gradients([slices, other])
    wanted = keras.optimizers.Adam(**setting)._clip_gradients([tf.convert_to_tensor(slices), other])
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(got), want, rtol=1e-6)
    assert isinstance(found[0], tf.IndexedSlices)


def test_optimizer_view_shows_the_slots_of_one_weight_replaced():
    optimizer = keras.optimizers.Adam(0.5, amsgrad=True)
    weights = [keras.Variable(np.zeros(n, "float32")) for n in (2, 3)]
    optimizer.build(weights)
    view = OptimizerView(optimizer, native(weights[1]), lambda slot: ("rows of", slot))
    # The names and the way in which Keras's update_step looks them up.
    index = view._get_variable_index("whatever stands for the weight")
    assert view._momentums[index] == ("rows of", native(optimizer._momentums[1]))
    assert view._velocity_hats[index][1].shape == (3,)
    assert (view.beta_1, view.amsgrad) == (0.9, True)


def test_decays_asks_keras_what_is_excluded():
    table, kernel = (keras.Variable(np.zeros(2, "float32"), name=name) for name in ("embeddings", "kernel"))
    optimizer = keras.optimizers.SGD(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["embed"])
    optimizer.build([table, kernel])
    assert not decays(optimizer, native(table))
    assert decays(optimizer, native(kernel))
    assert not decays(keras.optimizers.SGD(), kernel)


def test_stop_data_server_frees_its_port():
    service = tf.data.experimental.service
    server = service.DispatchServer(service.DispatcherConfig(port=0))
    place = ("127.0.0.1", int(server.target.rpartition(":")[2]))
    socket.create_connection(place, timeout=5).close()
    keras_internals.stop_data_server(server)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(place, timeout=5)


@pytest.mark.parametrize(
    "rate",
    [0.5, keras.optimizers.schedules.PiecewiseConstantDecay([10], [0.5, 0.1])],
    ids=["number", "schedule"],
)
def test_scaling_rate_scales_what_a_step_takes(rate):
    variable = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(rate)
    optimizer.build([variable])
    before = set(vars(optimizer))
    with scaling_rate(optimizer, tf.constant(0.25)):
        optimizer.apply([tf.constant([1.0])], [variable])
    assert float(variable.numpy()[0]) == pytest.approx(1 - 0.125)
    assert set(vars(optimizer)) == before
    assert float(optimizer.learning_rate) == 0.5


def test_updating_with_takes_the_place_of_keras_update():
    variables = [keras.Variable([1.0]), keras.Variable([2.0])]
    optimizer = keras.optimizers.Adam(0.5)
    optimizer.build(variables)
    seen = []

    def update(gradient, variable, rate):
        momentum, velocity = adam_slots(optimizer, variable)
        momentum.assign(gradient)
        velocity.assign(gradient + 1)
        seen.append(float(rate))

    with updating_with(optimizer, update):
        optimizer.apply([tf.constant([3.0]), tf.constant([4.0])], variables)
    assert seen == [0.5, 0.5]
    assert "update_step" not in optimizer.__dict__
    held = {v.path.split("/")[-1]: float(v.numpy().ravel()[0]) for v in optimizer.variables[2:]}
    assert sorted(held.values()) == [3.0, 4.0, 4.0, 5.0], held


def test_saving_in_blocks_gathers_no_whole_model(tmp_path, monkeypatch):
    opened = []

    class Store(saving_lib.H5IOStore):
        def __init__(self, place, archive=None, **options):
            opened.append((place, archive))
            super().__init__(place, archive=archive, **options)

    monkeypatch.setattr(saving_lib, "H5IOStore", Store)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5)])
    model.compile(keras.optimizers.Adam(), "mse")
    model.fit(np.ones((8, 3)), np.ones((8, 5)), verbose=0)
    read = []

    def blocks_of(variable):
        if len(variable.shape) < 2:
            return None

        def blocks():
            read.append(variable.path)
            yield variable.numpy()[:2]
            yield variable.numpy()[2:]

        return blocks()

    with saving_in_blocks(blocks_of):
        model.save(tmp_path / "model.keras")
    model.save(tmp_path / "other.keras")
    (place, archive), (_, other_archive) = opened
    assert archive is None and str(tmp_path) in place
    assert other_archive is not None, "Keras gathers nothing by itself any more: saving_in_blocks can go"
    assert len(read) == 3  # the kernel and its two slots
    for name in ("model.keras", "other.keras"):
        loaded = keras.saving.load_model(tmp_path / name)
        pairs = [(model.weights, loaded.weights), (model.optimizer.variables, loaded.optimizer.variables)]
        for mine, theirs in pairs:
            for one, other in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(one, other)


def test_is_available_knows_a_remote_value():
    value = RemoteValueImpl(None, tf.TensorSpec([]))
    assert not keras_internals.is_available(value)
    value._set_values(tf.constant(1.0))
    assert keras_internals.is_available(value)


def test_default_strategy_is_tensorflows():
    assert keras_internals.DEFAULT_STRATEGY is tf.distribute.get_strategy()


class Counting(keras.metrics.MeanSquaredError):
    """Keeps something outside of variables."""

    def reset_state(self):
        super().reset_state()
        self.num_resets = getattr(self, "num_resets", 0) + 1


@pytest.mark.parametrize(
    ("metric", "known"), [(keras.metrics.BinaryAccuracy, True), (keras.metrics.AUC, True), (Counting, False)]
)
def test_metrics_with_a_reset_of_their_own_are_told_from_kerass(metric, known):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile("sgd", "binary_crossentropy", metrics=[metric()])
    model.fit(np.zeros((2, 2)), np.zeros((2, 1)), verbose=0)
    assert keras_internals.resets_by_variables(model) == known


def test_model_with_a_reset_of_its_own_is_told_from_kerass():
    class Own(keras.Sequential):
        def reset_metrics(self):
            super().reset_metrics()

    model = Own([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert not keras_internals.resets_by_variables(model)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(pickle.dumps(facts_under_mirrored()))
