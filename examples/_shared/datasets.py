"""Image data for the examples: handwritten digits, MNIST and CIFAR-10, each checked on reading.

Every loader returns an `ImageData` with images of shape (n, height, width, channels) in [0, 1].
Files are read as they are published and nothing is downloaded; a file that is missing or damaged
raises `DataError`, whose one-line message says what was looked for, where, and where to get it.
"""

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DATASETS = ("digits", "mnist", "cifar10")
NUM_CLASSES = 10
MNIST_PAGE = "https://yann.lecun.com/exdb/mnist/"
CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_TEST = "test_batch"

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
MAX_IDX_BYTES = 1 << 30  # a header that announces more is damage, not data
MAX_BATCH_BYTES = 256 << 20  # a CIFAR-10 batch file has 30 MB
SPLIT_SEED = 0


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
    if data_dir is None:
        raise ValueError(f"{name} is read from files: give data_dir")
    if name == "mnist":
        return load_mnist(data_dir)
    if name == "cifar10":
        return load_cifar10(data_dir)
    raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")


def stratified_split(
    images: np.ndarray, labels: np.ndarray, test_size: int, seed: int = SPLIT_SEED
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns train images, train labels, test images, test labels with equal class shares."""
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=seed
    )
    return images[train], labels[train], images[test], labels[test]


# --- The digits that ship inside scikit-learn -----------------------------------------------------


def load_small_digits() -> ImageData:
    """The 1,797 8x8 digits of scikit-learn: 1,000 to train on and 797 to test, a fixed split."""
    digits: Any = load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)  # pixels count 0 to 16
    split = stratified_split(images, digits.target.astype(np.int32), test_size=797)
    return ImageData(*split, note="fixed stratified split of scikit-learn's 1,797 8x8 digits")


# --- MNIST: IDX files -----------------------------------------------------------------------------


def load_mnist(data_dir: Path) -> ImageData:
    """Reads the four IDX files; with the t10k files alone, splits those 80 : 20."""
    if not data_dir.is_dir():
        raise _missing("the MNIST IDX files", data_dir, MNIST_PAGE, "there is no such folder")
    train_images = _find_idx(data_dir, "train-images", 3)
    train_labels = _find_idx(data_dir, "train-labels", 1)
    test = _read_idx_pair(
        _require_idx(data_dir, "t10k-images", 3), _require_idx(data_dir, "t10k-labels", 1)
    )
    if train_images is None and train_labels is None:
        images, labels = test
        if np.bincount(labels, minlength=NUM_CLASSES).min() < 5:
            raise DataError(
                f"{data_dir}: the t10k files hold {len(labels)} images, too few of some digit to "
                f"be split into a training and a test set; complete files: {MNIST_PAGE}"
            )
        split = stratified_split(images, labels, test_size=len(labels) // 5)
        note = (
            f"no training files there: the {len(labels):,} t10k images are split "
            f"{len(split[1]):,} : {len(split[3]):,} (fixed, stratified); "
            "not comparable with published MNIST results"
        )
        return ImageData(*split, note=note)
    train = _read_idx_pair(
        _require_idx(data_dir, "train-images", 3), _require_idx(data_dir, "train-labels", 1)
    )
    return ImageData(*train, *test, note="the standard training and test files")


def _idx_names(stem: str, ndim: int) -> list[str]:
    spellings = (f"{stem}-idx{ndim}-ubyte", f"{stem}.idx{ndim}-ubyte")
    return [name + ending for name in spellings for ending in ("", ".gz")]


def _find_idx(data_dir: Path, stem: str, ndim: int) -> Path | None:
    paths = (data_dir / name for name in _idx_names(stem, ndim))
    return next((path for path in paths if path.is_file()), None)


def _require_idx(data_dir: Path, stem: str, ndim: int) -> Path:
    path = _find_idx(data_dir, stem, ndim)
    if path is None:
        what = f"{stem}-idx{ndim}-ubyte (or .gz, or {stem}.idx{ndim}-ubyte)"
        raise _missing(what, data_dir, MNIST_PAGE, "there is no such file")
    return path


def _read_idx_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(images_path, IMAGES_MAGIC)
    labels = _read_idx(labels_path, LABELS_MAGIC)
    if images.shape[1:] != (28, 28):
        raise _damaged(images_path, f"images of {images.shape[1:]}, not (28, 28)", MNIST_PAGE)
    if len(images) != len(labels):
        reason = f"{len(labels)} labels for the {len(images)} images of {images_path.name}"
        raise _damaged(labels_path, reason, MNIST_PAGE)
    if labels.max() >= NUM_CLASSES:
        raise _damaged(labels_path, f"label {labels.max()}, digits end at 9", MNIST_PAGE)
    return images[..., None] / np.float32(255), labels.astype(np.int32)


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped or not (told by content, not by name)."""
    try:
        with path.open("rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if gzipped else raw as stream:
                return _parse_idx(stream, magic)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _unreadable(path, error, MNIST_PAGE) from error


def _parse_idx(stream: Any, magic: int) -> np.ndarray:
    ndim = magic & 0xFF
    header = stream.read(4 + 4 * ndim)
    if len(header) < 4 + 4 * ndim:
        raise ValueError("the header is cut short")
    found, *shape = np.frombuffer(header, dtype=">u4").tolist()
    if found != magic:
        raise ValueError(f"magic number {found}, expected {magic}")
    size = math.prod(shape)
    if not 0 < size <= MAX_IDX_BYTES:
        raise ValueError(f"the header announces an array of shape {tuple(shape)}")
    body = stream.read(size + 1)
    if len(body) != size:
        held = f"only {len(body)}" if len(body) < size else "more"
        raise ValueError(f"{size} bytes are announced by the header, the file holds {held}")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


# --- CIFAR-10: the python archive -----------------------------------------------------------------


def load_cifar10(data_dir: Path) -> ImageData:
    """Reads cifar-10-python.tar.gz, or the folder it unpacks to, without running any pickle code.

    An unpacked folder is preferred; `data_dir` may also be that folder itself.
    """
    for folder in (data_dir / CIFAR_FOLDER, data_dir):
        if (folder / CIFAR_TEST).is_file():
            return _assemble_cifar(partial(_read_cifar_file, folder))
    archive = data_dir / CIFAR_ARCHIVE
    if not archive.is_file():
        what = f"{CIFAR_ARCHIVE} or the unpacked folder {CIFAR_FOLDER}"
        raise _missing(what, data_dir, CIFAR_PAGE, "there is neither")
    try:
        with gzip.open(archive) as stream:
            while stream.read(1 << 20):  # to the end, where gzip's checksum of the whole stands
                pass
        with tarfile.open(archive, "r:gz") as tar:
            members = {Path(item.name).name: item for item in tar.getmembers() if item.isfile()}
            return _assemble_cifar(partial(_read_cifar_member, archive, tar, members))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise _unreadable(archive, error, CIFAR_PAGE) from error


def _assemble_cifar(read: Callable[[str], tuple[np.ndarray, np.ndarray]]) -> ImageData:
    batches = [read(name) for name in CIFAR_TRAIN]
    train_images = np.concatenate([images for images, _ in batches])
    train_labels = np.concatenate([labels for _, labels in batches])
    return ImageData(
        train_images, train_labels, *read(CIFAR_TEST), note="the standard training and test batches"
    )


def _read_cifar_file(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    if not (folder / name).is_file():
        raise _missing(name, folder, CIFAR_PAGE, "there is no such file")
    with (folder / name).open("rb") as stream:
        return _parse_cifar_batch(stream, folder / name)


def _read_cifar_member(
    archive: Path, tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str
) -> tuple[np.ndarray, np.ndarray]:
    stream = tar.extractfile(members[name]) if name in members else None
    if stream is None:
        raise _missing(name, archive, CIFAR_PAGE, "the archive has no such file")
    with stream:
        return _parse_cifar_batch(stream, archive / name)


def _parse_cifar_batch(stream: IO[bytes], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Checks one batch and returns images (n, 32, 32, 3) in [0, 1] and labels."""
    try:
        content = stream.read(MAX_BATCH_BYTES)
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        fields = {_text(key): value for key, value in batch.items()}
        pixels, labels = fields["data"], np.asarray(fields["labels"])
    except Exception as error:  # damaged pickles raise errors of every kind
        raise _unreadable(path, error, CIFAR_PAGE) from error
    is_bytes = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
    if not is_bytes or pixels.shape[1:] != (3072,):
        raise _damaged(path, "'data' is not an array of rows of 3,072 bytes", CIFAR_PAGE)
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or len(labels) == 0:
        reason = f"{labels.size} labels for {len(pixels)} images"
        raise _damaged(path, reason, CIFAR_PAGE)
    if not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise _damaged(path, "labels outside 0 to 9", CIFAR_PAGE)
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images / np.float32(255), labels.astype(np.int32)


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which Python 3 writes bytes into old pickles."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused to encode as {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what an array of bytes needs and nothing else: a pickle can run any code it names."""

    _reconstruct = np.zeros(0).__reduce__()[0]
    _admitted: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Looks a name up among the admitted ones, never by importing it."""
        try:
            return self._admitted[module_name, global_name]
        except KeyError:
            message = f"it asks for {module_name}.{global_name}, which no image file needs"
            raise pickle.UnpicklingError(message) from None


# --- Messages -------------------------------------------------------------------------------------


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _missing(what: str, where: Path, page: str, reason: str) -> DataError:
    return DataError(f"looked for {what} in {where}: {reason}; get it from {page}")


def _damaged(path: Path, reason: str, page: str) -> DataError:
    return DataError(f"{path} is damaged or not what its name says ({reason}); get it from {page}")


def _unreadable(path: Path, error: BaseException, page: str) -> DataError:
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"cannot read {path}: {error.strerror}; this file is published at {page}")
    reason = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix("ValueError: ")
    return _damaged(path, reason, page)
