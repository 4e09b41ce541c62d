"""Stochastic variational inference with numpyro's `optax_to_numpyro`, whose loss is a sum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import auto_sample, ivon, posterior

numpyro = pytest.importorskip("numpyro")

N, NOISE, PRIOR = 200, 0.5, 2.0
STEPS = 6000

X = np.random.default_rng(0).standard_normal(N).astype(np.float32)
Y = (1.5 * X + NOISE * np.random.default_rng(1).standard_normal(N)).astype(np.float32)


def rate(peak):
    return optax.cosine_decay_schedule(peak, STEPS)


def model(x, y):
    slope = numpyro.sample("slope", numpyro.distributions.Normal(0.0, PRIOR))
    numpyro.sample("y", numpyro.distributions.Normal(slope * x, NOISE), obs=y)


def test_a_summed_loss_is_scaled_by_the_number_of_its_terms():
    """The exact posterior of the slope: precision Σx²/s² + 1/2², which the loss contains whole."""
    settings = {"ess": N, "hess_init": 4.0, "b2": 0.999, "weight_decay": 0.0}
    tx = auto_sample(optax.chain(optax.scale(1 / N), ivon(rate(0.1), **settings)), key=0)
    optimizer = numpyro.optim.optax_to_numpyro(tx)
    guide = numpyro.infer.autoguide.AutoDelta(model)
    svi = numpyro.infer.SVI(model, guide, optimizer, numpyro.infer.Trace_ELBO())
    state = svi.init(jax.random.key(0), X, Y)

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: svi.update(s, X, Y), state, length=STEPS)[0]

    q = posterior(run(state).optim_state)
    precision = np.sum(X**2) / NOISE**2 + 1 / PRIOR**2
    np.testing.assert_allclose(q.precision["slope_auto_loc"], precision, rtol=0.1)
    mean = np.sum(X * Y) / NOISE**2 / precision
    np.testing.assert_allclose(q.mean["slope_auto_loc"], mean, atol=0.2 * precision**-0.5)


def test_without_the_scale_the_posterior_is_too_narrow_by_the_root_of_n():
    """λ counts each term again. (And α is a rate for means: N times as large, it diverges.)"""
    settings = {"ess": N, "hess_init": 800.0, "b2": 0.999, "weight_decay": 0.0}
    tx = auto_sample(ivon(rate(0.1 / N), **settings), key=0)
    summed = lambda w: 0.5 * jnp.sum((w * X - Y) ** 2) / NOISE**2  # noqa: E731

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(summed)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.float32(np.sum(X * Y) / np.sum(X**2))  # where it ends
    (_, state), _ = jax.lax.scan(step, (w, tx.init(w)), length=STEPS)
    exact = np.sum(X**2) / NOISE**2
    np.testing.assert_allclose(posterior(state).precision / exact, N, rtol=0.2)
