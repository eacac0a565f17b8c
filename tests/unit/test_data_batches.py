"""Each example once, in one order, whatever the number of replicas."""

import time

import numpy as np
import programs
import pytest
import tensorflow as tf
from keras.src.trainers.data_adapters import data_adapter_utils

from tfdist.data import build_source, tfds_split
from tfdist.data.batches import local_batches
from tfdist.data.order import epoch_indices, num_steps, part_slice
from tfdist.data.segment import Share, build_budget
from tfdist.data.sources.source import StreamSource, class_weights
from tfdist.errors import ConfigError
from tfdist.training.loop import plan_steps


def read_epoch(
    source, *, num_replicas, batch, lap=0, seed=3, shuffle=True, first_step=0, steps=None, **options
):
    """Returns the global batches, put together from what each replica's process would read."""
    joined = []
    for replica in range(num_replicas):
        share = Share(
            lap=lap,
            seed=seed,
            shuffle=shuffle,
            global_batch_size=batch,
            num_replicas=num_replicas,
            replica_ids=[replica],
            first_step=first_step,
            num_steps=steps,
            **options,
        )
        read = [s.split(element) for s in local_batches(source, share) for element in s.open()]
        parts = [(tf.nest.flatten(p)[0].numpy(), int(n)) for p, n in read]
        joined.append(parts)
    batches = []
    for row in zip(*joined, strict=True):
        batches.append(np.concatenate([part for part, _ in row]))
        assert all(n == len(batches[-1]) for _, n in row)
    return batches


@pytest.mark.parametrize("count", [1, 2, 3, 5, 97, 1437])
def test_epoch_indices_are_a_permutation(count):
    """Every example once, in another order each epoch and pass."""

    def order(epoch, start=0):
        indices = epoch_indices(
            num_examples=count, seed=1, epoch=epoch, start=start, size=count, shuffle=True
        )
        return indices.numpy().tolist()

    assert sorted(order(0)) == list(range(count))
    assert order(0) == order(0)
    if count > 5:
        assert order(0) != order(1)
        assert order(0) != order(0, start=count)
        assert sorted(order(0, start=count)) == list(range(count))


def test_epoch_indices_shuffle_well():
    """Neighbours are uncorrelated: TensorFlow's default of four rounds fails here."""
    count = 60_000
    order = epoch_indices(num_examples=count, seed=0, epoch=0, start=0, size=count, shuffle=True).numpy()
    for lag in (1, 2, 3):
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        assert abs(correlation) < 0.03, (lag, correlation)


@pytest.mark.parametrize("count", [22, 37, 3])
@pytest.mark.parametrize("kind", ["arrays", "stream"])
def test_batches_do_not_depend_on_replicas(count, kind):
    """The same global batches for 1, 2, 3 and 4 replicas, and each example once."""
    data = (np.arange(count, dtype=np.float32),)
    source = build_source(data if kind == "arrays" else tf.data.Dataset.from_tensor_slices(data))
    alone = read_epoch(source, num_replicas=1, batch=10)
    assert sorted(np.concatenate(alone)) == list(range(count))
    assert [len(b) for b in alone] == [min(10, count - s) for s in range(0, count, 10)]
    for replicas in (2, 3, 4):
        for mine, theirs in zip(read_epoch(source, num_replicas=replicas, batch=10), alone, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["arrays", "stream"])
