"""The networks of the image examples: from images to logits (n, 10)."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# For images (n, 64) in [-1, 1] of several tasks: nothing tells it which task an image belongs to.
NETWORK = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])


@jax.jit
@jax.vmap
def accuracies(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Accuracy in % of `NETWORK` on every task, (seeds, tasks)."""
    logits: Any = jax.vmap(NETWORK.apply, (None, 0))(params, images)
    return 100 * jnp.mean(logits.argmax(-1) == labels, axis=-1)


class MLP(nn.Module):
    """Two hidden layers, for images (n, height, width, 1) in [0, 1]."""

    width: int = 128
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = (2.0 * images - 1.0).reshape(len(images), math.prod(images.shape[1:]))
        for _ in range(2):
            x = self.activation(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)
