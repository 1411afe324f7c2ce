"""The data sets, as arrays in the host's memory, and the augmentation of a batch.

CIFAR is read from a folder of TensorFlow Datasets, and downloaded and prepared there if it is
missing. To do that beforehand, on a machine with network access:

    python -m training.data cifar100 --data-dir ~/tensorflow_datasets
"""

import dataclasses
import hashlib
import json
import os
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from training import UserError


class DatasetSpec(NamedTuple):
    """A data set that `train.py` offers by name."""

    label: str  # in titles, tables and figures
    description: str  # in `train.py --list`
    num_train: int  # training images
    image_size: int  # height and width in pixels
    num_classes: int
    mean: tuple[float, ...]  # of each channel over the training images, in units of pixel / 255
    std: tuple[float, ...]  # likewise


# CIFAR's constants are the customary ones; CIFAR-100's differ from the exact ones by up to 0.0002.
DATASETS = {
    "digits": DatasetSpec(
        *("digits", "scikit-learn's handwritten digits, nothing to download"),
        *(1437, 16, 10, (0.3054,), (0.3760,)),
    ),
    "cifar10": DatasetSpec(
        *("CIFAR-10", "small color photographs"),
        *(50_000, 32, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "cifar100": DatasetSpec(
        *("CIFAR-100", "small color photographs"),
        *(50_000, 32, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
}


class DataError(UserError):
    """A data set is unavailable as requested; the message says why, and what to do about it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for image classification, in the host's memory."""

    train_images: np.ndarray  # shape=(n, height, width, channels), dtype=uint8
    train_labels: np.ndarray  # shape=(n,), dtype=int32, from 0 to num_classes - 1
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]  # as those of `DatasetSpec`
    std: tuple[float, ...]
    validation: tuple[np.ndarray, np.ndarray] | None = None  # images and labels, not trained on

    def digest(self) -> str:
        """A hash of all images and labels, to tell data sets of the same size apart."""
        found = hashlib.blake2b(digest_size=16)
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        for array in (*arrays, *(self.validation or ())):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    train_size: int | None = None,
    validation_size: int = 0,
    seed: int = 0,
) -> Dataset:
    """Loads a data set.

    Args:
      name: one of `DATASETS`; of the digits, enlarged to 16x16, a fixed 360 are test images.
      data_dir: the folder of the TensorFlow Datasets; CIFAR is downloaded there (170 MB) if it is
        missing. Default: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      train_size: the number of training images to keep, balanced over the classes. With the same
        seed, a larger subset contains a smaller one. Default: all but the validation images.
      validation_size: the number of other training images, balanced as well, to validate with.
      seed: of the choice of images.

    Returns:
      The data set. `mean` and `std` are those of all training images, whatever the sizes.

    Raises:
      DataError: if there is no such data set, it cannot be read or downloaded, a package is
        missing, or a size is out of range.
    """
    if name not in DATASETS:
        raise DataError(f"there is no data set {name!r}, only {', '.join(DATASETS)}")
    dataset = _digits() if name == "digits" else _cifar(name, data_dir)
    if train_size is None and not validation_size:
        return dataset
    return _subset(dataset, name, train_size, validation_size, seed)


def random_dataset(name: str, num_train: int | None = None) -> Dataset:
    """Random images in the shapes of a data set, to measure speed; a fifth as many for the test."""
    spec, rng = DATASETS[name], np.random.default_rng(0)
    arrays = []
    for count in (num_train or spec.num_train, (num_train or spec.num_train) // 5):
        shape = (count, spec.image_size, spec.image_size, len(spec.mean))
        arrays.append(rng.integers(0, 256, shape, np.uint8))
        arrays.append(rng.integers(0, spec.num_classes, count, np.int32))
    return _described(name, *arrays)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = images.repeat(2, axis=1).repeat(2, axis=2)
    labels = labels.astype(np.int32)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(np.asarray, split)
    return _described("digits", train_images, train_labels, test_images, test_labels)


def _cifar(name: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    packages = ("array_record", "importlib_resources", "PIL", "requests", "tensorflow_datasets")
    if missing := [package for package in packages if find_spec(package) is None]:
        raise DataError(
            f"{name} needs {', '.join(missing)}: in the clone, with pip 25.1 or newer, run "
            "`pip install --group cifar`"
        )
    from training import cifar

    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    try:
        root = root.expanduser()
    except RuntimeError as error:
        raise DataError(f"{root}: {error}; give a whole path with --data-dir") from error
    folder, command = root / name / cifar.VERSION, f"python -m training.data {name} --data-dir"
    if root.exists() and not root.is_dir():
        raise DataError(f"--data-dir is {root}, which is a file; give a folder")
    if not folder.exists():
        try:
            cifar.prepare(name, root)
        except Exception as error:
            raise DataError(
                f"{name} is not in {folder} and could not be prepared there ({_shortened(error)}): "
                f"with a network, run `{command} DIR`, then copy DIR/{name} into {root}; or put "
                f"{cifar.archive(name)} into {root / 'downloads' / 'manual'}"
            ) from error
    elsewhere = f"prepare it in another folder with `{command} DIR`"
    info = folder / "dataset_info.json"
    try:
        if not info.exists():
            raise DataError(f"{folder} has no dataset_info.json: put back a copy, or {elsewhere}")
        file_format = json.loads(info.read_text()).get("fileFormat", "array_record")
        if file_format != "array_record":
            raise DataError(
                f"{folder} is in the format {file_format}, and only array_record can be read: "
                f"convert it with `tfds convert_format`, or {elsewhere}"
            )
        train, test = cifar.read(name, root, "train"), cifar.read(name, root, "test")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} in {folder} is incomplete or damaged ({_shortened(error)}): put back a copy, "
            f"or {elsewhere}"
        ) from error
    return _described(name, *train, *test)


def _shortened(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def _described(name: str, *arrays: np.ndarray) -> Dataset:
    spec = DATASETS[name]
    return Dataset(*arrays, num_classes=spec.num_classes, mean=spec.mean, std=spec.std)


def _subset(
    dataset: Dataset, name: str, train_size: int | None, validation_size: int, seed: int
) -> Dataset:
    labels, num_classes = dataset.train_labels, dataset.num_classes
    if train_size is not None and not num_classes <= train_size <= len(labels):
        raise DataError(
            f"--train-size {train_size} is invalid: {name} allows "
            f"{num_classes} (one of each class) to {len(labels)} (all of them)"
        )
    if validation_size > (most := len(labels) - (train_size or num_classes)):
        kept = "one of each class" if train_size is None else f"--train-size {train_size}"
        raise DataError(
            f"--validation-size {validation_size} is invalid: {name} allows at most {most} beside "
            f"{kept}"
        )
    rng = np.random.default_rng(seed)
    rank = np.empty_like(labels)  # of each image within its class, at random
    for label, count in enumerate(np.bincount(labels, minlength=num_classes)):
        rank[labels == label] = rng.permutation(count)
    # By rank: one image of every class before the second of any class.
    order = np.argsort(rank, kind="stable")
    if train_size is None:
        order = np.roll(order, -validation_size)
        train_size = len(labels) - validation_size
    bounds = [train_size, train_size + validation_size]
    keep, held_out, _ = map(np.sort, np.split(order, bounds))
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[keep],
        train_labels=labels[keep],
        validation=(dataset.train_images[held_out], labels[held_out]) if validation_size else None,
    )


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads images of shape `(batch, height, width, channels)` with zeros, crops them randomly."""
    batch, height, width, channels = images.shape
    pad = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, pad)
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of shape `(batch, height, width, channels)` with probability 1/2."""
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Converts pixels to float32 of mean 0 and deviation 1 per channel (the last axis)."""
    center, scale = 255 * jnp.asarray(mean), 255 * jnp.asarray(std)
    return (images.astype(jnp.float32) - center) / scale


def cutmix(
    key: jax.Array, images: jax.Array, labels: jax.Array, probability: float
) -> tuple[jax.Array, jax.Array]:
    """CutMix: replaces a box of each image by that of another image, and mixes their labels.

    The box, the same for the whole batch, has an expected share of 1 - lambda of the image, lambda
    being uniform in [0, 1] (beta = 1), and is cut off at the image's edge. Labels are mixed in
    proportion to the areas.

    Args:
      key: a PRNG key.
      images: shape `(batch, height, width, channels)`.
      labels: probabilities of shape `(batch, num_classes)`.
      probability: how likely it is that the batch is mixed at all.

    References:
      Yun et al., `CutMix <https://arxiv.org/abs/1905.04899>`_, 2019, algorithm A1
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 5)
    keep = jax.random.uniform(keys[0])
    mix = jax.random.bernoulli(keys[1], probability)

    def span(key: jax.Array, size: int) -> jax.Array:
        center = jax.random.randint(key, (), 0, size)
        half = (size * jnp.sqrt(1 - keep)).astype(jnp.int32) // 2
        position = jnp.arange(size)
        return (center - half <= position) & (position < center + half)

    box = mix & span(keys[2], height)[:, None] & span(keys[3], width)
    share = jnp.mean(box, dtype=jnp.float32)
    other = jax.random.permutation(keys[4], batch)
    images = jnp.where(box[:, :, None], images[other], images)
    return images, (1 - share) * labels + share * labels[other]


def main(
    name: tyro.conf.Positional[str],
    data_dir: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = None,
) -> None:
    """Load a data set, and download and prepare it if it is missing.

    Args:
      name: digits, cifar10 or cifar100.
      data_dir: folder (default: $TFDS_DATA_DIR or ~/tensorflow_datasets).
    """
    try:
        dataset = load(name, data_dir)
    except DataError as error:
        sys.exit(str(error))
    print(
        f"{name}: {len(dataset.train_images)} training and {len(dataset.test_images)} test images, "
        f"{dataset.num_classes} classes"
    )


if __name__ == "__main__":
    tyro.cli(main, prog="python -m training.data", config=(tyro.conf.DisallowNone,))
