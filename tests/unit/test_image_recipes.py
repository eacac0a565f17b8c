"""What resnet_cifar and medical_unet train on, and what their layers and losses do."""

import struct

import keras
import numpy as np
import pytest
import tensorflow as tf

from recipes._masked_images import find_masked_images, read_masked_images
from tfdist.data import build_source
from tfdist.errors import ConfigError
from tfdist.recipe import load_recipe

RESNET, UNET = load_recipe("resnet_cifar"), load_recipe("medical_unet")


def layers_of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


@pytest.mark.parametrize("recipe", [RESNET, UNET])
def test_made_up_images_follow_from_the_seed_and_the_splits_are_apart(recipe):
    (x, y), (again, _) = (recipe.build_data("train", num_examples=50) for _ in range(2))
    test_x, _ = recipe.build_data("test", num_examples=50)
    other, _ = recipe.build_data("train", num_examples=50, seed=1)
    assert (len(x), len(test_x)) == (40, 10)
    np.testing.assert_array_equal(x, again)
    assert not np.array_equal(x, other)
    assert len({image.tobytes() for image in [*x, *test_x]}) == 50
    assert len(np.unique(y)) == (10 if recipe is RESNET else 2)


def test_made_up_images_have_cifars_form():
    images, labels = RESNET.build_data("train", num_examples=50)
    assert (images.shape, images.dtype) == ((40, 32, 32, 3), np.uint8)
    assert 60 < images.mean() < 200
    assert images.std() > 25
    assert labels.dtype == np.int64


@pytest.mark.parametrize("recipe", [RESNET, UNET])
@pytest.mark.parametrize(
    ("split", "kwargs", "message"),
    [
        ("validation", {}, "no split 'validation'; choose train or test"),
        ("test", {"num_examples": 4}, "must be at least 5"),
    ],
)
def test_split_and_size_are_checked(recipe, split, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        recipe.build_data(split, **kwargs)


@pytest.mark.parametrize(("depth", "num_parameters"), [(20, 0.27e6), (56, 0.85e6)])
def test_resnet_is_as_deep_and_as_large_as_in_its_paper(depth, num_parameters):
    """Table 6 of He et al. 2016; its shortcuts have no weights, ours two 1×1 convolutions."""
    model = RESNET.build_model(depth=depth)
    convolutions = layers_of(model, keras.layers.Conv2D)
    assert len([layer for layer in convolutions if layer.kernel_size == (3, 3)]) + 1 == depth
    assert model.count_params() == pytest.approx(num_parameters, rel=0.02)
    assert model.output_shape == (None, 10)


@pytest.mark.parametrize(
    ("normalization", "kind", "synchronized"),
    [
        ("group", keras.layers.GroupNormalization, None),
        ("sync_batch", keras.layers.BatchNormalization, True),
        ("batch", keras.layers.BatchNormalization, False),
    ],
)
def test_resnet_is_normalised_as_it_was_told(normalization, kind, synchronized):
    found = layers_of(RESNET.build_model(depth=8, normalization=normalization), kind)
    assert len(found) == 9  # 7 convolutions, and 2 of shortcuts
    assert {getattr(layer, "synchronized", None) for layer in found} == {synchronized}


def test_groups_keep_an_image_apart_from_its_batch():
    model = RESNET.build_model(depth=8, augment=False)
    images, _ = RESNET.build_data("test", num_examples=50)
    together = model(images, training=True).numpy()
    np.testing.assert_allclose(model(images[:3], training=True).numpy(), together[:3], rtol=1e-4, atol=1e-5)


def test_augmentation_shifts_by_whole_pixels_and_mirrors_in_training_alone():
    model = RESNET.build_model(depth=8)
    flip = layers_of(model, keras.layers.RandomFlip)[0]
    augment = keras.Model(model.input, flip.output)
    image = np.arange(32 * 32 * 3, dtype=np.int64).reshape(1, 32, 32, 3) % 251
    images = np.repeat(image.astype(np.uint8), 64, axis=0)
    plain = augment(images, training=False).numpy()
    np.testing.assert_allclose(plain, images / 127.5 - 1, atol=1e-6)
    padded = np.pad(plain[0], ((4, 4), (4, 4), (0, 0)))
    wanted = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top : top + 32, left : left + 32]
            wanted |= {crop.tobytes(): (top, left, 1), crop[:, ::-1].tobytes(): (top, left, -1)}
    found = [wanted.get(crop.tobytes()) for crop in augment(images, training=True).numpy()]
    assert None not in found, "shifted by a part of a pixel, or filled with something"
    tops, lefts, directions = (set(values) for values in zip(*found, strict=True))
    assert directions == {1, -1}
    assert min(tops) < 2 and max(tops) > 6 and min(lefts) < 2 and max(lefts) > 6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 21}, "depth=21: it must be 6n [+] 2"),
        ({"depth": 2}, "depth=2: it must be 6n [+] 2"),
        ({"width": 12}, "width=12 with normalization=group: give a multiple of 8"),
    ],
)
def test_resnet_refuses(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        RESNET.build_model(**kwargs)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Images in CIFAR-10's own binary files, as TFDS parses and stores them; only the download is left out."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("download") / "cifar-10-batches-bin"
    folder.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 32, 3), np.uint8)
    records = [bytes([n % 10]) + image.transpose(2, 0, 1).tobytes() for n, image in enumerate(images)]
    for n in range(5):
        (folder / f"data_batch_{n + 1}.bin").write_bytes(b"".join(records[2 * n : 2 * n + 2]))
    (folder / "test_batch.bin").write_bytes(b"".join(records[10:]))
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(folder.parent)
        )
        tfds.builder("cifar10", data_dir=data_dir).download_and_prepare()
    return data_dir, images


