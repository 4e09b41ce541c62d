"""Noise is threefry's bits through the normal's inverse CDF, for any shape, key and mapping."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import special, stats

from ivon_jax import Posterior, sample_params
from ivon_jax._core.noise import (
    SMALL,
    _normal,
    _second_word,
    _threefry,
    _words,
    samples,
    standard_normals,
)

KEY = jax.random.key(3, impl="threefry2x32")


# Random123's tests/kat_vectors: rounds, counter, key, result.
KNOWN_ANSWERS = [
    (13, (0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
    (13, (2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0xFD36D048, 0x2D17272C)),
    (13, (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
    (20, (0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    (20, (2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
    (20, (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize("rounds, counter, key, expected", KNOWN_ANSWERS)
def test_threefry_gives_the_known_answers_of_its_authors(rounds, counter, key, expected):
    words = [jnp.full((3,), x, jnp.uint32) for x in counter]
    drawn = _threefry(rounds, jnp.array(key, jnp.uint32), *words)
    assert [int(x[0]) for x in drawn] == list(expected)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1, 7), (0, 4), (70_000,), (17, 33)])
@pytest.mark.parametrize("number", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_words_are_threefry_of_the_stream_and_the_position(shape, number, seed):
    key = jax.random.key(seed, impl="threefry2x32")
    size = int(np.prod(shape))
    streams = jnp.full(size, number, jnp.uint32)
    expected = _threefry(13, jax.random.key_data(key), streams, jnp.arange(size, dtype=jnp.uint32))
    drawn = _words(key, jnp.uint32(number), jnp.ones(shape))
    for words, wanted in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(words, wanted.reshape(shape))


def test_every_draw_is_the_quantile_of_its_bits(monkeypatch):
    # Every |u| that can occur: the odd multiples of 2⁻²³ below 1.
    positive = np.arange(2**22, dtype=np.uint32) << 9
    both = np.stack([positive, ~positive])
    monkeypatch.setattr("ivon_jax._core.noise._words", lambda *_: (jnp.array(both), None))
    drawn = _normal.__wrapped__(KEY, jnp.uint32(0), jnp.ones(both.shape))
    drawn = np.asarray(drawn, np.float64)
    u = (2 * np.arange(2**22) + 1) / 2.0**23
    expected = -special.ndtri((1 - u) / 2)
    np.testing.assert_allclose(drawn[0], expected, rtol=5e-6)
    np.testing.assert_array_equal(drawn[1], -drawn[0])
    # What a test of 10⁹ draws could see at best: 1e9**-0.5 = 3e-5.
    assert abs(np.mean(drawn[0] ** 2) - 1) < 1e-6
    assert np.abs(special.ndtr(drawn[0]) - special.ndtr(expected)).max() < 2e-6


def test_draws_are_the_same_under_vmap_and_scan():
    keys = jax.random.split(KEY, 4)
    like = [jnp.ones((3, 5)), jnp.ones(SMALL + 1), jnp.ones(())]
    expected = [standard_normals(k, like) for k in keys]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    mapped = jax.vmap(lambda k: standard_normals(k, like))(keys)
    _, scanned = jax.lax.scan(lambda c, k: (c, standard_normals(k, like)), None, keys)
    for x, y, z in zip(expected, mapped, scanned, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)


def test_leaves_that_draw_apart_as_on_accelerators_draw_the_same(monkeypatch):
    shapes = [(3, 5), SMALL + 1, (), (3, 5), (0, 2), SMALL, SMALL + 1, (3, 5), SMALL]
    like = [jnp.ones(shape) for shape in shapes]
    together = standard_normals(KEY, like)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    for x, y in zip(together, standard_normals(KEY, like), strict=True):
        np.testing.assert_array_equal(x, y)


def test_samples_round_the_same_where_leaves_draw_apart(monkeypatch):
    shapes = [(3, 5), SMALL + 1, (), (3, 5)]
    means = [jnp.full(shape, 1.3) for shape in shapes]
    noise = [jnp.full(shape, 1e-3) for shape in shapes]
    dtypes = [jnp.dtype(t) for t in ("bfloat16", "float16", "float32", "bfloat16")]
    together = samples(KEY, means, noise, dtypes)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    for x, y, t in zip(together, samples(KEY, means, noise, dtypes), dtypes, strict=True):
        assert x.dtype == t
        np.testing.assert_array_equal(x, y)


def test_the_draws_of_this_version_are_these():
    # A state without its mean is restored by drawing again: if they change, say so in CHANGELOG.
    drawn = standard_normals(KEY, [jnp.ones(2), jnp.ones((2, 2)), jnp.ones(2)])
    expected = (
        [-1.090953, 1.816602],
        [[1.938035, 0.097271], [0.379752, -2.631614]],
        [-0.6349, -1.124058],
    )
    for x, y in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_the_word_that_rounds_a_sample_is_independent_of_its_noise():
    n = 1_000_000
    drawn = _normal(KEY, jnp.uint32(1), jnp.ones(n))
    word = np.asarray(_second_word(KEY, jnp.uint32(1), jnp.ones(n)))
    for bits in (word >> 16, word & 0xFFFF, (word >> 8) & 1):
        assert abs(np.corrcoef(drawn, bits)[0, 1]) < 5 / np.sqrt(n)
        assert abs(np.corrcoef(np.abs(drawn), bits)[0, 1]) < 5 / np.sqrt(n)


def test_no_two_leaves_share_bits_whether_they_are_small_or_large():
    like = [jnp.ones(SMALL), jnp.ones(SMALL + 1), jnp.ones(SMALL), jnp.ones(SMALL + 1)]
    drawn = [np.asarray(x)[:SMALL] for x in standard_normals(KEY, like)]
    correlations = np.corrcoef(drawn)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(SMALL)
    # One uniform draw in 2²³ values: few coincide, and only by chance.
    assert all(np.mean(x == y) < 1e-3 for i, x in enumerate(drawn) for y in drawn[:i])


def test_a_key_that_is_used_again_by_mistake_gives_other_numbers():
    with jax.threefry_partitionable(True):
        jaxs = jax.random.normal(KEY, (1000,))
    (ours,) = standard_normals(KEY, [jnp.ones(1000)])
    assert abs(np.corrcoef(ours, jaxs)[0, 1]) < 5 / np.sqrt(1000)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrower_draws_are_rounded_from_float32(dtype):
    for size in (9, SMALL + 1):
        (narrow,) = standard_normals(KEY, [jnp.ones(size, dtype)])
        (wide,) = standard_normals(KEY, [jnp.ones(size)])
        assert narrow.dtype == dtype
        rounding = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(narrow.astype(jnp.float32), wide, rtol=rounding, atol=1e-7)


def test_the_noise_has_the_moments_and_tails_of_a_gaussian():
    n = 1_000_000
    q = Posterior(jnp.zeros(n), jnp.ones(n))
    x = np.sort(np.asarray(sample_params(jax.random.key(7), q)[1], np.float64))
    # Expectation and variance of the first four powers; five standard errors.
    for power, value, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(x**power) - value) < 5 * np.sqrt(variance / n), power
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert np.all(np.isfinite(x)) and 4.4 < x[-1] < 6 and -6 < x[0] < -4.4


def test_on_explicit_meshes_every_device_draws_its_own_shard_only():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    like = jax.device_put(jnp.ones((512, 512)), NamedSharding(mesh, PartitionSpec("x")))
    draw = jax.jit(lambda k, x: x * standard_normals(k, [x])[0])
    (expected,) = standard_normals(KEY, [jnp.ones((512, 512))])
    np.testing.assert_array_equal(draw(KEY, like), expected)
    compiled = draw.lower(KEY, like).compile().as_text()
    assert "u32[64,512]" in compiled and "u32[512,512]" not in compiled


@pytest.mark.slow
def test_a_billion_draws_look_normal_and_independent():
    block, blocks, bins = 2**24, 60, 256

    @jax.jit
    def sums(key):
        (x,) = standard_normals(key, [jnp.zeros(block)])
        # In float32 Φ is exact to 1e-7, which moves no more than that over an edge.
        bin_of = jnp.floor(jax.scipy.stats.norm.cdf(x) * bins).astype(jnp.int32)
        counts = jnp.bincount(bin_of, length=bins)
        lagged = [jnp.sum(x[:-lag] * x[lag:]) for lag in (1, 2, 3, 64, 4096)]
        powers = [jnp.sum(x**power) for power in (1, 2, 3, 4)]
        return counts, jnp.stack(lagged), jnp.stack(powers)

    totals = [jax.device_get(sums(key)) for key in jax.random.split(KEY, blocks)]
    counts, lagged, powers = (
        np.sum(np.array(x, np.float64), axis=0) for x in zip(*totals, strict=True)
    )
    n = block * blocks
    assert stats.chisquare(counts).pvalue > 1e-3
    assert np.all(np.abs(lagged) < 4 * np.sqrt(n))
    expected, variances = np.array([0, 1, 0, 3]) * n, np.array([1, 2, 15, 96]) * n
    # Sums of a block are rounded to float32: 1e-7 of a sum of squares or fourth powers.
    assert np.all(np.abs(powers - expected) < 4 * np.sqrt(variances) + 1e-6 * expected)
