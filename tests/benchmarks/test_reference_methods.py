"""The methods that IVON is compared with, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks.evidence.images.methods import draw_swag, swag_of
from benchmarks.evidence.uses import continual
from benchmarks.evidence.uses.fisher import diagonal_fisher
from ivon_jax import Posterior


def test_the_fisher_information_of_softmax_regression_is_its_closed_form():
    """For logits Wᵀx the diagonal is mean_n p_k(1 − p_k) x_j²."""
    weights = jax.random.normal(jax.random.key(0), (4, 3))
    x = jax.random.normal(jax.random.key(1), (50, 4))
    p = np.asarray(jax.nn.softmax(x @ weights))
    expected = np.einsum("nj,nk->jk", np.asarray(x) ** 2, p * (1 - p)) / len(x)
    fisher = diagonal_fisher(lambda w, x: x @ w, weights, x)
    np.testing.assert_allclose(fisher, expected, rtol=1e-4)


def test_swag_draws_have_the_mean_and_the_covariance_of_its_formula():
    """Half the diagonal variance, and half the sample covariance of the deviations."""
    snapshots = {"w": jax.random.normal(jax.random.key(2), (6, 3)) * jnp.array([1.0, 2.0, 0.5])}
    q = swag_of(snapshots)
    w = np.asarray(snapshots["w"])
    np.testing.assert_allclose(q.mean["w"], w.mean(0), atol=1e-6)
    np.testing.assert_allclose(q.variance["w"], w.var(0), atol=1e-5)
    deviations = w - np.cumsum(w, 0) / np.arange(1, 7)[:, None]
    np.testing.assert_allclose(q.deviations["w"], deviations, atol=1e-5)
    keys = jax.random.split(jax.random.key(3), 40_000)
    draws = np.asarray(jax.vmap(lambda key: draw_swag(key, q)["w"])(keys))
    covariance = np.diag(w.var(0)) / 2 + deviations.T @ deviations / (2 * 5)
    # Five standard errors of a mean and of a sample covariance.
    scale = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(draws.mean(0) - w.mean(0)) < 5 * scale / np.sqrt(len(draws)))
    error = np.sqrt(2 / len(draws)) * np.outer(scale, scale)
    assert np.all(np.abs(np.cov(draws.T) - covariance) < 5 * error)


def test_consolidation_adds_every_task_to_the_precision_and_is_held_by_it(monkeypatch):
    class Linear:
        @staticmethod
        def apply(weights, x):
            return x @ weights

    monkeypatch.setattr(continual, "NETWORK", Linear)
    n = continual.BATCH_SIZE
    x = jax.random.normal(jax.random.key(4), (n, 4))
    data = x, jnp.zeros(n, jnp.int32)
    start = jnp.zeros((4, 3))
    setting = continual.Consolidation(0.1, strength=2.0)

    def learn(precision):
        prior = Posterior(start, jnp.full_like(start, precision))
        return continual.learn(setting, 20, jax.random.key(5), data, start, prior)

    params, after = learn(1.0)
    fisher = diagonal_fisher(Linear.apply, params, x)
    np.testing.assert_allclose(after.precision, 1.0 + 2.0 * n * fisher, rtol=1e-4)
    np.testing.assert_array_equal(after.mean, params)
    held, _ = learn(1e6)
    assert np.max(np.abs(held)) < 0.05 < np.max(np.abs(params))
