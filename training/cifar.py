"""CIFAR-10 and CIFAR-100 as TensorFlow Datasets, prepared and read without TensorFlow.

The stock builders of TensorFlow Datasets use TensorFlow to extract the archive, to read it and to
encode the images. Those below have the same names and version and write the same records, so each
reads a folder that the other prepared.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image

VERSION = "3.0.2"
SIZES = {"train": 50_000, "test": 10_000}


class _Cifar(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(VERSION)

    url: ClassVar[str]
    # Members of the archive. Which hold the records of a split, in order:
    records: ClassVar[dict[str, tuple[str, ...]]]
    # Which names the classes of a label, and how many; in the order of the bytes of a record.
    labels: ClassVar[dict[str, tuple[str, int]]]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3))}
        for label, (_, num_classes) in self.labels.items():
            features[label] = tfds.features.ClassLabel(num_classes=num_classes)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        # One pass, everything in memory (185 MB): a gzipped archive cannot be read at random.
        with tarfile.open(dl_manager.download(self.url)) as archive:
            members = {
                Path(member.name).name: file.read()
                for member in archive
                if (file := archive.extractfile(member))
            }
        features: Any = self.info.features
        for label, (member, _) in self.labels.items():
            features[label].names = members[member].decode().split()
        return {
            split: self._generate_examples(split, b"".join(members[name] for name in names))
            for split, names in self.records.items()
        }

    def _generate_examples(self, split: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        # A record is its labels, one byte each, and the red, green and blue planes of its image.
        records = np.frombuffer(data, np.uint8).reshape(-1, len(self.labels) + 3 * 32 * 32)
        labels, planes = np.split(records, [len(self.labels)], axis=1)
        images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        # TFDS orders the records by a hash of their key: the stock builder's key, the same order.
        for key, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            example = dict(zip(self.labels, label, strict=True))
            # TFDS encodes an array with TensorFlow, and a Pillow image with Pillow.
            yield key, example | {"id": f"{split}_{key:05d}", "image": Image.fromarray(image)}


class Cifar10(_Cifar, skip_registration=True):
    """CIFAR-10: photographs of 10 classes."""

    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    records: ClassVar = {
        "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("test_batch.bin",),
    }
    labels: ClassVar = {"label": ("batches.meta.txt", 10)}


class Cifar100(_Cifar, skip_registration=True):
    """CIFAR-100: photographs of 100 classes, which make up 20 coarse ones."""

    url = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    records: ClassVar = {"train": ("train.bin",), "test": ("test.bin",)}
    labels: ClassVar = {
        "coarse_label": ("coarse_label_names.txt", 20),
        "label": ("fine_label_names.txt", 100),
    }


_BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100}


def archive(name: str) -> str:
    """The name of the file that a data set is downloaded as."""
    return Path(_BUILDERS[name].url).name


def prepare(name: str, data_dir: str | os.PathLike[str]) -> None:
    """Downloads a data set and writes it to `data_dir/name/VERSION`, as ArrayRecord files.

    The folder appears only when it is complete. The archive (170 MB) is checked against the
    checksum that TensorFlow Datasets ships and stays in `data_dir/downloads`; without a network,
    one found in `data_dir/downloads/manual` is used instead.
    """
    builder = _BUILDERS[name](data_dir=data_dir)
    if not Path(data_dir, "downloads", "manual", archive(name)).exists():
        try:
            requests.head(builder.url, timeout=30)
        except requests.RequestException as error:
            # TFDS would fail too, but after ten attempts and more than three minutes.
            raise ConnectionError(f"no connection to {builder.url}") from error
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(
            try_download_gcs=False, force_checksums_validation=True
        ),
    )


def read(name: str, data_dir: str | os.PathLike[str], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a prepared split, `"train"` or `"test"`; needs no network.

    Returns:
      Images of shape `(n, 32, 32, 3)`, uint8, and their labels (the fine ones of CIFAR-100) of
      shape `(n,)`, int32.

    Raises:
      ValueError: if the split does not hold as many images as CIFAR does.
    """
    # Pillow decodes a 32x32 image faster than TFDS, which also warns that OpenCV is missing.
    source = _BUILDERS[name](data_dir=data_dir).as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    if len(source) != SIZES[split]:
        raise ValueError(f"its {split} split holds {len(source)} images, not {SIZES[split]}")
    # All at once: one by one takes twice as long.
    examples = source.__getitems__(range(len(source)))
    images = np.stack([np.asarray(Image.open(io.BytesIO(each["image"]))) for each in examples])
    return images, np.array([each["label"] for each in examples], np.int32)
