"""Files as they are published are read; missing and damaged ones give one line, not a traceback."""

import gzip

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


def test_a_missing_folder_is_asked_for():
    with pytest.raises(DataError, match="--data-dir"):
        load_dataset("mnist")
