"""Standard normal draws in plain operations, which XLA fuses with whatever uses them.

A draw depends on key, leaf and position alone, and is the same for any sharding: threefry counts
the positions. The first of its two words becomes a normal, by the inverse cumulative distribution
function; the second rounds samples in narrow dtypes, up or down at random. `jax.random` does the
like, but with more rounds, and on a CPU its loops send the bits through memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.axes import is_on_mesh
from ivon_jax._core.compiler import materialized, rounded, variables
from ivon_jax._core.trees import cast

THREEFRY = "threefry2x32"

SMALL = 2**17
"""On a CPU leaves of one shape, of up to this many elements, are drawn by one kernel: one for each
would cost more to compile than to run."""

COUNTED = 2**32
"""Elements that a word can count; draws of larger leaves are left to `jax.random`."""

# Threefry-2x32: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011). Its words are
# mixed after 8 rounds; the 13 of their faster variant cost a third less than the 20 of jax.
_ROUNDS, _JAX_ROUNDS = 13, 20
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)

_STREAM = 0x49564F4E  # "IVON": a key that was used for something else by mistake does no harm

# √2 erf⁻¹(u)/u with u = 2⁻²³i is a polynomial in x = (w−11)/11 with w = −log₂(1−u²) ≤ 22, and
# log₂ of a number 2ᵉr with r from ⅔ to 4/3 is e and a polynomial in r. Both are fitted to the
# smallest relative error of the normal, and have the highest power first; their constants are such
# that nothing is scaled. All 2²³ values that can occur are within 5e-6 of the exact ones.
_SCALE = np.float32(2**23)
_BITS_OF_TWO_THIRDS = np.int32(0x3F2AAAAB)
_EXPONENT = np.int32(-(2**23))
_X_OF_EXPONENT = -1 / (11 * 2**23)
_X_OF_MANTISSA = (
    -0.030978091061115265,
    0.19171398878097534,
    -0.5004661679267883,
    0.7262986302375793,
    -0.694324254989624,
    3.489575147628784,
)
_NORMAL_OVER_I = (
    -2.6053517121482628e-09,
    3.819259575266187e-09,
    4.370746431447969e-09,
    -1.1287275114568729e-08,
    7.924986888951935e-09,
    -2.3958859340922345e-09,
    -4.482876736489061e-09,
    1.9032128761864442e-08,
    -5.231651556414363e-08,
    2.3171833163360134e-07,
    4.374018942598923e-07,
)


def gaussian_noise(
    key: jax.Array, precision: list[jax.Array], sign: jax.Array | float = 1.0
) -> list[jax.Array]:
    """Independent draws n ~ N(0, 1/precision) for a list of leaves; zero where it is infinite.

    They are multiplied by `sign`, 1 or -1, and have the dtypes of the precisions.
    """
    sigmas = [jax.lax.rsqrt(p) for p in precision]
    if not isinstance(sign, float) or sign != 1.0:
        sigmas = [jnp.asarray(sign, sigma.dtype) * sigma for sigma in sigmas]
    return [e * sigma for e, sigma in zip(standard_normals(key, precision), sigmas, strict=True)]


def samples(
    key: jax.Array, means: list[jax.Array], noise: list[jax.Array], dtypes: list[np.dtype]
) -> list[jax.Array]:
    """θ = m + n in these dtypes, for noise drawn with this key.

    A dtype below float32 rounds up or down at random, so that E[θ | n] = m + n: to nearest, noise
    below its spacing would be lost in θ, though not in the products n⊙ĝ. What has no noise is
    rounded to nearest, so that fixed parameters stay.
    """
    sums = dict(enumerate(map(displaced, means, noise)))
    drawn = {i: cast(x, t) for (i, x), t in zip(sums.items(), dtypes, strict=True)}
    narrow = {i: x for i, x in sums.items() if _is_narrow(x, dtypes[i])}
    for i, word in _drawn(_second_word, key, narrow).items():
        rounded_up_or_down = _stochastically_rounded(sums[i], word, dtypes[i])
        drawn[i] = jnp.where(noise[i] == 0, drawn[i], rounded_up_or_down)
    return list(drawn.values())


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
    drawn = _drawn(_normal, key, dict(enumerate(like)))
    return [drawn[i] for i in range(len(like))]


def derived_keys(key: jax.Array, first: int, number: int) -> jax.Array:
    """Data of `jax.random.fold_in(key, i)` for i = first, …, first+number−1, without loops.

    For `first=0` that is `jax.random.split(key, number)` under the partitionable scheme.
    """
    words, rounds = jax.random.key_data(key), _JAX_ROUNDS
    counts = jnp.arange(number, dtype=jnp.uint32) + np.uint32(first)
    derived = jnp.stack(_threefry(rounds, words, jnp.zeros_like(counts), counts), axis=1)
    return materialized([derived])[0]


def _is_narrow(x: jax.Array, dtype: np.dtype) -> bool:
    floating = jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    return floating and dtype.itemsize < 4 and dtype != x.dtype


# Draws for an array like the last argument, from the stream (key, number).
_Draw = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _drawn(draw: _Draw, key: jax.Array, like: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """For each number a draw from its stream, like the array."""
    if not like:
        return {}
    key = jax.random.wrap_key_data(derived_keys(key, _STREAM, 1)[0], impl=THREEFRY)

    def grouped(like: dict[int, jax.Array]) -> dict[int, jax.Array]:
        groups: dict[Any, list[int]] = {}
        for number, x in like.items():
            groups.setdefault(jax.typeof(x), []).append(number)
        drawn = {}
        for numbers in groups.values():
            x = like[numbers[0]]
            # In one dimension the position needs no division, but the sharding is lost.
            flat = x if is_on_mesh(x) else x.ravel()
            alike = _drawn_alike(draw, key, numbers, flat)
            drawn |= zip(numbers, (d.reshape(x.shape) for d in alike), strict=True)
        return drawn

    def apart(like: dict[int, jax.Array]) -> dict[int, jax.Array]:
        return {number: draw(key, jnp.uint32(number), x) for number, x in like.items()}

    # The partitionable scheme is what makes a draw of jax independent of its sharding.
    with jax.threefry_partitionable(True):
        return jax.lax.platform_dependent(like, cpu=grouped, default=apart)


def _drawn_alike(
    draw: _Draw, key: jax.Array, numbers: list[int], like: jax.Array
) -> list[jax.Array]:
    """Draws of the same type, with one kernel for all of them on a CPU."""
    if len(numbers) == 1:
        return [draw(key, jnp.uint32(numbers[0]), like)]
    if like.size > SMALL:
        return [draw(key, number, like) for number in variables(numbers, jnp.uint32)]
    together = jax.vmap(draw, (None, 0, None))(key, jnp.array(numbers, jnp.uint32), like)
    (rows,) = materialized([together])
    zero, row = jnp.zeros((), jnp.int32), (1, *like.shape)
    return [
        jax.lax.dynamic_slice(rows, (i, *[zero] * like.ndim), row).reshape(like.shape)
        for i in variables(list(range(len(numbers))), jnp.int32)
    ]


@jax.jit  # traced once for leaves of one shape
def _normal(key: jax.Array, number: jax.Array, like: jax.Array) -> jax.Array:
    if like.dtype.itemsize > 4 or like.size > COUNTED:
        return jax.random.normal(jax.random.fold_in(key, number), like.shape, like.dtype)
    word = jax.lax.bitcast_convert_type(_words(key, number, like)[0], jnp.int32)
    i = ((word >> 8) | 1).astype(jnp.float32)  # odd, between −2²³ and 2²³
    # 1 − u² from factors that are exact, as 2ᵉr; an exponent in place is e·2²³.
    bits = jax.lax.bitcast_convert_type((_SCALE - i) * (_SCALE + i), jnp.int32)
    exponent = (bits - _BITS_OF_TWO_THIRDS) & _EXPONENT
    mantissa = jax.lax.bitcast_convert_type(bits - exponent, jnp.float32)
    of_exponent = exponent.astype(jnp.float32) * np.float32(_X_OF_EXPONENT)
    x = of_exponent + _polynomial(_X_OF_MANTISSA, mantissa)
    return (i * _polynomial(_NORMAL_OVER_I, x)).astype(like.dtype)


@jax.jit
def _second_word(key: jax.Array, number: jax.Array, like: jax.Array) -> jax.Array:
    if like.size > COUNTED:
        key = jax.random.fold_in(jax.random.fold_in(key, number), 1)  # not the bits of the normal
        return jax.random.bits(key, like.shape, jnp.uint32)
    return _words(key, number, like)[1]


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    """Estrin's scheme: few operations wait for one another, as all do in Horner's."""
    terms: list[Any] = [np.float32(c) for c in reversed(coefficients)]
    while len(terms) > 1:
        odd = terms[1::2]
        paired = [a + b * x for a, b in zip(terms[::2], odd, strict=False)]
        terms = paired + terms[2 * len(odd) :]
        x = x * x
    return terms[0]


def _words(key: jax.Array, number: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words of 32 bits for each element of an array, of up to 2³² elements."""
    # From `like`, so that each device counts the elements of its own shard.
    zeros, stride = jnp.zeros_like(like, jnp.uint32), 1
    position = zeros
    for axis in reversed(range(like.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        position = position + (index if stride == 1 else index * np.uint32(stride))
        stride *= like.shape[axis]
    return _threefry(_ROUNDS, jax.random.key_data(key), zeros + number, position)


def _threefry(
    rounds: int, key: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    keys = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    # One array for each number: repeated constants cost time to compile.
    amounts = {r: jnp.full_like(x1, r) for n in _ROTATIONS for r in (n, 32 - n)}
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(rounds):
        rotation = _ROTATIONS[i % 8]
        x0 = x0 + x1
        x1 = (x1 << amounts[rotation]) | (x1 >> amounts[32 - rotation])
        x1 = x0 ^ x1
        group, last = divmod(i + 1, 4)
        if not last:
            x0 = x0 + keys[group % 3]
            x1 = x1 + (keys[(group + 1) % 3] + np.uint32(group))
    return x0, x1


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _stochastically_rounded(x: jax.Array, word: jax.Array, dtype: np.dtype) -> jax.Array:
    """One of the two neighbours of x in a dtype below float32, with expectation x.

    Below 2⁻¹²⁶, where float32 itself has no full precision, the neighbours are multiples of that.
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    power = jax.lax.bitcast_convert_type(bits & np.int32(0x7F800000), jnp.float32)  # 2ᵉ ≤ |x|
    smallest = max(float(jnp.finfo(dtype).smallest_subnormal), 2.0**-126)
    spacing = jnp.maximum(power * np.float32(jnp.finfo(dtype).eps), np.float32(smallest))
    steps = x / spacing  # exact: the spacing is a power of two
    below = jnp.floor(steps)
    up = (word >> 8).astype(jnp.float32) < (steps - below) * np.float32(2**24)
    neighbor = jnp.where(up, below + np.float32(1), below) * spacing
    # Infinities and NaN have no neighbours.
    return jnp.where(jnp.isfinite(x), neighbor, x).astype(dtype)


@_stochastically_rounded.defjvp
def _rounding_passes_derivatives(
    dtype: np.dtype, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    # As rounding to nearest does.
    return _stochastically_rounded(*primals, dtype), tangents[0].astype(dtype)
