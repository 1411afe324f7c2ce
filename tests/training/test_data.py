"""The digits, training subsets, errors before CIFAR is read, and the augmentation of a batch."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from training.data import (
    DATASETS,
    DataError,
    cutmix,
    load,
    main,
    normalize,
    random_crop,
    random_dataset,
    random_flip,
)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_digits_are_all_of_scikit_learns_in_two_disjoint_parts(digits):
    assert digits.train_images.shape == (1437, 16, 16, 1)
    assert digits.test_images.shape == (360, 16, 16, 1)
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    for row, column in ((0, 1), (1, 0), (1, 1)):
        np.testing.assert_array_equal(images[:, row::2, column::2], images[:, ::2, ::2])
    sixteenths = np.rint(images[:, ::2, ::2, 0] / 255 * 16).astype(int).reshape(-1, 64).tolist()
    originals, targets = load_digits(return_X_y=True)
    originals = zip(originals.astype(int).tolist(), targets, strict=True)
    assert sorted(originals) == sorted(zip(sixteenths, labels, strict=True))
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert len(train) == len(test) == digits.num_classes == 10
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.005)
    pixels = digits.train_images / 255
    np.testing.assert_allclose(digits.mean, pixels.mean(axis=(0, 1, 2)), atol=5e-5)
    np.testing.assert_allclose(digits.std, pixels.std(axis=(0, 1, 2)), atol=5e-5)


@pytest.mark.parametrize("train_size", [10, 123, 1436, 1437])
def test_a_subset_represents_the_classes_as_equally_as_they_allow(digits, train_size):
    subset = load("digits", train_size=train_size, seed=3)
    counts = np.bincount(subset.train_labels, minlength=10)
    assert counts.sum() == len(subset.train_images) == train_size
    # Only a class that has given all its images may be smaller than another by more than one.
    assert np.all(counts[counts < np.bincount(digits.train_labels)] >= counts.max() - 1)
    label_of = dict(zip(map(bytes, digits.train_images), digits.train_labels, strict=True))
    chosen = list(map(bytes, subset.train_images))
    assert len(set(chosen)) == train_size
    assert [label_of[image] for image in chosen] == subset.train_labels.tolist()
    np.testing.assert_array_equal(subset.test_images, digits.test_images)
    np.testing.assert_array_equal(subset.test_labels, digits.test_labels)
    assert (subset.mean, subset.std) == (digits.mean, digits.std)


def test_a_subset_depends_on_the_seed_alone_and_grows_with_its_size():
    sizes = [(95, 1), (95, 1), (95, 2), (96, 1)]
    first, again, other, larger = (load("digits", train_size=n, seed=k) for n, k in sizes)
    assert first.digest() == again.digest() != other.digest()
    assert set(map(bytes, first.train_images)) < set(map(bytes, larger.train_images))


@pytest.mark.parametrize("train_size", [None, 640])
def test_validation_images_are_others_and_balanced_and_change_no_subset(digits, train_size):
    held_out = load("digits", train_size=train_size, validation_size=365, seed=3)
    images, labels = held_out.validation or ((), ())
    assert np.bincount(labels).min() >= 36
    assert len(images) == len(labels) == 365
    chosen = [*map(bytes, images), *map(bytes, held_out.train_images)]
    assert len(chosen) == len(set(chosen)) == 365 + (train_size or 1437 - 365)
    assert set(chosen) <= set(map(bytes, digits.train_images))
    label_of = dict(zip(map(bytes, digits.train_images), digits.train_labels, strict=True))
    assert [label_of[bytes(image)] for image in images] == labels.tolist()
    if train_size:
        without = load("digits", train_size=train_size, seed=3)
        np.testing.assert_array_equal(held_out.train_images, without.train_images)
        assert held_out.digest() != without.digest()


@pytest.mark.parametrize("field", ["train_images", "train_labels", "test_images", "test_labels"])
def test_a_digest_tells_data_of_the_same_size_apart(digits, field):
    array = getattr(digits, field).copy()
    array.flat[array.size // 2] ^= 1
    assert dataclasses.replace(digits, **{field: array}).digest() != digits.digest()


def test_random_data_have_the_shapes_of_the_real():
    data, spec = random_dataset("cifar100", 50), DATASETS["cifar100"]
    assert (data.train_images.shape, data.test_images.shape) == ((50, 32, 32, 3), (10, 32, 32, 3))
    assert (data.num_classes, data.mean, data.std) == (spec.num_classes, spec.mean, spec.std)
    assert (data.train_images.dtype, data.train_labels.dtype) == (np.uint8, np.int32)
    assert 60 < data.train_labels.max() < 100
    assert random_dataset("digits").train_labels.shape == (1437,)


def test_what_cannot_be_loaded_is_named_with_a_remedy(monkeypatch, tmp_path):
    for size in (0, 9, 1438):
        with pytest.raises(DataError, match=rf"--train-size {size} is .* 10 .* to 1437 "):
            load("digits", train_size=size)
    for sizes, most in (
        ({"train_size": 640}, "797 beside --train-size 640"),
        ({}, "1427 beside one"),
    ):
        with pytest.raises(DataError, match=rf"--validation-size 1428 is .* at most {most}"):
            load("digits", validation_size=1428, **sizes)
    with pytest.raises(DataError, match=r"'mnist'.* digits, cifar10, cifar100$"):
        load("mnist")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"tensorflow_datasets.*pip install --group cifar"):
        load("cifar10", tmp_path)
    with pytest.raises(SystemExit, match="cifar10 needs tensorflow_datasets"):
        main("cifar10", str(tmp_path))


@pytest.mark.slow
def test_digits_need_nothing_of_what_cifar_needs():
    absent = ("array_record", "importlib_resources", "PIL", "tensorflow", "tensorflow_datasets")
    code = f"""
