"""Files as they are published are read; missing and damaged ones give one line, not a traceback."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

pytest.importorskip("sklearn")

from examples._shared.datasets import DataError, load_dataset, load_small_digits

RNG = np.random.default_rng(0)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, part="t10k", count=100):
    images = RNG.integers(0, 256, (count, 28, 28))
    write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
    write_idx(folder / f"{part}-labels.idx1-ubyte", np.arange(count) % 10)
    return images


def cifar_batch(count=10):
    pixels = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": [i % 10 for i in range(count)]}


def write_cifar(folder, packed):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    batches = {name: cifar_batch() for name in names}
    if packed:
        with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
            for name, batch in batches.items():
                content = pickle.dumps(batch, protocol=2)
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        for name, batch in batches.items():
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return batches


def test_digits_are_split_with_equal_class_shares():
    data = load_small_digits()
    assert data.train_images.shape == (1000, 8, 8, 1) and len(data.test_labels) == 797
    assert np.ptp(np.bincount(data.test_labels)) <= 5


def test_mnist_with_and_without_training_files(tmp_path):
    images = write_mnist(tmp_path)
    data = load_dataset("mnist", tmp_path)
    assert (len(data.train_labels), len(data.test_labels)) == (80, 20)
    write_mnist(tmp_path, "train", 50)
    data = load_dataset("mnist", tmp_path)
    assert (len(data.train_labels), len(data.test_labels)) == (50, 100)
    np.testing.assert_allclose(data.test_images[..., 0], images / 255, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar(packed, tmp_path):
    batches = write_cifar(tmp_path, packed)
    data = load_dataset("cifar10", tmp_path)
    assert data.train_images.shape == (50, 32, 32, 3)
    expected = batches["test_batch"][b"data"][3].reshape(3, 32, 32)[:, 4, 5] / 255
    np.testing.assert_allclose(data.test_images[3, 4, 5], expected, rtol=1e-6)


@pytest.mark.parametrize("damage", ["missing", "truncated", "mislabelled"])
def test_damaged_mnist_is_one_line_with_an_address(damage, tmp_path):
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    write_mnist(tmp_path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        write_idx(tmp_path / "t10k-labels.idx1-ubyte", np.arange(99) % 10)
    with pytest.raises(DataError, match=r"^[^\n]*t10k[^\n]*http[^\n]*$"):
        load_dataset("mnist", tmp_path)


def test_a_pickle_that_names_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    write_cifar(tmp_path, packed=False)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(DataError, match=r"mkdir[^\n]*http"):
        load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_folder_is_asked_for():
    with pytest.raises(DataError, match="--data-dir"):
        load_dataset("mnist")
