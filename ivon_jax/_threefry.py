"""The bits of `jax.random` in plain operations, which XLA fuses with whatever uses them.

On a CPU jax keeps the rounds of threefry in loops, which are slow to compile under `vmap` and
`scan` and do not fuse, so that the bits go through memory. Written out they do neither.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Threefry-2x32 with 20 rounds: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def uniform(key: jax.Array, like: jax.Array, low: Any) -> jax.Array:
    """Uniform draws on [low, 1) in the shape, dtype and sharding of an array.

    Bitwise `jax.random.uniform(key, like.shape, like.dtype, low, 1.0)` under the partitionable
    scheme, in which the bits of an element depend on nothing but the key and its position.

    Args:
      key: a typed threefry key.
      like: an array; its values do not matter.
      low: lower end, in the dtype of `like`.
    """
    if like.dtype != jnp.float32 or math.prod(like.shape) >= 2**32:
        return jax.random.uniform(key, like.shape, like.dtype, low, 1.0)
    # The mantissa of a number in [1, 2).
    mantissa = (_bits(key, like) >> np.uint32(9)) | np.float32(1).view(np.uint32)
    unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1)
    return jnp.maximum(low, unit * (np.float32(1) - low) + low)


def _bits(key: jax.Array, like: jax.Array) -> jax.Array:
    """32 bits for each element of an array, of fewer than 2³² elements."""
    words = jax.random.key_data(key)
    # From `like`, so that each device counts the elements of its own shard.
    high = jnp.zeros_like(like, jnp.uint32)
    position, stride = high, 1
    for axis in reversed(range(like.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        position = position + index * np.uint32(stride)
        stride *= like.shape[axis]
    a, b = _threefry(words[0], words[1], high, position)
    return a ^ b


def _threefry(
    key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    keys = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1
