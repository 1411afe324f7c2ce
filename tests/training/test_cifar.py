"""Preparing and reading CIFAR: on a small archive in the real format, and without a network."""

import io
import json
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from training import cifar
from training.data import DataError, load, main

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
SIZES = {"train": 20, "test": 10}
REAL = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def random_splits(name: str) -> dict[str, list]:
    """Image, label and coarse label of each example."""
    rng = np.random.default_rng(0)
    shape, classes = (32, 32, 3), (NUM_CLASSES[name], 20)
    return {
        split: [
            (rng.integers(0, 256, shape, np.uint8), *map(int, rng.integers(0, classes)))
            for _ in range(size)
        ]
        for split, size in SIZES.items()
    }


def class_names(kind: str, number: int) -> list[str]:
    return [f"{kind}_{i}" for i in range(number)]


def write_archive(path: Path, name: str, splits: dict) -> Path:
    """The binary version that https://www.cs.toronto.edu/~kriz/cifar.html describes."""

    def records(split: str, start: int = 0, stop: int | None = None) -> bytes:
        return b"".join(
            bytes([coarse, label] if name == "cifar100" else [label])
            + image.transpose(2, 0, 1).tobytes()
            for image, label, coarse in splits[split][start:stop]
        )

    fine, coarse = class_names("fine", NUM_CLASSES[name]), class_names("coarse", 20)
    if name == "cifar100":
        members = {"train.bin": records("train"), "test.bin": records("test")}
        for kind, names in (("fine", fine), ("coarse", coarse)):
            members[f"{kind}_label_names.txt"] = "\n".join(names).encode() + b"\n"
    else:  # out of order, as nothing promises an order
        batches = {
            f"data_batch_{i}.bin": records("train", 4 * i - 4, 4 * i) for i in (1, 5, 3, 2, 4)
        }
        members = batches | {"batches.meta.txt": "\n".join(fine).encode() + b"\n\n"}
        members |= {"test_batch.bin": records("test"), "readme.html": b"<html></html>"}
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for member, content in members.items():
            info = tarfile.TarInfo(f"folder/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def lookups(monkeypatch):
    """Blocks the network; gives the list of hosts that were looked up nevertheless."""
    hosts = []

    def getaddrinfo(host, *args, **kwargs):
        hosts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return hosts


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request):
    return request.param


@pytest.fixture
def archive(name, tmp_path):
    """Where an archive that the user downloaded is expected; with one in the real format."""
    path = tmp_path / "downloads" / "manual" / f"cifar-{NUM_CLASSES[name]}-binary.tar.gz"
    return write_archive(path, name, random_splits(name))


def accept(monkeypatch, archive: Path) -> None:
    """Replaces the downloaded archive by a small one, and the expected size by its size."""

    def download(self, url):
        assert url == f"https://www.cs.toronto.edu/~kriz/{archive.name}"
        return archive

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(cifar, "SIZES", SIZES)


@pytest.fixture
def prepared(name, archive, monkeypatch, tmp_path):
    """A data directory in which the small archive is prepared."""
    accept(monkeypatch, archive)
    load(name, tmp_path)
    return tmp_path


def test_what_was_in_the_archive_is_loaded(name, prepared, lookups, capsys):
    capsys.readouterr()
    main(name, str(prepared))
    expected = f"{name}: 20 training and 10 test images, {NUM_CLASSES[name]} classes\n"
    assert capsys.readouterr() == (expected, "")
    dataset, splits = load(name, prepared), random_splits(name)
    for split in SIZES:
        images, labels = (getattr(dataset, f"{split}_{kind}") for kind in ("images", "labels"))
        assert images.shape == (SIZES[split], 32, 32, 3)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        # Preparing shuffles the examples.
        expected = {bytes(image): label for image, label, _ in splits[split]}
        assert dict(zip(map(bytes, images), labels.tolist(), strict=True)) == expected
    assert dataset.num_classes == NUM_CLASSES[name]
    assert lookups == []


def test_the_stock_builder_reads_what_ours_prepared(name, prepared):
    stock = tfds.builder_cls(name)
    assert stock.__module__ == "tensorflow_datasets.image_classification.cifar"
    builder = stock(data_dir=prepared)
    kinds = {"label": ("fine", NUM_CLASSES[name]), "coarse_label": ("coarse", 20)}
    kinds = kinds if name == "cifar100" else {"label": kinds["label"]}
    for label, (kind, number) in kinds.items():
        assert builder.info.features[label].names == class_names(kind, number)
    for split, written in random_splits(name).items():
        examples = {each["id"].decode(): each for each in builder.as_data_source(split)}
        assert sorted(examples) == [f"{split}_{i:05d}" for i in range(SIZES[split])]
        for (_, example), (image, *labels) in zip(sorted(examples.items()), written, strict=True):
            np.testing.assert_array_equal(example["image"], image)
            assert [example[label] for label in kinds] == labels[: len(kinds)]


