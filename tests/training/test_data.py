"""The digits, training subsets, and errors before CIFAR is read."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from training.data import DataError, load, main


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_digits_are_all_of_scikit_learns_in_two_disjoint_parts(digits):
    assert digits.train_images.shape == (1437, 16, 16, 1)
    assert digits.test_images.shape == (360, 16, 16, 1)
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    for row in (0, 1):
        for column in (0, 1):
            np.testing.assert_array_equal(images[:, row::2, column::2], images[:, ::2, ::2])

    sixteenths = np.rint(images[:, ::2, ::2, 0] / 255 * 16).astype(int)
    pixels, targets = load_digits(return_X_y=True)
    originals = pixels.astype(int).tolist()
    assert sorted(zip(originals, targets, strict=True)) == sorted(
        zip(sixteenths.reshape(-1, 64).tolist(), labels, strict=True)
    )


def test_digits_split_every_class_alike(digits):
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert len(train) == len(test) == digits.num_classes == 10
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.005)


def test_digits_constants_are_those_of_the_training_images(digits):
    pixels = digits.train_images / 255
    np.testing.assert_allclose(digits.mean, pixels.mean(axis=(0, 1, 2)), atol=5e-5)
    np.testing.assert_allclose(digits.std, pixels.std(axis=(0, 1, 2)), atol=5e-5)


@pytest.mark.parametrize("train_size", [10, 123, 1400, 1436, 1437])
def test_subset_represents_the_classes_as_equally_as_they_allow(digits, train_size):
    subset = load("digits", train_size=train_size, seed=3)
    assert len(subset.train_images) == len(subset.train_labels) == train_size
    counts = np.bincount(subset.train_labels, minlength=10)
    available = np.bincount(digits.train_labels)
    # Only a class that has given all its images may be smaller than another by more than one.
    assert np.all(counts[counts < available] >= counts.max() - 1)


def test_subset_keeps_each_image_with_its_label_and_the_test_images(digits):
    subset = load("digits", train_size=300)
    label_of = dict(zip(map(bytes, digits.train_images), digits.train_labels, strict=True))
    chosen = list(map(bytes, subset.train_images))
    assert len(set(chosen)) == 300
    assert [label_of[image] for image in chosen] == subset.train_labels.tolist()
    np.testing.assert_array_equal(subset.test_images, digits.test_images)
    np.testing.assert_array_equal(subset.test_labels, digits.test_labels)
    assert (subset.mean, subset.std) == (digits.mean, digits.std)


def test_subset_depends_on_the_seed_alone_and_grows_with_its_size():
    images = load("digits", train_size=95, seed=1).train_images
    np.testing.assert_array_equal(images, load("digits", train_size=95, seed=1).train_images)
    assert not np.array_equal(images, load("digits", train_size=95, seed=2).train_images)
    larger = load("digits", train_size=96, seed=1).train_images
    assert set(map(bytes, images)) < set(map(bytes, larger))


@pytest.mark.parametrize("train_size", [-1, 0, 9, 1438])
def test_impossible_subset_is_refused_with_the_range(train_size):
    with pytest.raises(DataError, match=rf"--train-size {train_size} is .* 10 .* to 1437 "):
        load("digits", train_size=train_size)


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"'mnist'.* digits, cifar10, cifar100$"):
        load("mnist")


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"tensorflow_datasets.*pip install -e '\.\[cifar\]'"):
        load("cifar10", tmp_path)


def test_digits_need_nothing_of_what_cifar_needs():
    code = """
import sys
absent = ["array_record", "importlib_resources", "PIL", "tensorflow", "tensorflow_datasets"]
sys.modules |= dict.fromkeys(absent)
from training.data import main
main("digits")
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stderr == ""
    assert run.stdout == "digits: 1437 training and 360 test images, 10 classes\n"


def test_command_line_ends_with_the_error_alone(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(SystemExit, match="cifar10 needs tensorflow_datasets"):
        main("cifar10", str(tmp_path))
