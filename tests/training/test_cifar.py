"""Preparing and reading CIFAR: on a small archive in the real format, and without a network."""

import io
import os
import socket
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds

from training import cifar
from training.data import DataError, load, main

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
SIZES = {"train": 20, "test": 10}


class Split(NamedTuple):
    images: np.ndarray
    labels: list[int]
    coarse_labels: list[int]


def random_splits(name: str) -> dict[str, Split]:
    rng = np.random.default_rng(0)
    return {
        split: Split(
            rng.integers(0, 256, (size, 32, 32, 3), np.uint8),
            rng.integers(0, NUM_CLASSES[name], size).tolist(),
            rng.integers(0, 20, size).tolist(),
        )
        for split, size in SIZES.items()
    }


def class_names(kind: str, number: int) -> list[str]:
    return [f"{kind}_{i}" for i in range(number)]


def write_archive(path: Path, name: str, splits: dict[str, Split]) -> None:
    """The binary version that https://www.cs.toronto.edu/~kriz/cifar.html describes."""

    def records(split: str, start: int = 0, stop: int | None = None) -> bytes:
        return b"".join(
            bytes([coarse, label] if name == "cifar100" else [label])
            + b"".join(image[:, :, channel].tobytes() for channel in range(3))
            for image, label, coarse in list(zip(*splits[split], strict=True))[start:stop]
        )

    if name == "cifar100":
        folder = "cifar-100-binary"
        members = {
            "train.bin": records("train"),
            "test.bin": records("test"),
            "fine_label_names.txt": "\n".join(class_names("fine", 100)) + "\n",
            "coarse_label_names.txt": "\n".join(class_names("coarse", 20)) + "\n",
        }
    else:
        folder = "cifar-10-batches-bin"
        # Out of order, as nothing promises an order.
        members = {
            f"data_batch_{i}.bin": records("train", 4 * i - 4, 4 * i) for i in (1, 5, 3, 2, 4)
        } | {
            "batches.meta.txt": "\n".join(class_names("fine", 10)) + "\n\n",
            "test_batch.bin": records("test"),
            "readme.html": "<html></html>",
        }
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for member, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(f"{folder}/{member}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture(autouse=True)
def lookups(monkeypatch):
    """Blocks the network; returns the list of hosts that were looked up nevertheless."""
    hosts = []

    def getaddrinfo(host, *args, **kwargs):
        hosts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return hosts


def manual_path(data_dir: Path, name: str) -> Path:
    """The path at which an archive downloaded by the user is expected."""
    return data_dir / "downloads" / "manual" / f"cifar-{NUM_CLASSES[name]}-binary.tar.gz"


def accept(monkeypatch, archive: Path) -> None:
    """Replaces the downloaded archive by a small one, and the expected size by its size."""

    def download(self, url):
        assert url == f"https://www.cs.toronto.edu/~kriz/{archive.name}"
        return archive

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(cifar, "SIZES", SIZES)


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request):
    return request.param


@pytest.fixture
def prepared(name, monkeypatch, tmp_path):
    """A data directory in which the small archive is prepared."""
    archive = manual_path(tmp_path, name)
    write_archive(archive, name, random_splits(name))
    accept(monkeypatch, archive)
    load(name, tmp_path)
    return tmp_path


