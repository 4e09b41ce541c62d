"""The networks of the benchmarks: a perceptron, a ResNet and a GPT, one of each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NUM_CLASSES = 10

Array = jax.Array
PyTree = Any


# --- Images ---------------------------------------------------------------------------------------


def dropout(key: Callable[[], Array], x: Array, rate: Any) -> Array:
    """Sets a share of the activations to zero; `None` leaves them alone, and it may be traced."""
    if rate is None:
        return x
    kept = jax.random.bernoulli(key(), 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


class Perceptron(nn.Module):
    """Hidden layers of equal width, with dropout after each where a rate is given."""

    width: int = 128
    depth: int = 2

    @nn.compact
    def __call__(self, images: Array, rate: Any = None) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, 10)."""
        x = (2.0 * images - 1.0).reshape(len(images), math.prod(images.shape[1:]))
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
            x = dropout(partial(self.make_rng, "dropout"), x, rate)
        return nn.Dense(NUM_CLASSES)(x)


class FilterResponseNorm(nn.Module):
    """Filter response normalisation with its thresholded activation (Singh & Krishnan 2020).

    It looks at one image at a time, so that nothing is carried over from the weights in training
    to a posterior sample, as batch normalisation's running statistics would be.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises every channel of every image (n, height, width, channels)."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        threshold = self.param("threshold", nn.initializers.zeros, shape)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=(1, 2), keepdims=True) + 1e-6)
        return jnp.maximum(x * scale[None, None, None] + bias[None, None, None], threshold)


class ResNet(nn.Module):
    """Residual blocks of given widths, with dropout after each where a rate is given.

    A block that changes the width halves the image in both directions. The default, for two cores,
    halves large images in its first convolution already (`stem_stride`, 2 above 16 pixels), so that
    its two blocks see 14x14 and 7x7 positions of MNIST.
    """

    features: Sequence[int] = (16, 32)
    stem_stride: int | None = None

    @nn.compact
    def __call__(self, images: Array, rate: Any = None) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, 10)."""
        stride = self.stem_stride or (2 if images.shape[1] > 16 else 1)
        x = self.normalised(2.0 * images - 1.0, self.features[0], 3, stride)
        for features in self.features:
            wider = features != x.shape[-1]
            stride = 2 if wider else 1
            y = self.normalised(self.normalised(x, features, 3, stride), features, 3)
            if wider:
                x = self.normalised(x, features, 1, stride)
            x = dropout(partial(self.make_rng, "dropout"), x + y, rate)
        return nn.Dense(NUM_CLASSES)(x.mean(axis=(1, 2)))

    def normalised(self, x: Array, features: int, size: int, stride: int = 1) -> Array:
        """A convolution and what follows it."""
        x = nn.Conv(features, (size, size), (stride, stride), use_bias=False)(x)
        return FilterResponseNorm()(x)


class Bottlenecks(nn.Module):
    """The residual network of bottleneck blocks; the default is ResNet-50."""

    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, classes)."""
        x = self.normalised(2.0 * images - 1.0, self.width, 7, 2)
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, number in enumerate(self.blocks):
            features = self.width * 2**stage
            for block in range(number):
                stride = 2 if stage and not block else 1
                y = self.normalised(x, features, 1)
                y = self.normalised(y, features, 3, stride)
                y = self.normalised(y, 4 * features, 1)
                x = y + (x if block else self.normalised(x, 4 * features, 1, stride))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))

    def normalised(self, x: Array, features: int, size: int, stride: int = 1) -> Array:
        """A convolution and what follows it."""
        x = nn.Conv(features, (size, size), (stride, stride), use_bias=False)(x)
        return FilterResponseNorm()(x)


RESNET20 = ResNet((16,) * 3 + (32,) * 3 + (64,) * 3, stem_stride=1)


# --- Text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPT:
    """A GPT with tied embeddings and without dropout, whose layers are separate leaves."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int
    biases: bool = False

    def init(self, key: Array) -> PyTree:
        """GPT-2's initialisation: N(0, 0.02²), smaller where a layer adds to the residual."""
        keys = iter(jax.random.split(key, 4 * self.layers + 2))
        width, residual = self.width, 0.02 / math.sqrt(2 * self.layers)

        def bias(size: int) -> dict[str, Array]:
            return {"bias": jnp.zeros(size)} if self.biases else {}

        def dense(rows: int, columns: int, std: float = 0.02) -> dict[str, Array]:
            kernel = std * jax.random.normal(next(keys), (rows, columns))
            return {"kernel": kernel, **bias(columns)}

        def norm() -> dict[str, Array]:
            return {"scale": jnp.ones(width), **bias(width)}

        return {
            "tokens": 0.02 * jax.random.normal(next(keys), (self.vocabulary, width)),
            "positions": 0.02 * jax.random.normal(next(keys), (self.context, width)),
            "layers": [
                {
                    "attention_norm": norm(),
                    "qkv": dense(width, 3 * width),
                    "out": dense(width, width, residual),
                    "mlp_norm": norm(),
                    "up": dense(width, 4 * width),
                    "down": dense(4 * width, width, residual),
                }
                for _ in range(self.layers)
            ],
            "norm": norm(),
        }

    def apply(self, params: PyTree, tokens: Array) -> Array:
        """Logits of the token after each of those in the rows of (n, up to context)."""
        x = params["tokens"][tokens] + params["positions"][: tokens.shape[1]]
        for layer in params["layers"]:
            qkv = _dense(layer["qkv"], _layer_norm(layer["attention_norm"], x))
            q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + _dense(layer["out"], attended.reshape(x.shape))
            hidden = jax.nn.gelu(_dense(layer["up"], _layer_norm(layer["mlp_norm"], x)))
            x = x + _dense(layer["down"], hidden)
        return _layer_norm(params["norm"], x) @ params["tokens"].T

    def loss(self, params: PyTree, windows: Array) -> Array:
        """Mean cross-entropy per token of windows (n, context + 1), in nats."""
        log_probs = jax.nn.log_softmax(self.apply(params, windows[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_probs, windows[:, 1:, None], -1))


def _dense(layer: dict[str, Array], x: Array) -> Array:
    y = x @ layer["kernel"]
    return y + layer["bias"] if "bias" in layer else y


def _layer_norm(layer: dict[str, Array], x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    y = x * layer["scale"]
    return y + layer["bias"] if "bias" in layer else y
