"""Image data for the examples: scikit-learn's handwritten digits and, for the benchmarks, MNIST.

Every loader returns an `ImageData` with images of shape (n, height, width, 1) in [0, 1].
Files are read as they are published and nothing is downloaded; a file that is missing or damaged
raises `DataError`, whose one-line message says what was looked for, where, and where to get it.
"""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_CLASSES = 10
MNIST_PAGE = "https://yann.lecun.com/exdb/mnist/"


class DataError(Exception):
    """A data file is missing or damaged; the message is one line and meant for the user."""


class ImageData(NamedTuple):
    """A training and a test set; `note` says in words where the split comes from."""

    train_images: np.ndarray  # (n, height, width, 1), float32 in [0, 1]
    train_labels: np.ndarray  # (n,), int32
    test_images: np.ndarray
    test_labels: np.ndarray
    note: str


def load_dataset(name: str, data_dir: Path | None = None) -> ImageData:
    """Loads `digits`, or `mnist` from its files in `data_dir`."""
    return {"digits": load_small_digits, "mnist": lambda: load_mnist(data_dir)}[name]()


def stratified_split(
    images: np.ndarray, labels: np.ndarray, test_size: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns train images, train labels, test images, test labels with equal class shares."""
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=seed
    )
    return images[train], labels[train], images[test], labels[test]


def load_small_digits() -> ImageData:
    """The 1,797 8x8 digits of scikit-learn: 1,000 to train on and 797 to test, a fixed split."""
    digits: Any = load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)  # pixels count 0 to 16
    split = stratified_split(images, digits.target.astype(np.int32), test_size=797)
    return ImageData(*split, note="fixed stratified split of scikit-learn's 1,797 8x8 digits")


def with_wrong_labels(keys: Any, labels: jax.Array, share: float) -> jax.Array:
    """Replaces this share of the labels by other classes; the keys draw which, and by what."""
    where_key, class_key = keys
    wrong = jax.random.uniform(where_key, labels.shape) < share
    others = (labels + jax.random.randint(class_key, labels.shape, 1, NUM_CLASSES)) % NUM_CLASSES
    return jnp.where(wrong, others, labels)


def load_mnist(data_dir: Path | None) -> ImageData:
    """Reads the four IDX files, gzipped or not; with the t10k files alone, splits those 80 : 20."""
    if data_dir is None:
        raise DataError("MNIST is read from files: give --data-dir, the folder that holds them")
    images, labels = _read_idx_pair(data_dir, "t10k")
    if any(data_dir.glob("train-*-ubyte*")):
        train = _read_idx_pair(data_dir, "train")
        return ImageData(*train, images, labels, note="the standard training and test files")
    split = stratified_split(images, labels, test_size=len(labels) // 5)
    note = (
        f"no training files there: the {len(labels):,} t10k images are split "
        f"{len(split[1]):,} : {len(split[3]):,} (fixed, stratified); "
        "not comparable with published MNIST results"
    )
    return ImageData(*split, note=note)


def _read_idx_pair(data_dir: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(data_dir, f"{part}-images", 3)
    labels = _read_idx(data_dir, f"{part}-labels", 1)
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() > 9:
        reason = f"images of shape {images.shape}, labels of shape {labels.shape}"
        raise DataError(f"{data_dir}: {part} files are damaged ({reason}); get them: {MNIST_PAGE}")
    return images[..., None] / np.float32(255), labels.astype(np.int32)


def _read_idx(data_dir: Path, stem: str, ndim: int) -> np.ndarray:
    name = f"{stem}-idx{ndim}-ubyte"
    paths = sorted(data_dir.glob(f"{stem}?idx{ndim}-ubyte*"))  # a hyphen, or a dot in some copies
    if not paths:
        raise DataError(f"looked for {name} (or {name}.gz) in {data_dir}; get it: {MNIST_PAGE}")
    with _explained(paths[0]):
        content = paths[0].read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        magic, *shape = np.frombuffer(content, ">u4", 1 + ndim).tolist()
        if magic != 0x800 + ndim:
            raise ValueError(f"magic number {magic}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file raises into one line for the user."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path} cannot be read ({reason}); get it: {MNIST_PAGE}") from error
