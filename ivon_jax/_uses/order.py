"""Order statistics of all elements of a tree together."""

import jax
import jax.numpy as jnp
from jax import lax


def lower_quantiles(leaves: list[jax.Array], ranks: jax.Array) -> jax.Array:
    """The elements of given ranks among all leaves, without copying, sorting or gathering them.

    Bisection over the bit patterns of float32, which are ordered like the numbers: 32 passes, each
    a sum over every leaf that runs where the leaf is stored.

    Args:
      leaves: arrays without NaN; compared in float32.
      ranks: (R,) ranks from 0, in float32 (exact up to 2²⁴ elements, then to 1 part in 10⁷).

    Returns:
      (R,) float32: for each rank r the smallest element with more than r elements at or below it.
    """

    def count(x: jax.Array, bounds: jax.Array) -> jax.Array:
        below = x.astype(jnp.float32)[..., None] <= bounds.reshape((1,) * x.ndim + (-1,))
        return jnp.sum(below, axis=tuple(range(x.ndim))).astype(jnp.float32)

    def num_at_most(bounds: jax.Array) -> jax.Array:
        return sum((count(x, bounds) for x in leaves), jnp.zeros(bounds.shape, jnp.float32))

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval
        # The mean of two int32 without overflow.
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = num_at_most(_number(middle)) > ranks
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    infinity = _pattern(jnp.float32(jnp.inf))
    low = jnp.full(ranks.shape, _pattern(jnp.float32(-jnp.inf)))
    _, high = lax.fori_loop(0, 33, halve, (low, jnp.full(ranks.shape, infinity)))
    found = _number(high)
    # Backends that flush subnormal numbers cannot tell them from zero.
    return jnp.where(jnp.abs(found) < jnp.finfo(jnp.float32).tiny, 0, found)


def _pattern(x: jax.Array) -> jax.Array:
    """An int32 for each float32, in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _number(pattern: jax.Array) -> jax.Array:
    bits = jnp.where(pattern < 0, jnp.int32(-(2**31)) - pattern, pattern)
    return lax.bitcast_convert_type(bits, jnp.float32)
