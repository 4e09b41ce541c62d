"""The networks of `images.py`: a perceptron, and a small ResNet without batch normalisation."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.evidence.images.image_training import NUM_CLASSES

Array = jax.Array


def dropout(module: nn.Module, x: Array, rate: Any) -> Array:
    """Sets a share of the activations to zero; `None` leaves them alone."""
    if rate is None:
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


class Perceptron(nn.Module):
    """Two hidden layers of 128, with dropout after both."""

    width: int = 128

    @nn.compact
    def __call__(self, images: Array, rate: Any = None) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, 10)."""
        x = (2.0 * images - 1.0).reshape(len(images), -1)
        for _ in range(2):
            x = dropout(self, nn.relu(nn.Dense(self.width)(x)), rate)
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
    """A ResNet of two blocks of different width, with dropout after both.

    For two cores: large images are halved in both directions by the first convolution, so that
    the blocks see 14x14 and 7x7 positions of MNIST.
    """

    features: Sequence[int] = (16, 32)

    @nn.compact
    def __call__(self, images: Array, rate: Any = None) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, 10)."""
        stride = 2 if images.shape[1] > 16 else 1
        x = self.normalised(2.0 * images - 1.0, self.features[0], 3, stride)
        for block, features in enumerate(self.features):
            stride = 2 if block > 0 else 1
            y = self.normalised(self.normalised(x, features, 3, stride), features, 3)
            if block > 0:
                x = self.normalised(x, features, 1, stride)
            x = dropout(self, x + y, rate)
        return nn.Dense(NUM_CLASSES)(x.mean(axis=(1, 2)))

    def normalised(self, x: Array, features: int, size: int, stride: int = 1) -> Array:
        """A convolution and what follows it."""
        x = nn.Conv(features, (size, size), (stride, stride), use_bias=False)(x)
        return FilterResponseNorm()(x)


NETWORKS: dict[str, nn.Module] = {"mlp": Perceptron(), "resnet": ResNet()}
