"""Noise is made of the bits of `jax.random`, for any shape, key and mapping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from ivon_jax import Posterior, sample_params
from ivon_jax._threefry import uniform

LOW = np.nextafter(np.float32(-1), np.float32(0))


def reference(key, shape):
    with jax.threefry_partitionable(True):
        return jax.random.uniform(key, shape, jnp.float32, LOW, 1.0)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1, 7), (0, 4), (70_000,), (17, 33)])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_the_draws_are_bitwise_those_of_jax(shape, seed):
    key = jax.random.key(seed, impl="threefry2x32")
    drawn = uniform(key, jnp.ones(shape), LOW)
    np.testing.assert_array_equal(drawn, reference(key, shape))


def test_they_are_so_under_vmap_and_scan():
    keys = jax.random.split(jax.random.key(3), 4)
    expected = jnp.stack([reference(k, (3, 5)) for k in keys])
    like = jnp.ones((3, 5))
    np.testing.assert_array_equal(jax.vmap(lambda k: uniform(k, like, LOW))(keys), expected)
    _, drawn = jax.lax.scan(lambda c, k: (c, uniform(k, like, LOW)), None, keys)
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrower_dtypes_are_left_to_jax(dtype):
    key, low = jax.random.key(0), jnp.array(-0.5, dtype)
    with jax.threefry_partitionable(True):
        expected = jax.random.uniform(key, (9,), dtype, low, 1.0)
        np.testing.assert_array_equal(uniform(key, jnp.ones(9, dtype), low), expected)


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
    like = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, PartitionSpec("x")))
    draw, key = jax.jit(lambda k, x: x * uniform(k, x, LOW)), jax.random.key(1)
    np.testing.assert_array_equal(draw(key, like), reference(key, (64, 64)))
    compiled = draw.lower(key, like).compile().as_text()
    assert "u32[8,64]" in compiled and "u32[64,64]" not in compiled