def test_seek_equals_skipping(kind):
    """Starting at a step gives what the epoch holds from there."""
    data = (np.arange(37, dtype=np.float32),)
    source = build_source(data if kind == "arrays" else tf.data.Dataset.from_tensor_slices(data))
    whole = read_epoch(source, num_replicas=2, batch=8)
    late = read_epoch(source, num_replicas=2, batch=8, first_step=3)
    assert len(late) == len(whole) - 3
    for mine, theirs in zip(late, whole[3:], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_stream_has_another_order_in_each_pass():
    """And the same one whenever the epoch is read."""
    source = build_source(tf.data.Dataset.range(100))
    first, again, second = (
        np.concatenate(read_epoch(source, num_replicas=1, batch=10, lap=lap)).tolist() for lap in (0, 0, 1)
    )
    assert first == again != second
    assert sorted(first) == sorted(second) == list(range(100))


@pytest.mark.parametrize("kind", ["arrays", "stream"])
def test_epoch_ends_with_the_pass(kind):
    """Though more steps are asked for."""
    data = (np.arange(10, dtype=np.float32),)
    source = build_source(data if kind == "arrays" else tf.data.Dataset.from_tensor_slices(data))
    options = {"num_replicas": 2, "batch": 4}
    assert [len(b) for b in read_epoch(source, steps=6, **options)] == [4, 4, 2]
    assert [len(b) for b in read_epoch(source, steps=6, first_step=2, **options)] == [2]
    assert [len(b) for b in read_epoch(source, steps=2, first_step=1, **options)] == [4]


@pytest.mark.parametrize("kind", ["arrays", "stream"])
def test_remainder_is_dropped(kind):
    """Once a pass, in each pass other examples; the batches before are the same."""
    data = (np.arange(10, dtype=np.float32),)
    source = build_source(data if kind == "arrays" else tf.data.Dataset.from_tensor_slices(data))
    kept = read_epoch(source, num_replicas=2, batch=4)
    dropped = read_epoch(source, num_replicas=2, batch=4, drop_remainder=True)
    assert [b.tolist() for b in dropped] == [b.tolist() for b in kept[:2]]
    assert plan_steps(source, 4, None, drop_remainder=True) == 2
    later = read_epoch(source, num_replicas=2, batch=4, lap=1, drop_remainder=True)
    assert [len(b) for b in later] == [4, 4]
    assert sorted(np.concatenate(later)) != sorted(np.concatenate(dropped))
    with pytest.raises(ConfigError, match="all of the 10 examples"):
        plan_steps(source, 11, None, drop_remainder=True)


def test_whole_and_short_batches_of_one_replica_share_a_trace():
    """As in Keras."""
    source = build_source((np.zeros((22, 5), np.float32), np.zeros(22)))
    share = Share(lap=0, seed=0, shuffle=False, global_batch_size=10, num_replicas=1, replica_ids=[0])
    segments = local_batches(source, share)
    first, second = (s.build().element_spec for s in segments)
    assert first == second and first[0][0][0].shape.as_list() == [None, 5]
    assert [len(next(s.open())[0][0][0]) for s in segments] == [10, 2]


def test_parts_of_several_replicas_have_static_shapes():
    """One trace for the full batches, one for the short last one."""
    source = build_source((np.zeros((22, 5), np.float32), np.zeros(22)))
    share = Share(lap=0, seed=0, shuffle=False, global_batch_size=10, num_replicas=4, replica_ids=[0, 1])
    segments = local_batches(source, share)
    shapes = [[part[0].shape.as_list() for part in s.build().element_spec[0]] for s in segments]
    assert shapes == [[[2, 5], [3, 5]], [[0, 5], [1, 5]]]
    assert [s.num_steps for s in segments] == [2, 1]


def test_step_arithmetic():
    """Of a pass, and of a batch's parts."""
    assert num_steps(num_examples=22, global_batch_size=10) == 3
    assert num_steps(num_examples=22, global_batch_size=10, drop_remainder=True) == 2
    for size in range(9):
        ends = [part_slice(size, k, 4) for k in range(4)]
        assert ends[0][0] == 0 and ends[-1][1] == size
        assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
        assert max(b - a for a, b in ends) - min(b - a for a, b in ends) <= 1


def test_nested_arrays_keep_their_form():
    """Dict inputs and weights stay together."""
    x = {"a": np.arange(6), "b": np.arange(12).reshape(6, 2)}
    source = build_source((x, np.arange(6.0), np.ones(6)))
    features, labels, weights = source.sample_batch(2)
    assert features["b"].shape == (2, 2)
    assert labels.shape == weights.shape == (2,)
    assert source.num_examples == 6


def test_class_weight_becomes_sample_weight():
    """For integer and one-hot labels, arrays and streams; unlisted classes weigh 1."""
    labels = np.array([0, 1, 2, 1])
    for y in (labels, np.eye(3, dtype=np.float32)[labels]):
        data = (np.zeros((4, 1), np.float32), y)
        source = build_source(data, class_weight={0: 2.0, 2: 0.5})
        np.testing.assert_array_equal(source.sample_batch(4)[2], [2, 1, 0.5, 1])
        stream = build_source(tf.data.Dataset.from_tensor_slices(data), class_weight={0: 2.0, 2: 0.5})
        assert isinstance(stream, StreamSource)
        np.testing.assert_array_equal(stream.sample_batch(4)[2], [2, 1, 0.5, 1])


@pytest.mark.parametrize("form", ["integers", "floats", "column", "one_hot", "soft", "logits"])
@pytest.mark.parametrize(
    "class_weight",
    [{0: 2.0, 1: 0.5, 2: 3.0}, {1: 4.0}, {0.0: 2.0, 2.0: 0.0}, {np.int64(2): 5.0}, {7: 3.0}],
    ids=repr,
)
def test_class_weights_are_kerass(form, class_weight):
    """Held against the function that Keras itself calls for arrays."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 40)
    y = {
        "integers": labels,
        "floats": rng.uniform(0, 3, 40).round(1),
        "column": labels[:, None].astype("float32"),
        "one_hot": np.eye(4, dtype="float32")[labels],
        "soft": rng.dirichlet(np.ones(4), 40),
        "logits": rng.normal(size=(40, 4)),
    }[form]
    wanted = data_adapter_utils.class_weight_to_sample_weights(y, class_weight)
    np.testing.assert_allclose(class_weights(tf.constant(y), class_weight), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ((np.zeros(3), np.zeros(4)), {}, "3, 4 examples"),
        ((np.zeros((0, 2)),), {}, "no examples"),
        ((np.zeros(2),) * 4, {}, "tuple of 4"),
        (np.float32(1), {}, "first axes"),
        ((np.zeros(2), np.zeros(2)), {"class_weight": {0: 1}, "sample_weight": np.ones(2)}, "pass one"),
        ("tfds:digits", {}, "tfds:NAME/SPLIT"),
    ],
)
def test_bad_data_is_refused(data, options, words):
    """Value, rule, remedy."""
    with pytest.raises(ConfigError, match=words):
        build_source(data, **options)


def test_digits_come_through_tfds(tmp_path):
    """Both splits, whole, with the true labels, prepared in the folder asked for."""
    from sklearn.datasets import load_digits

    parts = [build_source(tfds_split("digits", s, data_dir=str(tmp_path))) for s in ("train", "test")]
    assert [p.num_examples for p in parts] == [1437, 360]
    images = np.concatenate([p.tensors[0].numpy() for p in parts])
    labels = np.concatenate([p.tensors[1].numpy() for p in parts])
    digits = load_digits()
    ours = sorted((i.tobytes(), int(n)) for i, n in zip(images, labels, strict=True))
    true = sorted(
        (i.astype(np.uint8).tobytes(), int(n)) for i, n in zip(digits.images, digits.target, strict=True)
    )
    assert ours == true
    assert (tmp_path / "digits").is_dir()


def test_examples_are_made_several_at_a_time_and_stay_in_order(tmp_path):
    """What a recipe does to each example may take its time."""
    inside, most = [], []

    def work(label):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return label + 1

    def map_example(image, label):
        return image, tf.ensure_shape(tf.numpy_function(work, [label], tf.int64), [])

    split = {"name": "digits", "split": "test[:100]", "data_dir": str(tmp_path)}
    plain, made = (
        build_source(tfds_split(**split)),
        build_source(tfds_split(**split, map_example=map_example)),
    )
    assert max(most) > 1
    np.testing.assert_array_equal(made.tensors[1], plain.tensors[1] + 1)


@pytest.mark.parametrize("kind", ["arrays", "stream", "own"])
def test_every_segment_plans_with_its_tasks_share(kind, monkeypatch):
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    stream = tf.data.Dataset.range(20)
    data = {"arrays": np.arange(20), "stream": stream, "own": lambda context: stream.batch(4)}[kind]
    share = Share(lap=0, seed=0, shuffle=True, global_batch_size=4, num_replicas=1, replica_ids=[0])
    for segment in local_batches(build_source(data), share):
        assert segment.build_in_budget().options().autotune.cpu_budget == 1


def test_two_processes_prepare_at_once(tmp_path):
    """Neither finds a half-written dataset."""
    (tmp_path / "prepare.py").write_text(
        "import sys; from tfdist.data import build_source, tfds_split; "
        "sys.exit(build_source(tfds_split('digits', 'test[:99]', data_dir='data')).num_examples)"
    )
    both = [programs.Program(["prepare.py"], cwd=tmp_path) for _ in range(2)]
    assert [program.wait(120) for program in both] == [99, 99]


def test_unknown_dataset_is_one_line(tmp_path):
    """TFDS's page of suggestions is cut to its first line."""
    with pytest.raises(ConfigError, match="no_such_set") as error:
        build_source(tfds_split("no_such_set", "train", data_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("threads", "is_set"), [("1", True), ("", False), ("1000", False), ("x", False)])
def test_task_plans_with_its_share_of_the_machine(threads, is_set):
    options = build_budget({"TF_NUM_INTRAOP_THREADS": threads})
    assert options.autotune.cpu_budget == (1 if is_set else None)
    assert (options.autotune.ram_budget is not None) == is_set
