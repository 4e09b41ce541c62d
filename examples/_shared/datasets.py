"""Image data for the examples: scikit-learn's handwritten digits, MNIST and CIFAR-10.

Every loader returns an `ImageData` with images of shape (n, height, width, channels) in [0, 1].
Files are read as they are published and nothing is downloaded; a file that is missing or damaged
raises `DataError`, whose one-line message says what was looked for, where, and where to get it.
"""

import gzip
import io
import pickle
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DATASETS = ("digits", "mnist", "cifar10")
NUM_CLASSES = 10
MNIST_PAGE = "https://yann.lecun.com/exdb/mnist/"
CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR_ARCHIVE, CIFAR_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))


class DataError(Exception):
    """A data file is missing or damaged; the message is one line and meant for the user."""


class ImageData(NamedTuple):
    """A training and a test set; `note` says in words where the split comes from."""

    train_images: np.ndarray  # (n, height, width, channels), float32 in [0, 1]
    train_labels: np.ndarray  # (n,), int32
    test_images: np.ndarray
    test_labels: np.ndarray
    note: str


def load_dataset(name: str, data_dir: Path | None = None) -> ImageData:
    """Loads one of `DATASETS`; all but the digits are read from `data_dir`."""
    if name == "digits":
        return load_small_digits()
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if data_dir is None:
        raise DataError(f"{name} is read from files: give --data-dir, the folder that holds them")
    return load_mnist(data_dir) if name == "mnist" else load_cifar10(data_dir)


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


# --- MNIST: IDX files -----------------------------------------------------------------------------


def load_mnist(data_dir: Path) -> ImageData:
    """Reads the four IDX files, gzipped or not; with the t10k files alone, splits those 80 : 20."""
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
    with _explained(paths[0], MNIST_PAGE):
        content = paths[0].read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        magic, *shape = np.frombuffer(content, ">u4", 1 + ndim).tolist()
        if magic != 0x800 + ndim:
            raise ValueError(f"magic number {magic}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


# --- CIFAR-10: the python archive -----------------------------------------------------------------


def load_cifar10(data_dir: Path) -> ImageData:
    """Reads the archive or the folder it unpacks to, without running any code of its pickles."""
    archive = data_dir / CIFAR_ARCHIVE
    if archive.is_file():
        with _explained(archive, CIFAR_PAGE):
            unzipped = io.BytesIO(gzip.decompress(archive.read_bytes()))  # checks the checksum
            with tarfile.open(fileobj=unzipped) as tar:
                streams = {Path(member.name).name: tar.extractfile(member) for member in tar}
                files = {name: stream.read() for name, stream in streams.items() if stream}
    else:
        folder = data_dir / CIFAR_FOLDER if (data_dir / CIFAR_FOLDER).is_dir() else data_dir
        files = {path.name: path.read_bytes() for path in folder.glob("*_batch*")}
    for name in (*CIFAR_TRAIN, "test_batch"):
        if name not in files:
            what = f"{CIFAR_ARCHIVE} or the unpacked {CIFAR_FOLDER} with {name}"
            raise DataError(f"looked for {what} in {data_dir}; get it: {CIFAR_PAGE}")
    batches = [_parse_cifar_batch(files[name], data_dir / name) for name in CIFAR_TRAIN]
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    test = _parse_cifar_batch(files["test_batch"], data_dir / "test_batch")
    return ImageData(images, labels, *test, note="the standard training and test batches")


def _parse_cifar_batch(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    with _explained(path, CIFAR_PAGE):
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / np.float32(255)
        labels = np.asarray(batch[b"labels"], np.int32)
        if labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
        return images, labels


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what an array of bytes needs and nothing else: a pickle can run any code it names."""

    _admitted: ClassVar = {
        "_reconstruct": np.zeros(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": _latin1,  # by which Python 3 writes bytes into old pickles
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Looks a name up among the admitted ones, never by importing it."""
        if global_name not in self._admitted:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return self._admitted[global_name]


@contextmanager
def _explained(path: Path, page: str) -> Iterator[None]:
    """Turns whatever a damaged file raises into one line for the user."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path} cannot be read ({reason}); get it: {page}") from error
