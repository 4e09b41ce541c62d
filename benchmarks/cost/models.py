"""Losses of small and middling networks, as pure functions of a tree of parameters."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class Model(NamedTuple):
    """A network, its loss and data of the shape it takes.

    Attributes:
      init: from a key to parameters.
      loss: of parameters and a batch, the mean per example or token.
      batch: from a key and a number of examples to random data.
    """

    init: Callable[[jax.Array], PyTree]
    loss: Callable[[PyTree, PyTree], jax.Array]
    batch: Callable[[jax.Array, int], PyTree]


def _dense(key: jax.Array, rows: int, columns: int, scale: float = 1.0) -> dict[str, jax.Array]:
    weight = jax.random.normal(key, (rows, columns)) * scale / math.sqrt(rows)
    return {"w": weight, "b": jnp.zeros(columns)}


def _apply(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def _images(side: tuple[int, ...], key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    image_key, label_key = jax.random.split(key)
    return jax.random.normal(image_key, (size, *side)), jax.random.randint(
        label_key, (size,), 0, 10
    )


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(*hidden: int) -> Model:
    """A perceptron for 8 x 8 digits."""
    sizes = (64, *hidden, 10)

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(sizes) - 1)
        return [_dense(k, a, b) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def loss(params: PyTree, batch: PyTree) -> jax.Array:
        x, labels = batch
        for layer in params[:-1]:
            x = jax.nn.relu(_apply(layer, x))
        return _cross_entropy(_apply(params[-1], x), labels)

    return Model(init, loss, partial(_images, (64,)))


def resnet20() -> Model:
    """ResNet-20 for 32 x 32 images, with filter response normalisation."""
    widths = [16] * 3 + [32] * 3 + [64] * 3

    def conv(key: jax.Array, size: int, inputs: int, outputs: int) -> dict[str, jax.Array]:
        shape = (size, size, inputs, outputs)
        return {
            "w": jax.random.normal(key, shape) * math.sqrt(2 / (size * size * inputs)),
            "scale": jnp.ones(outputs),
            "bias": jnp.zeros(outputs),
            "threshold": jnp.zeros(outputs),
        }

    def init(key: jax.Array) -> PyTree:
        keys = iter(jax.random.split(key, 40))
        blocks, inputs = [], 16
        for outputs in widths:
            block = [conv(next(keys), 3, inputs, outputs), conv(next(keys), 3, outputs, outputs)]
            if inputs != outputs:
                block.append(conv(next(keys), 1, inputs, outputs))
            blocks.append(block)
            inputs = outputs
        return {
            "stem": conv(next(keys), 3, 3, 16),
            "blocks": blocks,
            "head": _dense(next(keys), 64, 10),
        }

    def normalised(layer: PyTree, x: jax.Array, stride: int = 1) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x, layer["w"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x * jax.lax.rsqrt(jnp.mean(x * x, (1, 2), keepdims=True) + 1e-6)
        return jnp.maximum(x * layer["scale"] + layer["bias"], layer["threshold"])

    def loss(params: PyTree, batch: PyTree) -> jax.Array:
        x, labels = batch
        x = normalised(params["stem"], x)
        for block in params["blocks"]:
            stride = 2 if len(block) == 3 else 1
            y = normalised(block[1], normalised(block[0], x, stride))
            x = y + (normalised(block[2], x, stride) if len(block) == 3 else x)
        return _cross_entropy(_apply(params["head"], x.mean((1, 2))), labels)

    return Model(init, loss, partial(_images, (32, 32, 3)))


def gpt(layers: int, width: int, heads: int, context: int, vocabulary: int) -> Model:
    """A GPT whose layers are separate leaves, with tied embeddings."""

    def init(key: jax.Array) -> PyTree:
        keys = iter(jax.random.split(key, 4 * layers + 2))
        scale = 1 / math.sqrt(2 * layers)

        def norm() -> dict[str, jax.Array]:
            return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

        return {
            "tokens": 0.02 * jax.random.normal(next(keys), (vocabulary, width)),
            "positions": 0.02 * jax.random.normal(next(keys), (context, width)),
            "layers": [
                {
                    "norm_1": norm(),
                    "qkv": _dense(next(keys), width, 3 * width),
                    "out": _dense(next(keys), width, width, scale),
                    "norm_2": norm(),
                    "up": _dense(next(keys), width, 4 * width),
                    "down": _dense(next(keys), 4 * width, width, scale),
                }
                for _ in range(layers)
            ],
            "norm": norm(),
        }

    def normalised(layer: PyTree, x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        return x * layer["scale"] + layer["bias"]

    def loss(params: PyTree, batch: jax.Array) -> jax.Array:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        x = params["tokens"][inputs] + params["positions"]
        for layer in params["layers"]:
            q, k, v = (
                y.reshape(*y.shape[:2], heads, width // heads)
                for y in jnp.split(_apply(layer["qkv"], normalised(layer["norm_1"], x)), 3, -1)
            )
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + _apply(layer["out"], attended.reshape(x.shape))
            hidden = jax.nn.gelu(_apply(layer["up"], normalised(layer["norm_2"], x)))
            x = x + _apply(layer["down"], hidden)
        return _cross_entropy(normalised(params["norm"], x) @ params["tokens"].T, targets)

    def batch(key: jax.Array, size: int) -> jax.Array:
        return jax.random.randint(key, (size, context + 1), 0, vocabulary)

    return Model(init, loss, batch)


MODELS: dict[str, Callable[[], Model]] = {
    "mlp": lambda: mlp(128),
    "mlp1m": lambda: mlp(960, 960),
    "resnet20": resnet20,
    "gpt10m": lambda: gpt(layers=6, width=384, heads=6, context=256, vocabulary=65),
    "gpt2-small": lambda: gpt(layers=12, width=768, heads=12, context=1024, vocabulary=50_257),
}
"""Networks of 9,610, 1.0M, 0.27M, 10.8M and 124M parameters."""
