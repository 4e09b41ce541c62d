"""A small character-level GPT without biases or dropout, and the windows of text it learns from."""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Array = jax.Array

LAYERS, HEADS, WIDTH, CONTEXT = 4, 4, 128, 64


class Text(NamedTuple):
    """A text as tokens, cut in order; `validation` is seen by no choice of settings.

    Attributes:
      name: of the file.
      vocabulary: number of different bytes.
      fit: the first 85 %, for training while settings are compared.
      tune: the next 5 %, on which settings are compared.
      train: both of them, 90 %, for training with the chosen settings.
      validation: the last 10 %.
      digest: of all tokens, to tell texts apart.
    """

    name: str
    vocabulary: int
    fit: np.ndarray
    tune: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    digest: str


def read_text(path: Path) -> np.ndarray:
    """The bytes of a file.

    Raises:
      SystemExit: if it cannot be read.
    """
    try:
        return np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from None


def make_text(name: str, characters: np.ndarray) -> Text:
    """The parts of a text; tokens are the ranks of those bytes that occur in it.

    Raises:
      SystemExit: if a part is shorter than a window.
    """
    tokens = np.searchsorted(present := np.unique(characters), characters).astype(np.uint8)
    first, second = len(tokens) * 85 // 100, len(tokens) * 9 // 10
    if second - first <= CONTEXT:
        raise SystemExit(
            f"{name} has {len(tokens):,} characters: its twentieth must be longer than a window of "
            f"{CONTEXT}, so give at least {20 * (CONTEXT + 2):,}"
        )
    return Text(
        name,
        len(present),
        tokens[:first],
        tokens[first:second],
        tokens[:second],
        tokens[second:],
        hashlib.sha256(characters.tobytes()).hexdigest()[:16],
    )


def fixed_windows(tokens: np.ndarray, most: int) -> Array:
    """Up to `most` windows of context + 1, evenly spread; neighbours share one character."""
    count = (len(tokens) - 1) // CONTEXT
    chosen = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return jnp.asarray(tokens[chosen[:, None] * CONTEXT + np.arange(CONTEXT + 1)], jnp.int32)


def random_windows(key: Array, tokens: Array, size: int) -> Array:
    """Windows of context + 1 that start anywhere."""
    starts = jax.random.randint(key, (size, 1), 0, len(tokens) - CONTEXT)
    return tokens[starts + jnp.arange(CONTEXT + 1)].astype(jnp.int32)


def init_params(key: Array, vocabulary: int) -> PyTree:
    """GPT-2's initialization: N(0, 0.02²), smaller where a layer adds to the residual stream."""
    keys = iter(jax.random.split(key, 4 * LAYERS + 2))

    def normal(rows: int, columns: int, std: float = 0.02) -> Array:
        return std * jax.random.normal(next(keys), (rows, columns))

    residual = 0.02 / math.sqrt(2 * LAYERS)
    return {
        "tokens": normal(vocabulary, WIDTH),
        "positions": normal(CONTEXT, WIDTH),
        "layers": [
            {
                "attention_norm": jnp.ones(WIDTH),
                "qkv": normal(WIDTH, 3 * WIDTH),
                "out": normal(WIDTH, WIDTH, residual),
                "mlp_norm": jnp.ones(WIDTH),
                "up": normal(WIDTH, 4 * WIDTH),
                "down": normal(4 * WIDTH, WIDTH, residual),
            }
            for _ in range(LAYERS)
        ],
        "norm": jnp.ones(WIDTH),
    }


def logits(params: PyTree, inputs: Array) -> Array:
    """Logits of the next character, with the embedding as the last layer."""
    x = params["tokens"][inputs] + params["positions"]
    for layer in params["layers"]:
        qkv = _normalised(x, layer["attention_norm"]) @ layer["qkv"]
        q, k, v = (
            y.reshape(*y.shape[:2], HEADS, WIDTH // HEADS) for y in jnp.split(qkv, 3, axis=-1)
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ layer["out"]
        hidden = jax.nn.gelu(_normalised(x, layer["mlp_norm"]) @ layer["up"])
        x = x + hidden @ layer["down"]
    return _normalised(x, params["norm"]) @ params["tokens"].T


def _normalised(x: Array, scale: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def log_probs(params: PyTree, inputs: Array) -> Array:
    """Log-probabilities of the next character."""
    return jax.nn.log_softmax(logits(params, inputs))


def loss(params: PyTree, windows: Array) -> Array:
    """Mean cross-entropy per character, in nats."""
    found = jnp.take_along_axis(log_probs(params, windows[:, :-1]), windows[:, 1:, None], -1)
    return -jnp.mean(found)