def test_cifar_is_read_as_tfds_prepares_it(cifar):
    data_dir, images = cifar
    wanted = {image.tobytes(): n % 10 for n, image in enumerate(images)}
    for split, size in (("train", 10), ("test", 2)):
        source = build_source(RESNET.build_data(split, data_dir=data_dir))
        assert source.num_examples == size
        x, y = source.sample_batch(size)
        assert [wanted[image.tobytes()] for image in x.numpy()] == y.numpy().tolist()


def test_lesions_are_brighter_than_what_is_around_them_and_some_images_have_none():
    images, masks = UNET.build_data("train", num_examples=200, image_size=32)
    assert images.shape == masks.shape == (160, 32, 32, 1)
    assert set(np.unique(masks)) == {0, 1}
    assert images.min() >= 0 and images.max() <= 1
    has_lesion = masks.any(axis=(1, 2, 3))
    assert 0.6 < has_lesion.mean() < 0.9
    assert 0.02 < masks.mean() < 0.2
    assert images[masks > 0].mean() > images[(masks == 0) & (images > 0.2)].mean() + 0.05


def test_dice_loss_is_each_images_own():
    y_true = np.zeros((3, 4, 4, 1), np.float32)
    y_true[0, :2] = y_true[1, 0] = 1
    y_pred = np.zeros_like(y_true)
    y_pred[0, :2] = y_pred[1, :2] = y_pred[2, 0, 0] = 1
    loss = UNET.build_model.__globals__["dice_loss"]
    np.testing.assert_allclose(loss(y_true, tf.constant(y_pred)), [0, 1 - 9 / 13, 1 - 1 / 2], rtol=1e-6)


def test_loss_is_dice_and_each_pixels_crossentropy():
    y_true = np.zeros((2, 4, 4, 1), np.float32)
    y_true[0, :2] = 1
    y_pred = tf.fill(y_true.shape, 0.25)
    own, dice = (
        f(y_true, y_pred)
        for f in (
            UNET.build_model(image_size=8, width=8, depth=0).loss,
            UNET.build_model.__globals__["dice_loss"],
        )
    )
    expected = [-(np.log(0.25) + np.log(0.75)) / 2, -np.log(0.75)]
    np.testing.assert_allclose(own - dice, expected, rtol=1e-5)


def test_dice_loss_of_parts_is_that_of_the_whole_where_keras_own_is_not():
    """Parts of 5 and 2 of 7 images, weighted by their examples, as replicas' are."""
    rng = np.random.default_rng(0)
    y_true = (rng.random((7, 8, 8, 1)) < 0.3).astype(np.float32)
    y_pred = rng.random((7, 8, 8, 1)).astype(np.float32)
    y_true[6] = 0
    model = UNET.build_model(image_size=8, width=8, depth=0)

    def whole_and_parts(compute):
        parts = [(y_true[s], tf.constant(y_pred[s])) for s in (slice(7), slice(5), slice(5, 7))]
        whole, first, second = (float(compute(*part)) for part in parts)
        return whole, 5 / 7 * first + 2 / 7 * second

    own = whole_and_parts(lambda true, pred: model.compute_loss(y=true, y_pred=pred))
    assert own[0] == pytest.approx(own[1], abs=1e-6)
    pooled = whole_and_parts(keras.losses.Dice())
    assert abs(pooled[0] - pooled[1]) > 1e-3