import sys
sys.modules |= dict.fromkeys({absent})
from training.data import main
main("digits")
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "digits: 1437 training and 360 test images, 10 classes\n"


def random_images(batch: int, size: int = 8, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(1, 256, (batch, size, size, channels), dtype=np.uint8)


def test_crops_are_windows_of_the_padded_images():
    images, padding = random_images(300), 2
    crops = np.asarray(jax.jit(random_crop, static_argnums=2)(jax.random.key(0), images, padding))
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    matches = (windows.transpose(0, 1, 2, 4, 5, 3) == crops[:, None, None]).all(axis=(3, 4, 5))
    assert (matches.sum(axis=(1, 2)) == 1).all()
    assert matches.any(axis=0).all()  # every position occurs
    assert crops.dtype == np.uint8


def test_flips_are_mirror_images_half_of_the_time():
    images = random_images(400)
    flipped = np.asarray(random_flip(jax.random.key(0), jnp.asarray(images)))
    same = (flipped == images).all(axis=(1, 2, 3))
    mirrored = (flipped == np.flip(images, axis=2)).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_normalize():
    images, mean, std = random_images(4), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    normalized = normalize(jnp.asarray(images), mean, std)
    assert normalized.dtype == jnp.float32
    expected = (images.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(normalized, expected, rtol=1e-4, atol=1e-5)


def test_cutmix_mixes_labels_as_it_mixes_pixels():
    batch, size = 16, 10
    # Every pixel of image i is i, so that a mixed image tells where its pixels came from.
    images = jnp.broadcast_to(jnp.arange(16.0)[:, None, None, None], (batch, size, size, 1))
    keys = jax.vmap(jax.random.key)(jnp.arange(200))
    mix = jax.jit(jax.vmap(lambda key: cutmix(key, images, jnp.eye(batch), 1.0)))
    shares = []
    for mixed, labels in zip(*map(np.asarray, mix(keys)), strict=True):
        partners = np.argmax(labels * (1 - np.eye(batch)), axis=1)
        foreign = mixed[..., 0] != np.arange(batch)[:, None, None]
        theirs = (partners[:, None, None] == mixed[..., 0]) | ~foreign
        assert theirs.all()
        np.testing.assert_allclose(np.diag(labels), 1 - foreign.mean(axis=(1, 2)), atol=1e-6)
        np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
        # The foreign pixels fill one box, the same in every mixed image.
        anywhere = foreign.any(axis=0)
        box = anywhere.any(axis=1)[:, None] & anywhere.any(axis=0)
        ones = np.flatnonzero(box.any(axis=1))
        assert len(ones) == 0 or len(ones) == np.ptp(ones) + 1
        assert all((each == box).all() or not each.any() for each in foreign)
        shares.append(anywhere.mean())
    # The expected share: lambda uniform, the box's center uniform, what sticks out is cut off.
    half = (size * np.sqrt(np.linspace(0, 1, 10_000))).astype(int) // 2
    center = np.arange(size)[:, None]
    side = np.minimum(size, center + half) - np.maximum(0, center - half)
    assert abs(np.mean(shares) - (side.mean(axis=0) ** 2).mean() / size**2) < 0.05


def test_cutmix_probability():
    images, labels = jnp.asarray(random_images(8), jnp.float32), jnp.eye(8)
    mix = jax.jit(lambda key, probability: cutmix(key, images, labels, probability)[0])
    for probability, least, most in ((0.0, 0, 0), (0.5, 25, 60)):
        mixed = (mix(jax.random.key(seed), probability) for seed in range(100))
        # One batch in a dozen stays as it is though mixed: its box is empty.
        assert least <= sum(bool((each != images).any()) for each in mixed) <= most