def test_preparing_leaves_nothing_behind_when_it_fails(name, archive, monkeypatch, tmp_path):
    with pytest.raises(DataError, match=rf"NonMatchingChecksumError.*{archive.name}"):
        load(name, tmp_path)
    assert not (tmp_path / name / "3.0.2").exists()
    splits = random_splits(name)
    splits["test"][-1] = (splits["test"][-1][0], NUM_CLASSES[name], 0)  # no such class
    accept(monkeypatch, write_archive(tmp_path / "bad" / archive.name, name, splits))
    with pytest.raises(DataError, match="could not be prepared there"):
        load(name, tmp_path)
    assert list((tmp_path / name).iterdir()) == []
    accept(monkeypatch, archive)
    assert len(load(name, tmp_path).test_images) == SIZES["test"]


@pytest.mark.parametrize("given", ["data_dir", "TFDS_DATA_DIR", "HOME"])
def test_a_missing_data_set_without_a_network_is_one_line_with_a_remedy(
    given, name, monkeypatch, tmp_path, lookups
):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    root = tmp_path / "tensorflow_datasets"  # the default
    monkeypatch.setenv(*("HOME", str(tmp_path)) if given == "HOME" else (given, str(root)))
    folder = root / name / "3.0.2"
    remedy = f"`python -m training.data {name} --data-dir DIR`"
    with pytest.raises(DataError, match=rf"^{name} is not in {folder} .*no connection.*{remedy}"):
        load(name, root if given == "data_dir" else None)
    assert set(lookups) == {"www.cs.toronto.edu"}
    assert list(tmp_path.rglob("*")) in ([], [root])


def flip_a_byte(records: Path) -> None:
    content = bytearray(records.read_bytes())
    content[20_000] ^= 0xFF  # in the images: zeros pad the file to a multiple of 64 KiB
    records.write_bytes(content)


@pytest.mark.parametrize("name", ["cifar100"], indirect=True)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_cannot_be_read_is_one_line_with_a_remedy(name, prepared, split, lookups, monkeypatch):
    folder = prepared / name / "3.0.2"
    info, path = (
        folder / "dataset_info.json",
        folder / f"{name}-{split}.array_record-00000-of-00001",
    )
    records, description = path.read_bytes(), info.read_text()
    other = json.dumps(json.loads(description) | {"fileFormat": "tfrecord"})
    for damage, problem in [
        (path.unlink, "is incomplete or damaged"),
        (lambda: path.write_bytes(records[:-1000]), "is incomplete or damaged"),
        (lambda: flip_a_byte(path), "is incomplete or damaged"),
        (lambda: info.write_text(description[:100]), "is incomplete or damaged"),
        (lambda: info.write_text(other), "is in the format tfrecord.*tfds convert_format"),
        (info.unlink, "has no dataset_info.json"),
    ]:
        damage()
        with pytest.raises(DataError, match=rf"{folder} {problem}.*data-dir") as error:
            load(name, prepared)
        assert "\n" not in str(error.value)
        assert "delete" not in str(error.value)
        path.write_bytes(records)
        info.write_text(description)
    assert lookups == []
    with pytest.raises(DataError, match=f"--data-dir is {info}, which is a file"):
        load(name, info)
    monkeypatch.setattr(cifar, "SIZES", {"train": 20, "test": 11})
    with pytest.raises(DataError, match="its test split holds 10 images, not 11"):
        load(name, prepared)


@pytest.mark.slow
@pytest.mark.skipif(
    not (REAL / "cifar100" / "3.0.2").exists(), reason="CIFAR-100 is not in TFDS_DATA_DIR"
)
def test_real_cifar100(lookups, capfd):
    dataset = load("cifar100", REAL)
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), np.full(100, 500))
    np.testing.assert_array_equal(np.bincount(dataset.test_labels), np.full(100, 100))
    pixels = dataset.train_images.reshape(-1, 3).astype(np.float32) / 255
    # The customary constants are not quite those of the images.
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0, dtype=np.float64), atol=2.5e-4)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=0, dtype=np.float64), atol=2.5e-4)
    assert lookups == []
    assert capfd.readouterr() == ("", "")
