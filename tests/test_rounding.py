"""Samples in narrow dtypes are rounded up or down at random, so that ĥ is unbiased at any σ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ivon_jax import (
    Posterior,
    auto_sample,
    ivon,
    mc_value_and_grad,
    posterior_mean,
    predict_at_mean,
    predict_samples,
    sample_params,
)
from ivon_jax._core.noise import _stochastically_rounded

N = 1_000_000
NARROW = [jnp.bfloat16, jnp.float16]


def words(n, seed=0):
    return jax.random.bits(jax.random.key(seed), (n,), jnp.uint32)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("x", [1.0003, -1.0003, 3e-3, 1.99999, -1e-7, 255.3, 0.1])
def test_a_number_becomes_one_of_its_two_neighbors_and_is_kept_on_average(dtype, x):
    x = np.float32(x)
    drawn = _stochastically_rounded(jnp.full((N,), x), words(N), jnp.dtype(dtype))
    found = np.unique(np.asarray(drawn, np.float64))
    nearest = float(jnp.asarray(x, dtype))
    assert len(found) == 2 and nearest in found and found[0] <= x <= found[1]
    scale = found[1] - found[0]
    error = np.mean(np.asarray(drawn, np.float64)) - x
    assert abs(error) < 5 * 0.5 * scale / np.sqrt(N)


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_of_the_dtype_stay_and_so_do_those_without_neighbors(dtype):
    exact = jnp.array([0.0, 1.0, -0.5, 1.5, 2.0**-14, jnp.inf, -jnp.inf, jnp.nan], dtype)
    for seed in range(20):
        drawn = _stochastically_rounded(exact.astype(jnp.float32), words(8, seed), exact.dtype)
        np.testing.assert_array_equal(drawn.astype(jnp.float32), exact.astype(jnp.float32))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("ulps", [0.01, 0.1, 1.0, 10.0])
def test_the_sample_has_the_mean_and_the_product_the_variance_of_the_posterior(dtype, ulps):
    # ĥ = n(θ−m)/σ² for a loss of curvature one.
    mean = 1.3  # between two numbers of either dtype
    ulp = float(jnp.finfo(dtype).eps)
    sigma = ulps * ulp
    q = Posterior(jnp.full(N, mean), jnp.full(N, sigma**-2))
    sample, noise = sample_params(jax.random.key(1), q, jnp.zeros(N, dtype))
    shift = np.asarray(sample, np.float64) - float(np.float32(mean))
    noise = np.asarray(noise, np.float64)
    spread = np.sqrt(sigma**2 + ulp**2 / 4)
    assert abs(shift.mean()) < 5 * spread / np.sqrt(N)
    products = noise * shift / sigma**2
    assert abs(products.mean() - 1) < 5 * products.std() / np.sqrt(N)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_curvature_of_a_quadratic_is_found_when_noise_is_below_the_spacing(dtype, num_samples):
    # Rounded to nearest, h settles at 0.76 for bfloat16 at a quarter of the spacing.
    n, sigma = 1_000, float(jnp.finfo(dtype).eps) / 4
    settings = dict(ess=1 / sigma**2, hess_init=1.0, b2=0.999, weight_decay=0.0)
    tx = auto_sample(ivon(1e-9, **settings), 0, num_samples=num_samples)
    params = jnp.ones(n, dtype)

    @jax.jit
    def step(carry, _):
        params, state = carry
        grads = params - jnp.ones_like(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), state.inner_state.hess.mean()

    _, h = jax.lax.scan(step, (params, tx.init(params)), None, length=5_000 * num_samples)
    assert abs(np.mean(h[4_000 * num_samples :]) - 1) < 0.03


@pytest.mark.parametrize("dtype", NARROW)
def test_estimates_and_predictions_see_noise_below_the_spacing(dtype):
    n, sigma = 4_000, float(jnp.finfo(dtype).eps) / 4
    state = ivon(0.1, ess=1 / sigma**2, weight_decay=0.0).init(jnp.ones(n, dtype))
    params = jnp.ones(n, dtype)

    def loss(w):
        return 0.5 * jnp.sum((w.astype(jnp.float32) - 1) ** 2)

    _, _, hess = mc_value_and_grad(loss, num_samples=100)(jax.random.key(0), state, params=params)
    # For one element the standard error is about 15 %; for their mean 0.25 %.
    assert abs(np.mean(hess) - 1) < 0.03
    predict = predict_samples(lambda w, x: w.astype(jnp.float32) * x, num_samples=100)
    outputs = predict(jax.random.key(0), state, jnp.ones(n), params=params)
    assert abs(np.mean(outputs) - 1) < 5 * 4 * sigma / np.sqrt(100 * n)
    assert np.mean(np.std(outputs, axis=0)) > sigma


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_the_same_on_every_mesh_and_regenerable_from_the_key(dtype):
    params = {"w": jnp.ones((64, 512), dtype), "b": jnp.ones(16, dtype)}
    state = ivon(0.1, ess=1e6).init(params)
    expected = jax.jit(sample_params)(jax.random.key(5), state, params)
    mesh = jax.make_mesh((8,), ("x",))
    shardings = {"w": PartitionSpec("x"), "b": PartitionSpec()}

    def place(tree):
        return {k: jax.device_put(x, NamedSharding(mesh, shardings[k])) for k, x in tree.items()}

    trees = {field: place(getattr(state, field)) for field in ("mean", "hess", "momentum")}
    sharded = state._replace(**trees)
    for again in (
        jax.jit(sample_params)(jax.random.key(5), state, params),
        jax.jit(sample_params)(jax.random.key(5), sharded, place(params)),
    ):
        jax.tree.map(np.testing.assert_array_equal, expected, again)


@pytest.mark.parametrize("dtype", NARROW)
def test_derivatives_pass_as_through_rounding_to_nearest(dtype):
    params = jnp.ones(50, dtype)
    state = ivon(0.1, ess=1e4).init(params)

    def total(mean, wide):
        q = Posterior(mean, jnp.full(50, 1e4))
        sample, _ = sample_params(jax.random.key(0), q, None if wide else params)
        return jnp.sum(jnp.square(sample.astype(jnp.float32)))

    expected = jax.grad(total)(state.mean, True)
    np.testing.assert_allclose(jax.grad(total)(state.mean, False), expected, rtol=2**-6)
    batched = jax.vmap(jax.grad(total), (0, None))(jnp.stack([state.mean] * 2), False)
    np.testing.assert_allclose(batched[1], expected, rtol=2**-6)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_parameter_that_a_prior_fixes_stays_where_nearest_puts_it(dtype):
    fixed = Posterior(jnp.full(100, 1.003), jnp.full(100, jnp.inf))
    params, nearest = jnp.ones(100, dtype), jnp.asarray(1.003, dtype)
    for seed in range(5):
        sample, _ = sample_params(jax.random.key(seed), fixed, params)
        np.testing.assert_array_equal(sample, jnp.full_like(params, nearest))
    outputs = predict_samples(lambda w: w, 3)(jax.random.key(0), fixed, params=params)
    np.testing.assert_array_equal(outputs, jnp.full_like(outputs, nearest))


def test_leaves_that_no_word_can_count_round_independently_of_their_noise(monkeypatch):
    monkeypatch.setattr("ivon_jax._core.noise.COUNTED", 1000)
    mean, ulp = jnp.full(N, 1.3), float(jnp.finfo(jnp.bfloat16).eps)
    q = Posterior(mean, jnp.full(N, (ulp / 10) ** -2))
    sample, noise = sample_params(jax.random.key(1), q, jnp.zeros(N, jnp.bfloat16))
    products = np.asarray(noise * (sample.astype(jnp.float32) - mean), np.float64) / (ulp / 10) ** 2
    assert abs(products.mean() - 1) < 5 * products.std() / np.sqrt(N)


def test_the_mean_is_rounded_to_nearest():
    params = jnp.ones(100, jnp.bfloat16)
    q = Posterior(jnp.full(100, 1.0 + 1e-3), jnp.full(100, 1e6))
    out = predict_at_mean(lambda w: w)(q, params=params)
    np.testing.assert_array_equal(out, params)
    assert posterior_mean(q).dtype == jnp.float32