def test_dice_loss_has_a_gradient_at_an_image_without_a_lesion():
    """Where Keras's Dice of each image has none."""
    loss = UNET.build_model(image_size=8, width=8, depth=0).loss
    empty, guess = tf.zeros((1, 8, 8, 1)), tf.fill((1, 8, 8, 1), 0.1)
    slopes = []
    for compute in (loss, keras.losses.Dice(axis=(1, 2, 3))):
        with tf.GradientTape() as tape:
            tape.watch(guess)
            value = compute(empty, guess)
        slopes.append(float(tf.reduce_min(tape.gradient(value, guess))))
    assert slopes[0] > 0.01
    assert slopes[1] == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 60}, "image_size=60 with depth=3: give a multiple of 8"),
        ({"width": 12}, "width=12: give a multiple of 8"),
    ],
)
def test_unet_refuses(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        UNET.build_model(**kwargs)


@pytest.fixture
def scans(tmp_path):
    """Six images and masks, of 8 and 16 bits, grey and coloured, of several sizes."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    arrays = {}
    for n in range(6):
        kind, channels, height = ((np.uint8, np.uint16)[n % 2], (1, 3)[n % 3 == 2], (16, 24)[n % 2])
        image = rng.integers(0, np.iinfo(kind).max, (height, 16, channels)).astype(kind)
        mask = (rng.random((height, 16, 1)) < 0.4).astype(kind) * (1, np.iinfo(kind).max)[n % 3 == 0]
        for folder, array in (("images", image), ("masks", mask)):
            tf.io.write_file(str(tmp_path / folder / f"{n}.png"), tf.io.encode_png(array))
        arrays[n] = (image, mask)
    return tmp_path, arrays


def test_masked_images_are_read_from_their_folders(scans):
    folder, arrays = scans
    x, y = read_masked_images(find_masked_images(folder), image_size=16).sample_batch(6)
    assert x.shape == y.shape == (6, 16, 16, 1)
    for n, (image, mask) in arrays.items():
        if image.shape == (16, 16, 1):
            np.testing.assert_allclose(x[n], image / np.iinfo(image.dtype).max, atol=1e-4)
            np.testing.assert_array_equal(y[n], mask > 0)
        assert set(np.unique(y[n])) == {0, 1}
        assert np.mean(y[n]) == pytest.approx(np.mean(mask > 0), abs=0.1)
    # A colour is as bright as its parts together, and a size is brought to another by averaging.
    assert float(np.mean(x[5])) == pytest.approx(np.mean(arrays[5][0]) / (2**16 - 1), abs=0.05)


def test_masked_images_are_divided_by_their_names(scans):
    folder, _ = scans
    parts = [UNET.build_data(split, data_dir=str(folder), image_size=16) for split in ("train", "test")]
    assert [part.num_examples for part in parts] == [4, 2]
    last = read_masked_images(find_masked_images(folder)[4:], image_size=16).sample_batch(2)
    for found, wanted in zip(parts[1].sample_batch(2), last, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_masked_images_that_do_not_fit_are_named(scans):
    folder, _ = scans
    (folder / "masks" / "3.png").rename(folder / "masks" / "3.kept")
    with pytest.raises(ConfigError, match=r"images/3.png has no mask; put one into .*masks/3.png"):
        find_masked_images(folder)
    tf.io.write_file(str(folder / "masks" / "3.png"), tf.io.encode_png(np.zeros((24, 15, 1), np.uint8)))
    with pytest.raises(
        ConfigError, match=r"images/3.png is 16×24 and its mask 15×24; they must be of one size"
    ):
        find_masked_images(folder)
    (folder / "masks" / "3.png").write_bytes(b"GIF89a" + struct.pack("<HH", 16, 24))
    with pytest.raises(ConfigError, match=r"masks/3.png is no PNG"):
        find_masked_images(folder)
    with pytest.raises(ConfigError, match=r"holds no images/\*.png; put them there, and their masks"):
        find_masked_images(folder / "masks")
