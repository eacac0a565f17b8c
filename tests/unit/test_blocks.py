"""Layers in blocks: what can be divided, and what one process makes of a part."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist.layers
from tfdist import keras_internals
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.data.order import part_slice
from tfdist.errors import ConfigError
from tfdist.recipe import load_recipe
from tfdist.training.tensor_parallel.by_parts import maps_by_parts, updates_by_parts
from tfdist.training.tensor_parallel.divided import find_divided
from tfdist.training.tensor_parallel.group import ProcessGroup
from tfdist.training.tensor_parallel.vocabulary import DividedVocabulary

layers = keras.layers
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(inputs, outputs, loss="mse", metrics=None, optimizer="adam"):
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, loss, metrics=metrics)
    return model


def kinds_of(model, num_blocks=2):
    calls = keras_internals.layer_calls(model)
    found = find_divided(model, calls, num_blocks)
    names = {id(call.operation): call.operation.name.rstrip("_0123456789") for call in calls}
    return {names[key]: kind for key, kind in found.kinds.items()}, found


def chain(*made, width=8, **options):
    inputs = x = keras.Input((width,))
    for layer in made:
        x = layer(x)
    return compiled(inputs, x, **options)


def test_pair_of_dense_layers_is_divided_between():
    first, second = layers.Dense(6, "gelu", name="first"), layers.Dense(5, name="second")
    between = [layers.Dropout(0.2, name="drop"), layers.LeakyReLU(), layers.Dense(4, name="after")]
    model = chain(first, *between[:2], second, between[2])
    kinds, found = kinds_of(model)
    assert kinds == {"first": "columns", "drop": "drops", "second": "rows"}
    parts = [found.part(v, 1) for v in (first.kernel, first.bias, second.kernel, second.bias)]
    assert parts == [(slice(None), slice(3, 6)), (slice(3, 6),), (slice(3, 6),), None]


def test_gate_and_what_it_opens_go_to_one_layer():
    inputs = keras.Input((8,))
    hidden = layers.Dense(6, "silu", name="gate")(inputs) * layers.Dense(6, name="up")(inputs) * 2.0
    kinds, _ = kinds_of(compiled(inputs, layers.Dense(5, name="down")(hidden)))
    assert kinds == {"gate": "columns", "up": "columns", "down": "rows"}


@pytest.mark.parametrize(
    "between",
    [
        layers.LayerNormalization,
        layers.Softmax,
        lambda: layers.Dropout(0.2, noise_shape=(None, 1)),
        lambda: layers.GaussianNoise(0.1),
        lambda: layers.Reshape((3, 2)),
        lambda: layers.ActivityRegularization(l2=0.1),
        lambda: layers.Lambda(lambda x: x[:, ::-1]),
    ],
)
def test_what_looks_at_all_units_is_not_divided(between):
    made = [layers.Dense(6), between(), layers.Dense(5)]
    with pytest.raises(ConfigError, match="no layer of the model can be divided"):
        kinds_of(chain(*made))


def test_units_that_something_else_takes_are_whole():
    inputs = keras.Input((8,))
    hidden = layers.Dense(6)(inputs)
    model = compiled(inputs, [layers.Dense(5)(hidden), layers.LayerNormalization()(hidden)])
    with pytest.raises(ConfigError, match="no layer of the model can be divided"):
        kinds_of(model)


@pytest.mark.parametrize(
    ("options", "is_divided"),
    [
        ({"kernel_regularizer": "l2"}, True),
        ({"kernel_regularizer": keras.regularizers.OrthogonalRegularizer()}, False),
        ({"kernel_constraint": "non_neg"}, True),
        ({"kernel_constraint": keras.constraints.MaxNorm(1.0)}, True),  # of each column
        ({"kernel_constraint": keras.constraints.MaxNorm(1.0, axis=1)}, False),
        ({"activation": "softmax"}, False),
        ({"activity_regularizer": "l2"}, False),
    ],
)
def test_rule_that_is_for_whole_weights_leaves_them_whole(options, is_divided):
    model = chain(layers.Dense(6, **options), layers.Dense(5, kernel_regularizer="l1"))
    if is_divided:
        assert kinds_of(model)[0] == {"dense": "rows"}  # both have that name but for a number
    else:
        with pytest.raises(ConfigError, match="no layer of the model can be divided"):
            kinds_of(model)


def test_layer_that_is_called_in_another_way_too_is_whole():
    inputs = keras.Input((5, 8))
    attention, dropout = layers.MultiHeadAttention(2, 4), layers.Dropout(0.2)
    attended, _ = attention(attention(inputs, inputs), inputs, return_attention_scores=True)
    hidden = dropout(layers.Dense(6)(dropout(attended)))
    with pytest.raises(ConfigError, match="no layer of the model can be divided"):
        kinds_of(compiled(inputs, layers.Dense(5)(hidden)))
    ids = keras.Input((5,))  # float32, of a table that is as wide as it is long
    table = layers.ReversibleEmbedding(8, 8, name="table")
    assert kinds_of(compiled(ids, table(table(ids), reverse=True), loss=LOGITS))[0] == {"table": "vocabulary"}
    with pytest.raises(ConfigError, match="no layer of the model can be divided"):
        kinds_of(compiled(ids, table(ids), loss=LOGITS))


def test_text_lm_is_divided_in_all_its_blocks():
    model = load_recipe("text_lm").build_model(num_layers=3, width=16, num_heads=2)
    _, found = kinds_of(model)
    counts = [list(found.kinds.values()).count(kind) for kind in ("heads", "columns", "rows", "vocabulary")]
    assert counts == [3, 3, 3, 1] and found.has_vocabulary
    # Norms, positions, and biases behind a sum.
    whole = sum(keras.ops.size(v) for v in model.trainable_variables if found.share(v) == 1)
    assert whole == 7 * 2 * 16 + 128 * 16 + 3 * 16


@pytest.mark.parametrize(
    ("loss", "metrics", "is_divided"),
    [
        (LOGITS, ["accuracy"], True),
        (LOGITS, None, True),
        (LOGITS, [keras.metrics.SparseCategoricalAccuracy()], True),
        (LOGITS, [keras.metrics.SparseTopKCategoricalAccuracy(2)], False),
        (keras.losses.SparseCategoricalCrossentropy(), ["accuracy"], False),
        ("sparse_categorical_crossentropy", None, False),
        ("mse", None, False),
    ],
)
def test_vocabulary_is_divided_where_loss_and_metrics_can_do_with_parts(loss, metrics, is_divided):
    model = chain(layers.LayerNormalization(), layers.Dense(11, name="logits"), loss=loss, metrics=metrics)
    if is_divided:
        kinds, found = kinds_of(model)
        assert kinds == {"logits": "columns"} and found.has_vocabulary
    else:
        with pytest.raises(ConfigError, match="no layer of the model can be divided"):
            kinds_of(model)


def test_layer_that_must_be_divided_and_cannot_is_named():
    asked = tfdist.layers.RowDense(5, name="asked")
    with pytest.raises(
        ConfigError, match="'asked' cannot be divided by its rows: what it takes must come from"
    ):
        kinds_of(chain(layers.LayerNormalization(), asked))
    heads = tfdist.layers.MultiHeadAttention(1, 4, name="asked")
    inputs = keras.Input((5, 8))
    with pytest.raises(ConfigError, match="'asked' cannot be divided by its heads"):
        kinds_of(compiled(inputs, heads(inputs, inputs)))
    # A stock layer may be either of a pair; one that must be the second makes the first the other.
    middle = tfdist.layers.ColumnDense(6, name="middle")
    assert kinds_of(chain(layers.Dense(7, name="first"), middle, layers.Dense(5, name="last")))[0] == {
        "middle": "columns",
        "last": "rows",
    }


@pytest.mark.parametrize(
    ("optimizer", "does"),
    [
        (keras.optimizers.SGD(0.1, momentum=0.9), True),
        (keras.optimizers.AdamW(1e-3, global_clipnorm=1.0), True),
        (keras.optimizers.Adam(1e-3, clipvalue=0.5, use_ema=True), True),
        (keras.optimizers.Adam(1e-3, gradient_accumulation_steps=3), True),
        (keras.optimizers.RMSprop(1e-3), True),
        (keras.optimizers.Adam(1e-3, clipnorm=1.0), False),
        (keras.optimizers.Lamb(1e-3), False),
        (keras.optimizers.Adafactor(1e-3), False),
        (tfdist.optimizers.LARS(1.0), False),
    ],
)
def test_optimizer_that_looks_at_a_whole_weight_is_found_out(optimizer, does):
    assert updates_by_parts(optimizer) == does
    if not does:
        model = chain(layers.Dense(6), layers.Dense(5), optimizer=optimizer)
        with pytest.raises(
            ConfigError, match=f"{type(optimizer).__name__}, as it is set here, looks at a weight"
        ):
            kinds_of(model)


def test_parts_are_tried():
    assert maps_by_parts(keras.ops.relu, shape=(2, 8), axis=1)
    assert not maps_by_parts(keras.ops.softmax, shape=(2, 8), axis=1)


def test_blocks_make_the_whole():
    for size, num_blocks in ((7, 2), (8, 3), (5, 5)):
        ends = [part_slice(size, block, num_blocks) for block in range(num_blocks)]
        assert [low for low, _ in ends] == [0, *(high for _, high in ends[:-1])] and ends[-1][1] == size


@pytest.mark.parametrize("ignored", [None, 3, -1])
def test_loss_and_accuracy_of_a_view_are_keras_own(ignored):
    rng = np.random.default_rng(0)
    logits = tf.constant(
        rng.normal(size=(6, 5, 9)).astype(np.float32) * [[[30.0], [1], [1], [1], [0]]], tf.float32
    )
    labels = rng.integers(0, 9, (6, 5))
    labels[0, 1] = 3 if ignored is None else ignored
    vocabulary = DividedVocabulary(9, ProcessGroup(1), 0, ignored)
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=ignored, reduction="none"
    )
    results = []
    for is_view in (False, True):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            view = vocabulary.view(tf.constant(labels[..., None]), logits)
            found = loss(view.labels, view.loss_logits) if is_view else loss(labels, logits)
        accuracy = keras.metrics.sparse_categorical_accuracy(
            *((view.labels, view.metric_logits) if is_view else (labels, logits))
        )
        results.append((found, tape.gradient(found, logits), accuracy))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_label_that_is_no_word_is_an_error_as_in_keras():
    view = DividedVocabulary(9, ProcessGroup(1), 0).view(tf.constant([[9]]), tf.zeros([1, 1, 9]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="label value"):
        LOGITS(view.labels, view.loss_logits)


@pytest.mark.parametrize(
    ("options", "num_workers", "wanted"),
    [
        ({}, 3, (1, 3, 1, 8)),
        ({"tensor_parallel": 2}, 2, (1, 1, 2, 1)),
        ({"tensor_parallel": 2}, 4, (1, 2, 2, 8)),
        ({"num_stages": 1, "tensor_parallel": 2}, 4, (2, 1, 2, 1)),
        ({"num_stages": 2, "num_micro_batches": 3}, 4, (2, 2, 1, 3)),
    ],
)
def test_workers_share_stages_and_blocks(options, num_workers, wanted):
    assert PipelineOptions(**options).layout(num_workers) == wanted


@pytest.mark.parametrize(("options", "num_workers"), [({"tensor_parallel": 2}, 1), ({"num_stages": 2}, 3)])
def test_workers_that_make_no_whole_copy_are_refused(options, num_workers):
    with pytest.raises(ConfigError, match="copies of the model are whole"):
        PipelineOptions(**options).layout(num_workers)


def deferred(build):
    keras.utils.set_random_seed(5)
    with keras_internals.deferring_variables():
        return build()


def small():
    return keras.Sequential([keras.Input((4,)), layers.Dense(6, name="first"), layers.Dense(3, name="last")])


def test_part_begins_as_that_part_of_the_whole():
    keras.utils.set_random_seed(5)
    whole, model = small(), deferred(small)
    kernel = model.layers[0].kernel
    assert keras_internals.whole_shape(kernel) == (4, 6) and keras_internals.own_part(kernel) is None
    keras_internals.materialize(kernel, (slice(None), slice(3, 6)))
    assert tuple(kernel.shape) == kernel.numpy().shape == (4, 3)
    assert keras_internals.whole_shape(kernel) == (4, 6)
    np.testing.assert_array_equal(kernel, whole.layers[0].kernel[:, 3:])
    assert keras_internals.count_parameters(model) == whole.count_params()


def test_whole_file_is_read_in_parts(tmp_path):
    whole, model = small(), deferred(small)
    whole.save_weights(tmp_path / "whole.weights.h5")
    first, last = model.layers
    keras_internals.materialize(first.kernel, (slice(None), slice(0, 3)))
    keras_internals.materialize(first.bias, (slice(0, 3),))
    keras_internals.materialize(last.bias)
    with keras_internals.loading_present():
        model.load_weights(tmp_path / "whole.weights.h5")
    np.testing.assert_array_equal(first.kernel, whole.layers[0].kernel[:, :3])
    np.testing.assert_array_equal(first.bias, whole.layers[0].bias[:3])
    np.testing.assert_array_equal(last.bias, whole.layers[1].bias)
    assert not keras_internals.has_memory(last.kernel)


def test_slot_lies_beside_its_part():
    model = deferred(small)
    kernel, adam = model.layers[0].kernel, keras.optimizers.Adam()
    keras_internals.materialize(kernel, (slice(None), slice(0, 2)))
    with keras_internals.deferring_variables() as slots:
        adam.build([kernel])
    for slot, weight in slots:
        keras_internals.materialize(slot, beside=weight)
        assert tuple(slot.shape) == (4, 2) and keras_internals.whole_shape(slot) == (4, 6)


def test_attention_gives_its_projections():
    inputs = keras.Input((5, 8))
    for gates in (False, True):
        layer = layers.MultiHeadAttention(2, 3, dropout=0.5, use_gate=gates)
        layer(inputs, inputs)
        projections, dropout = keras_internals.attention_parts(layer)
        assert [tuple(dense.kernel.shape) for dense in projections] == (3 + gates) * [(8, 2, 3)]
        assert dropout.rate == 0.5


def test_mask_goes_along():
    source, target = tf.zeros([2, 3]), tf.ones([2, 3])
    assert not hasattr(keras_internals.keep_mask(source, target), "_keras_mask")
    masked = layers.Embedding(4, 2, mask_zero=True)(np.array([[1, 0]]))
    kept = keras_internals.keep_mask(masked, tf.identity(masked))
    np.testing.assert_array_equal(layers.GlobalAveragePooling1D()(kept), masked[:, 0])


def test_quantized_layer_is_not_plain():
    dense = layers.Dense(4)
    dense.build((None, 4))
    assert keras_internals.is_plain(dense)
    dense.enable_lora(2)
    assert not keras_internals.is_plain(dense)
    quantized = layers.Dense(4)
    quantized.build((None, 4))
    quantized.quantize("int8")
    assert not keras_internals.is_plain(quantized)


def test_what_compile_was_given_is_known_before_anything_is_built():
    model = small()
    accuracy = keras.metrics.SparseCategoricalAccuracy()
    model.compile("sgd", LOGITS, metrics=["accuracy"], weighted_metrics=[accuracy])
    assert keras_internals.asked_metrics(model) == ["accuracy", accuracy]
    assert keras_internals.loss_axis(LOGITS) == -1
    assert keras_internals.loss_axis(keras.losses.SparseCategoricalCrossentropy(axis=1)) == 1


def test_replaced_call_is_the_one_that_is_made():
    dense = layers.Dense(3)
    x = np.ones((2, 4), np.float32)
    before = dense(x)
    keras_internals.replace_call(dense, lambda call: lambda inputs: 2 * call(inputs))
    np.testing.assert_allclose(dense(x), 2 * before)