def test_what_was_in_the_archive_is_loaded(name, prepared, lookups):
    dataset = load(name, prepared)
    splits = random_splits(name)
    for split, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        assert images.shape == (SIZES[split], 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        # Preparing shuffles the examples.
        expected = dict(zip(map(bytes, splits[split].images), splits[split].labels, strict=True))
        assert dict(zip(map(bytes, images), labels.tolist(), strict=True)) == expected
    assert dataset.num_classes == NUM_CLASSES[name]
    assert lookups == []


def test_the_stock_builder_reads_what_ours_prepared(name, prepared):
    stock: Any = tfds.builder_cls(name)
    assert stock.__module__ == "tensorflow_datasets.image_classification.cifar"
    builder = stock(data_dir=prepared)
    names = builder.info.features["label"].names
    assert names == class_names("fine", NUM_CLASSES[name])
    if name == "cifar100":
        assert builder.info.features["coarse_label"].names == class_names("coarse", 20)

    for split, (images, labels, coarse_labels) in random_splits(name).items():
        examples = {each["id"].decode(): each for each in builder.as_data_source(split)}
        assert sorted(examples) == [f"{split}_{i:05d}" for i in range(SIZES[split])]
        for i, (_, example) in enumerate(sorted(examples.items())):
            np.testing.assert_array_equal(example["image"], images[i])
            assert example["label"] == labels[i]
            if name == "cifar100":
                assert example["coarse_label"] == coarse_labels[i]


def test_preparing_leaves_nothing_behind_when_it_fails(name, monkeypatch, tmp_path):
    good, bad = manual_path(tmp_path, name), tmp_path / "bad" / manual_path(tmp_path, name).name
    splits = random_splits(name)
    write_archive(good, name, splits)
    splits["test"].labels[-1] = NUM_CLASSES[name]  # out of range, in the very last record
    write_archive(bad, name, splits)

    accept(monkeypatch, bad)
    with pytest.raises(DataError, match="could not be prepared there"):
        load(name, tmp_path)
    assert list((tmp_path / name).iterdir()) == []
    accept(monkeypatch, good)
    assert len(load(name, tmp_path).test_images) == SIZES["test"]


def test_archive_with_another_checksum_is_refused(name, tmp_path):
    archive = manual_path(tmp_path, name)
    write_archive(archive, name, random_splits(name))
    with pytest.raises(DataError, match=rf"NonMatchingChecksumError.*{archive.name}"):
        load(name, tmp_path)
    assert not (tmp_path / name / "3.0.2").exists()


def test_missing_data_set_without_a_network_is_one_clear_sentence(name, tmp_path, lookups):
    folder = tmp_path / name / "3.0.2"
    with pytest.raises(DataError) as error:
        load(name, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{name} is not in {folder} ")
    assert "no connection to https://www.cs.toronto.edu/" in message
    assert f"`python -m training.data {name} --data-dir DIR`" in message
    assert set(lookups) == {"www.cs.toronto.edu"}
    assert list(tmp_path.iterdir()) == []


def test_default_folder_is_that_of_tensorflow_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(DataError, match=f"{tmp_path}/home/tensorflow_datasets/cifar10/"):
        load("cifar10")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    with pytest.raises(DataError, match=f"{tmp_path}/env/cifar10/"):
        load("cifar10")


def remove_records(folder: Path, records: Path) -> None:
    records.unlink()


def truncate_records(folder: Path, records: Path) -> None:
    records.write_bytes(records.read_bytes()[:-1000])


def flip_a_byte(folder: Path, records: Path) -> None:
    content = bytearray(records.read_bytes())
    # Zeros pad the file to a multiple of 64 KiB; the images are where its bytes are random.
    content[20_000] ^= 0xFF
    records.write_bytes(content)


def remove_info(folder: Path, records: Path) -> None:
    (folder / "dataset_info.json").unlink()


def truncate_info(folder: Path, records: Path) -> None:
    info = folder / "dataset_info.json"
    info.write_text(info.read_text()[:100])


def remove_everything(folder: Path, records: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize("name", ["cifar100"], indirect=True)
@pytest.mark.parametrize(
    "damage",
    [remove_records, truncate_records, flip_a_byte, remove_info, truncate_info, remove_everything],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_data_set_is_one_clear_sentence(name, prepared, damage, split, lookups):
    folder = prepared / name / "3.0.2"
    damage(folder, folder / f"{name}-{split}.array_record-00000-of-00001")
    with pytest.raises(DataError) as error:
        load(name, prepared)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{name} in {folder} is incomplete or damaged ")
    assert message.endswith(
        f": delete that folder and run `python -m training.data {name} --data-dir {prepared}`"
    )
    assert lookups == []


def test_wrong_number_of_images_is_refused(name, prepared, monkeypatch):
    monkeypatch.setattr(cifar, "SIZES", {"train": 20, "test": 11})
    with pytest.raises(DataError, match="its test split holds 10 images, not 11"):
        load(name, prepared)


def test_missing_package_is_named_though_the_data_is_there(name, prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(DataError, match=r"array_record.*pip install -e '\.\[cifar\]'"):
        load(name, prepared)


def test_command_line_says_what_is_there(name, prepared, capsys):
    capsys.readouterr()
    main(name, str(prepared))
    output = capsys.readouterr()
    expected = f"{name}: 20 training and 10 test images, {NUM_CLASSES[name]} classes\n"
    assert (output.out, output.err) == (expected, "")


REAL = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


@pytest.mark.skipif(
    not (REAL / "cifar100" / "3.0.2").exists(), reason="CIFAR-100 is not in TFDS_DATA_DIR"
)
def test_real_cifar100(lookups, capfd):
    dataset = load("cifar100", REAL)
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), np.full(100, 500))
    np.testing.assert_array_equal(np.bincount(dataset.test_labels), np.full(100, 100))
    # The customary constants are not quite those of the images.
    for channel in range(3):
        pixels = dataset.train_images[..., channel] / 255
        np.testing.assert_allclose(dataset.mean[channel], pixels.mean(), atol=2.5e-4)
        np.testing.assert_allclose(dataset.std[channel], pixels.std(), atol=2.5e-4)
    assert lookups == []
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")
