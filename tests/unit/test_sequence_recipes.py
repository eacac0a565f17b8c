"""What speech_commands and text_lm train on, and what text_lm's parts see of each other."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist.data import build_source
from tfdist.errors import ConfigError
from tfdist.recipe import load_recipe

SPEECH, TEXT = load_recipe("speech_commands"), load_recipe("text_lm")
WORDS = ["down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes", "_silence_", "_unknown_"]


def test_made_up_words_follow_from_seed_and_place():
    train, test = (SPEECH.build_data(split, num_examples=60) for split in ("train", "test"))
    assert (train.num_examples, test.num_examples) == (48, 12)
    x, y = train.sample_batch(48)
    assert (x.shape, x.dtype) == ((48, 98, 40), tf.float32)
    assert set(y.numpy()) == set(range(12))
    later, labels = train.take(tf.constant([7, 3], tf.int64))
    np.testing.assert_array_equal(labels, y.numpy()[[7, 3]])
    np.testing.assert_allclose(later, x.numpy()[[7, 3]], atol=1e-5)
    held_out, _ = test.sample_batch(12)
    assert len({spectrogram.tobytes() for spectrogram in [*x.numpy(), *held_out.numpy()]}) == 60
    other, _ = SPEECH.build_data("train", num_examples=60, seed=1).sample_batch(1)
    assert not np.allclose(other, x[:1])


def test_log_mel_finds_a_tone_in_its_band_and_a_silence_at_the_floor():
    seconds = np.arange(16_000) / 16_000
    loud = np.concatenate([np.sin(2 * np.pi * 1000 * seconds[:8000]), np.zeros(8000)])
    audio = tf.constant(np.stack([2**14 * loud, 0 * loud]).astype(np.int16))
    log_mel = SPEECH.build_data.__globals__["log_mel"]
    tone, silence = log_mel(audio, num_mels=40).numpy()
    mels = [2595 * np.log10(1 + hz / 700) for hz in (60, 1000, 7600)]
    band = 41 * (mels[1] - mels[0]) / (mels[2] - mels[0]) - 1
    assert abs(tone[20].argmax() - band) < 1
    assert tone[20].max() > 0 > tone[90].max()
    np.testing.assert_allclose(silence, np.log(1e-6), rtol=1e-6)
    np.testing.assert_allclose(log_mel(audio[0], num_mels=40), tone, atol=1e-5)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Recordings stored as TFDS stores speech_commands; only the download and its unpacking are left out."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    lengths = (16_000, 9_000, 20_000, 1)
    recordings = [rng.integers(-(2**15), 2**15, length).astype(np.int16) for length in lengths]
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    builder = tfds.builder("speech_commands", data_dir=data_dir)

    def generate(names):
        for n, (recording, word) in enumerate(zip(recordings, names, strict=True)):
            yield n, {"audio": recording, "label": word}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(builder),
            "_split_generators",
            lambda self, manager: {"train": generate(WORDS[:4]), "test": generate(WORDS[8:])},
        )
        builder.download_and_prepare()
    return data_dir, recordings


def test_speech_commands_is_read_as_tfds_prepares_it(spoken):
    data_dir, recordings = spoken
    log_mel = SPEECH.build_data.__globals__["log_mel"]
    filled = [np.pad(r[:16_000], (0, max(0, 16_000 - len(r)))) for r in recordings]
    wanted = log_mel(tf.constant(np.stack(filled)), num_mels=20).numpy()
    for split, first in (("train", 0), ("test", 8)):
        source = build_source(SPEECH.build_data(split, data_dir=data_dir, num_mels=20))
        x, y = source.sample_batch(4)
        assert sorted(y.numpy()) == list(range(first, first + 4))
        np.testing.assert_allclose(x.numpy(), wanted[y.numpy() - first], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("split", "kwargs", "message"),
    [
        ("validation", {}, "no split 'validation'; choose train or test"),
        ("test", {"num_examples": 4}, "num_examples=4: it must be at least 5"),
    ],
)
def test_speech_refuses(split, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        SPEECH.build_data(split, **kwargs)
    with pytest.raises(ConfigError, match="filters=20: give a multiple of 8"):
        SPEECH.build_model(filters=20)


def test_text_windows_do_not_overlap_and_the_next_character_is_the_answer():
    x, y = TEXT.build_data("train", sequence_length=32)
    assert x.shape == y.shape == (399_999 // 32, 32)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    np.testing.assert_array_equal(x[1:, 0], y[:-1, -1])
    test_x, _ = TEXT.build_data("test", sequence_length=32)
    assert test_x.shape == (39_999 // 32, 32)


SMALL = {"num_layers": 2, "width": 16, "num_heads": 2, "sequence_length": 8}


def test_text_lm_sees_no_later_character():
    model = TEXT.build_model(**SMALL)
    ids = np.arange(8)[np.newaxis] + 5
    changed = ids.copy()
    changed[0, 5] = 60
    before, after = model(ids).numpy(), model(changed).numpy()
    np.testing.assert_allclose(before[0, :5], after[0, :5], atol=1e-6)
    assert np.abs(before[0, 5:] - after[0, 5:]).max(axis=-1).min() > 1e-4, "each later one sees it"


def test_text_lm_has_one_table_in_and_out():
    model = TEXT.build_model(**SMALL)
    block = 12 * 16**2 + 5 * 16 + 4 * 16  # attention without biases; feed-forward and norms with them
    assert model.count_params() == 97 * 16 + 8 * 16 + 2 * block + 2 * 16
    assert model.output_shape == (None, 8, 97)


def test_text_lm_gives_float32_logits_in_bfloat16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = TEXT.build_model(**SMALL)
    finally:
        keras.config.set_dtype_policy(before)
    assert model(np.zeros((1, 8), np.int32)).dtype == tf.float32
    assert {v.dtype for v in model.trainable_variables} == {"float32"}


def test_text_lm_loads_in_plain_keras(tmp_path):
    model = TEXT.build_model(**SMALL)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    ids = np.arange(8)[np.newaxis]
    np.testing.assert_array_equal(loaded(ids), model(ids))
    assert {type(layer).__module__.split(".")[0] for layer in loaded.layers} == {"keras"}
