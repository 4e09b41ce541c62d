"""Tokens: bytes of text, or the uint16 files that nanoGPT's preparation writes.

The batch of a step is a function of (seed, step) alone: the position in the data is the step's
number, on any number of processes.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


class Corpus(NamedTuple):
    """Tokens for training and validation, in memory or mapped from a file."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    vocabulary: int

    def check_length(self, window: int) -> None:
        """Refuses parts that are shorter than a window."""
        for part, tokens in (("train", self.train), ("validation", self.validation)):
            if len(tokens) < window:
                raise ValueError(
                    f"the {part} part of {self.name} has {len(tokens)} tokens, fewer than one "
                    f"window of {window}: give more text, or a smaller context."
                )

    def fingerprint(self) -> str:
        """A digest of lengths, vocabulary, and the first and last megabyte of each part."""
        digest = hashlib.sha256(str(self.vocabulary).encode())
        for tokens in (self.train, self.validation):
            digest.update(str((len(tokens), tokens.dtype)).encode())
            digest.update(tokens[:500_000].tobytes() + tokens[-500_000:].tobytes())
        return digest.hexdigest()[:16]


def load_corpus(path: Path | None, vocabulary: int | None = None) -> Corpus:
    """A text file, a folder with train.bin and val.bin, or by default Python's standard library."""
    if path is None:
        name, files = "Python's standard library", sorted(Path(os.__file__).parent.glob("*.py"))
        tokens = np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8)
    elif path.is_dir():
        train, validation = (_token_file(path / part) for part in ("train.bin", "val.bin"))
        return Corpus(path.resolve().name, train, validation, vocabulary or 50304)
    elif path.is_file() and path.suffix != ".bin":
        name, tokens = path.name, np.memmap(path, np.uint8, "r")
    else:
        raise FileNotFoundError(
            f"{path} is neither a text file nor a folder with train.bin and val.bin"
        )
    train = len(tokens) * 9 // 10
    return Corpus(name, tokens[:train], tokens[train:], vocabulary or 256)


def _token_file(path: Path) -> np.ndarray:
    if not path.is_file() or not path.stat().st_size or path.stat().st_size % 2:
        raise FileNotFoundError(
            f"{path} is not a flat file of uint16 tokens, as nanoGPT's prepare.py writes them"
        )
    return np.memmap(path, np.uint16, "r")


def check_same_everywhere(corpus: Corpus) -> None:
    """Compares the data of all processes, whose batches would be mixtures if they differed."""
    own = np.frombuffer(bytes.fromhex(corpus.fingerprint()), np.uint32)
    every = multihost_utils.process_allgather(own[None], tiled=True)
    others = [i for i, digest in enumerate(every) if not np.array_equal(digest, every[0])]
    if others:
        raise ValueError(
            f"processes {others} have read other data than process 0 ({corpus.name} here): give "
            "all of them the same with --data."
        )


def training_batch(
    corpus: Corpus, seed: int, step: int, shape: tuple[int, int, int], sharding: NamedSharding
) -> jax.Array:
    """Windows at random places: (micro-batches, sequences, context + 1), over all processes."""
    last = len(corpus.train) - shape[2]
    starts = np.random.default_rng((seed, step)).integers(0, last + 1, shape[:2])
    return _windows(corpus, corpus.train, starts, shape[2], sharding)


def validation_batches(
    corpus: Corpus, count: int, shape: tuple[int, int], sharding: NamedSharding
) -> list[jax.Array]:
    """Batches of windows, evenly spread over the validation part."""
    last = len(corpus.validation) - shape[1]
    starts = np.linspace(0, last, count * shape[0]).astype(int).reshape(count, shape[0])
    return [_windows(corpus, corpus.validation, row, shape[1], sharding) for row in starts]


def _windows(corpus: Corpus, tokens: Any, starts: Any, length: int, sharding: Any) -> jax.Array:
    def rows(index: Any) -> np.ndarray:  # that one device holds
        windows = tokens[starts[index[:-1]][..., None] + np.arange(length)].astype(np.int32)
        if windows.max() >= corpus.vocabulary:
            raise ValueError(
                f"{corpus.name} holds token {windows.max()}, but the vocabulary has "
                f"{corpus.vocabulary}: pass a larger --vocabulary, or the right file."
            )
        return windows[..., index[-1]]

    return jax.make_array_from_callback((*starts.shape, length), sharding, rows)
