"""Standard normal draws in plain operations, which XLA fuses with whatever uses them.

A float32 draw depends on key, leaf and position alone, and is the same for any sharding: threefry
counts the positions, and the inverse cumulative distribution function turns its bits into a normal.
`jax.random` does the same, but on a CPU its loops send the bits through memory.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.compiler import materialized, rounded, running_sums

THREEFRY = "threefry2x32"

SMALL = 2**14
"""Leaves of up to this many elements lie one after another in one stream, for which a CPU takes
one kernel: one for each would cost far more to compile than to run."""

# Threefry-2x32 with 20 rounds: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)

_STREAM = 0x49564F4E  # "IVON": a key that was used for something else by mistake does no harm

# √2 erf⁻¹(u)/u as a polynomial in w/8 − 1 with w = −log(1−u²) ≤ 16, highest power first. Fitted to
# the smallest relative error, which in float32 is below 5e-7 for every u that can occur.
_INVERSE_CDF = (
    0.0101717147,
    -0.012554367,
    -0.0294825824,
    0.051148891,
    0.00114832692,
    -0.0435478824,
    0.0455694498,
    -0.0557356976,
    0.0597133497,
    -0.0240288562,
    -0.05160433,
    0.177946596,
    -0.457564256,
    1.99525137,
    3.7638426,
)


def gaussian_noise(
    key: jax.Array, precision: list[jax.Array], sign: jax.Array | float = 1.0
) -> list[jax.Array]:
    """Independent draws n ~ N(0, 1/precision) for a list of leaves; zero where it is infinite.

    They are multiplied by `sign`, 1 or -1, and have the dtypes of the precisions.
    """
    sigmas = [jnp.asarray(sign, p.dtype) * jax.lax.rsqrt(p) for p in precision]
    return [e * sigma for e, sigma in zip(standard_normals(key, precision), sigmas, strict=True)]


def displaced(mean: jax.Array, noise: jax.Array) -> jax.Array:
    """m + n, with the same last bit in every kernel and for every sharding."""
    # A Posterior may hold leaves that are fixed because they are not floating, or narrower.
    if not jnp.issubdtype(mean.dtype, jnp.floating):
        return mean
    return mean.astype(noise.dtype) + rounded(noise)


def means_of(samples: list[jax.Array], noise: list[jax.Array]) -> list[jax.Array]:
    """θ − n, the inverse of `displaced` up to rounding."""
    pairs = zip(samples, noise, strict=True)
    return materialized([x.astype(n.dtype) - rounded(n) for x, n in pairs])


def standard_normals(key: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    """Independent draws ε ~ N(0, 1) in the shapes, dtypes and shardings of the arrays.

    The uniform draw behind a float32 one takes 2²³ values, symmetric about zero; the largest |ε| is
    5.3. float64 is left to `jax.random.normal`; narrower dtypes are rounded from float32.
    """
    key = jax.random.wrap_key_data(derived_keys(key, _STREAM, 1)[0], impl=THREEFRY)
    # The partitionable scheme is what makes a draw of jax independent of its sharding.
    with jax.threefry_partitionable(True):
        small = iter(_in_one_stream(key, [x for x in like if _is_small(x)]))
        large = iter(_drawn_alone(key, [x for x in like if not _is_small(x)]))
        return [next(small if _is_small(x) else large) for x in like]


def derived_keys(key: jax.Array, first: int, number: int) -> jax.Array:
    """Data of `jax.random.fold_in(key, i)` for i = first, …, first+number−1, without loops.

    For `first=0` that is `jax.random.split(key, number)` under the partitionable scheme.
    """
    words = jax.random.key_data(key)
    counts = jnp.arange(number, dtype=jnp.uint32) + np.uint32(first)
    derived = jnp.stack(_threefry(words[0], words[1], jnp.zeros_like(counts), counts), axis=1)
    return materialized([derived])[0]


def _is_small(x: jax.Array) -> bool:
    return x.size <= SMALL and x.dtype.itemsize <= 4


def _in_one_stream(key: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    if not like:
        return []
    sizes, zero = [x.size for x in like], jnp.uint32(0)

    def together(like: list[jax.Array]) -> list[jax.Array]:
        (drawn,) = materialized([_normal(key, zero, zero, jnp.zeros(sum(sizes), jnp.float32))])
        starts = running_sums(jnp.int32(0), sizes[:-1])
        parts = [
            jax.lax.dynamic_slice(drawn, [start], [x.size]).reshape(x.shape).astype(x.dtype)
            for x, start in zip(like, starts, strict=True)
        ]
        # The sum has the type of x, in which jax may keep its mesh and sharding.
        return [part + jnp.zeros_like(x) for part, x in zip(parts, like, strict=True)]

    def apart(like: list[jax.Array]) -> list[jax.Array]:
        # Each device counts for itself: slices of one vector would be sent around a mesh.
        starts = np.cumsum([0, *sizes[:-1]], dtype=np.uint32)
        return [_normal(key, zero, jnp.asarray(i), x) for i, x in zip(starts, like, strict=True)]

    return jax.lax.platform_dependent(like, cpu=together, default=apart)


def _drawn_alone(key: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    numbers, zero = running_sums(jnp.uint32(1), [1] * len(like)), jnp.uint32(0)
    return [_normal(key, number, zero, x) for number, x in zip(numbers, like, strict=False)]


@jax.jit  # traced once for leaves of one shape
def _normal(key: jax.Array, number: jax.Array, first: jax.Array, like: jax.Array) -> jax.Array:
    """Draws of the stream of this number, from its element `first` on."""
    if like.dtype.itemsize > 4 or like.size >= 2**32:
        return jax.random.normal(jax.random.fold_in(key, number), like.shape, like.dtype)
    bits = jax.lax.bitcast_convert_type(_bits(key, number, first, like), jnp.int32)
    # An odd multiple of 2⁻²³ in (−1, 1).
    u = ((bits >> 8) | 1).astype(jnp.float32) * np.float32(2**-23)
    w = -jnp.log((np.float32(1) - u) * (np.float32(1) + u))
    x = w * np.float32(1 / 8) - np.float32(1)
    ratio = np.float32(_INVERSE_CDF[0]) * x + np.float32(_INVERSE_CDF[1])
    for coefficient in _INVERSE_CDF[2:]:
        ratio = ratio * x + np.float32(coefficient)
    return (u * ratio).astype(like.dtype)


def _bits(key: jax.Array, number: jax.Array, first: jax.Array, like: jax.Array) -> jax.Array:
    """32 bits for each element of an array, of fewer than 2³² elements."""
    words = jax.random.key_data(key)
    # From `like`, so that each device counts the elements of its own shard.
    zeros = jnp.zeros_like(like, jnp.uint32)
    position, stride = zeros + first, 1
    for axis in reversed(range(like.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        position = position + index * np.uint32(stride)
        stride *= like.shape[axis]
    a, b = _threefry(words[0], words[1], zeros + number, position)
    return a ^ b


def _threefry(
    key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    keys = (key0, key1, key0 ^ key1 ^ _PARITY)
    # One array for each number: repeated constants cost time to compile.
    amounts = {r: jnp.full_like(x1, r) for group in _ROTATIONS for n in group for r in (n, 32 - n)}
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << amounts[rotation]) | (x1 >> amounts[32 - rotation])
            x1 = x0 ^ x1
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + (keys[(group + 2) % 3] + np.uint32(group + 1))
    return x0, x1
