"""CIFAR-10 in its published python layout, its augmentation, and images that are not of it."""

import pickle
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples._shared.datasets import DataError, load_mnist

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
FOLDER = "cifar-10-batches-py"
PADDING = 4
NUM_UNFAMILIAR = 1000


class Images(NamedTuple):
    """Images (n, 32, 32, 3) in [0, 1] and labels (n,)."""

    images: np.ndarray
    labels: np.ndarray


def load_cifar10(folder: Path) -> tuple[Images, Images]:
    """The 50,000 images to train on and the 10,000 to test on, as bytes (n, 32, 32, 3)."""
    folder = folder if folder.name == FOLDER else folder / FOLDER
    parts = [_read(folder / f"data_batch_{number}") for number in range(1, 6)]
    train = Images(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    return train, _read(folder / "test_batch")


def _read(path: Path) -> Images:
    if not path.is_file():
        raise DataError(f"looked for {path.name} in {path.parent}; get it: {PAGE}")
    try:
        with path.open("rb") as file:
            batch = pickle.load(file, encoding="bytes")  # of the published archive
        rows = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        return Images(rows.transpose(0, 2, 3, 1), np.asarray(batch[b"labels"], np.int32))
    except (KeyError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); get it: {PAGE}") from None


def floats(data: Images) -> Images:
    """Bytes as float32 in [0, 1]."""
    return Images(data.images / np.float32(255), data.labels)


def with_noise(data: Images, share: float) -> Images:
    """Replaces this share of the labels by one of the other nine; which ones never changes."""
    rng = np.random.default_rng(0)
    wrong = rng.permutation(len(data.labels))[: round(share * len(data.labels))]
    labels = data.labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return Images(data.images, labels)


def load_unfamiliar(tiny: Path | None, mnist: Path | None) -> dict[str, np.ndarray]:
    """Photographs of other things (an .npz with `images`), and digits, where they are named."""
    found = {}
    if tiny is not None:
        if not tiny.is_file():
            raise DataError(f"looked for {tiny}, an .npz with images of 32 x 32; it is not there")
        with np.load(tiny) as file:
            if "images" not in file.files:
                raise DataError(f"{tiny} has no array named images")
            found["Tiny ImageNet"] = file["images"][:NUM_UNFAMILIAR] / np.float32(255)
    if mnist is not None:
        digits = load_mnist(mnist).test_images[:NUM_UNFAMILIAR]
        padded = np.pad(digits, ((0, 0), (2, 2), (2, 2), (0, 0)))
        found["MNIST"] = np.repeat(padded, 3, axis=-1)
    return found


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Crops of the images, padded by four pixels, each mirrored or not."""
    shift_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (PADDING,) * 2, (PADDING,) * 2, (0, 0)))
    starts = jax.random.randint(shift_key, (len(images), 2), 0, 2 * PADDING + 1)

    def crop(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:])

    cropped = jax.vmap(crop)(padded, starts)
    flips = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flips, cropped[:, :, ::-1], cropped)
