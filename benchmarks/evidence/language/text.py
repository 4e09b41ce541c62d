"""A text as tokens, in three parts that follow each other."""

import hashlib
import lzma
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.networks import GPT

LAYERS, HEADS, WIDTH, CONTEXT = 4, 4, 128, 64  # nanoGPT's configuration for a CPU


class Text(NamedTuple):
    """A text cut in order: 85 % to train on, 5 % that choose the settings, 10 % for validation."""

    name: str
    vocabulary: int  # different bytes
    train: np.ndarray
    tuning: np.ndarray
    validation: np.ndarray
    digest: str  # of all characters, to tell texts apart

    @property
    def network(self) -> GPT:
        """The GPT that learns it."""
        return GPT(LAYERS, HEADS, WIDTH, CONTEXT, self.vocabulary)


def read_text(path: Path) -> Text:
    """The parts of a file (`.xz`: compressed); tokens are the ranks of the bytes in it."""
    try:
        content = path.read_bytes()
        content = lzma.decompress(content) if path.suffix == ".xz" else content
    except (OSError, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SystemExit(f"cannot read {path}: {reason}") from None
    characters = np.frombuffer(content, np.uint8)
    tokens = np.searchsorted(present := np.unique(characters), characters).astype(np.uint8)
    train, tuning, validation = np.split(tokens, [len(tokens) * k // 20 for k in (17, 18)])
    if len(tuning) <= CONTEXT:
        raise SystemExit(
            f"{path} has {len(tokens):,} characters: its twentieth must be longer than a window of "
            f"{CONTEXT}, so give at least {20 * (CONTEXT + 1):,}"
        )
    digest = hashlib.sha256(characters.tobytes()).hexdigest()[:16]
    return Text(path.name, len(present), train, tuning, validation, digest)


def fixed_windows(tokens: np.ndarray, most: int) -> jax.Array:
    """Up to `most` windows of context + 1, evenly spread; neighbours share one character."""
    count = (len(tokens) - 1) // CONTEXT
    chosen = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return jnp.asarray(tokens[chosen[:, None] * CONTEXT + np.arange(CONTEXT + 1)], jnp.int32)
