"""A small character-level transformer with low-rank adapters, for `lora_finetune.py`.

With `rank` 0 it is the plain network that is pre-trained. With `rank` r > 0 every matrix W of
attention and MLP has an adapter, x ↦ x(W + s·AB) with A of shape (inputs, r) and B of shape
(r, outputs), so that fine-tuning changes r(inputs + outputs) numbers per matrix.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

ADAPTER_SCALE = 2.0  # s; B starts at zero, so the adapted network starts as the base network

Array = jax.Array
Params = Any


class LoRADense(nn.Module):
    """A linear map without bias, with an adapter if `rank` is not 0."""

    features: int
    rank: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (..., inputs) to (..., features)."""
        y = nn.Dense(self.features, use_bias=False, name="base")(x)
        if self.rank:
            a = self.param("lora_a", nn.initializers.lecun_normal(), (x.shape[-1], self.rank))
            b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
            y = y + ADAPTER_SCALE * (x @ a @ b)
        return y


class Transformer(nn.Module):
    """Predicts each character from those before it."""

    vocabulary: int
    context: int = 64
    width: int = 64
    depth: int = 2
    heads: int = 2
    rank: int = 0

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps tokens (n, length ≤ context) to logits (n, length, vocabulary) of the next ones."""
        length = tokens.shape[1]
        positions = nn.Embed(self.context, self.width, name="positions")(jnp.arange(length))
        x = nn.Embed(self.vocabulary, self.width, name="characters")(tokens) + positions[None]
        for _ in range(self.depth):
            x = x + self._attention(nn.LayerNorm()(x))
            x = x + self._mlp(nn.LayerNorm()(x))
        return nn.Dense(self.vocabulary, name="output")(nn.LayerNorm()(x))

    def _attention(self, x: Array) -> Array:
        projected = LoRADense(3 * self.width, self.rank)(x)
        heads = projected.reshape(*x.shape[:2], 3, self.heads, self.width // self.heads)
        query, key, value = (heads[:, :, index] for index in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return LoRADense(self.width, self.rank)(mixed.reshape(x.shape))

    def _mlp(self, x: Array) -> Array:
        hidden = nn.relu(LoRADense(4 * self.width, self.rank)(x))
        return LoRADense(self.width, self.rank)(hidden)


def add_adapters(key: Array, adapted: Transformer, base: Params) -> Params:
    """Parameters of the network with adapters: fresh adapters, everything else from `base`."""
    fresh = adapted.init(key, jnp.zeros((1, adapted.context), jnp.int32))
    return unflatten_dict(flatten_dict(fresh) | flatten_dict(base))


def logits_of(model: Transformer, params: Params, tokens: Array) -> Array:
    """Logits of the characters that follow, (n, length, vocabulary)."""
    logits: Any = model.apply(params, tokens)
    return logits


def loss_fn(model: Transformer, params: Params, windows: Array) -> Array:
    """Mean cross-entropy per character, in nats: its terms are what IVON's `ess` counts."""
    logits = logits_of(model, params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()
