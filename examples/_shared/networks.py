"""The networks of the image examples: logits (n, 10) of images (n, height, width, channels)."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Two hidden layers, for images of one channel in [0, 1]."""

    width: int = 128
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = (2.0 * images - 1.0).reshape(len(images), math.prod(images.shape[1:]))
        for _ in range(2):
            x = self.activation(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class ConvNet(nn.Module):
    """For colour images in [0, 1].

    Group normalisation, because BatchNorm carries statistics of one sample's weights to another.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = 2.0 * images - 1.0
        for features in (32, 64, 128):
            for _ in range(2):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.GroupNorm(num_groups=8)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.mean(axis=(1, 2)))
