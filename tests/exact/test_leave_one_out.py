"""Sensitivity and leave-one-out estimates against models that were really trained without.

Ridge regression with an orthogonal design has a diagonal posterior, for which both are exact; for
logistic regression on real data they are correlated with Newton's method run to convergence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import Posterior, ivon, leave_one_out, posterior, sample_params, sensitivity

NOISE_VARIANCE, PRIOR_PRECISION = 0.3, 0.7


def squared_error(f, y):
    return 0.5 * (f - y) ** 2 / NOISE_VARIANCE


def ridge(x, y):
    """Mean and precision matrix of the exact posterior."""
    a = x.T @ x / NOISE_VARIANCE + PRIOR_PRECISION * np.eye(x.shape[1])
    return np.linalg.solve(a, x.T @ y / NOISE_VARIANCE), a


def orthogonal_problem(n=12, k=4):
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.standard_normal((n, k)))[0] * np.array([1.0, 2.0, 3.0, 0.5])
    return x, x @ rng.standard_normal(k) + rng.standard_normal(n)


def without(x, y, i):
    return ridge(np.delete(x, i, 0), np.delete(y, i))[0]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_leave_one_out_of_ridge_regression_is_exact(diagonal, temperature):
    """After training with λ = N/temperature the posterior is wider: `temperature=λ/N` undoes it."""
    x, y = orthogonal_problem()
    m, a = ridge(x, y)
    exact = np.array([x[i] @ without(x, y, i) for i in range(len(x))])
    with jax.enable_x64(True):
        trained = Posterior(jnp.asarray(m), jnp.asarray(np.diag(a)) / temperature)
        q = posterior(trained, temperature=1 / temperature)
        f = leave_one_out(
            lambda w, x: x @ w,
            squared_error,
            second_order=True,
            diagonal=diagonal,
            data_batch_size=5,
        )
        got = f(q, jnp.asarray(x), targets=jnp.asarray(y))
        np.testing.assert_allclose(got.output, exact, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got.loss, squared_error(exact, y), rtol=1e-11)


def test_sensitivity_of_ridge_regression_is_exact_up_to_the_leverage():
    """v e (1 − v/s²)⁻¹ is the true change of the prediction; the score is its first order."""
    x, y = orthogonal_problem()
    m, a = ridge(x, y)
    change = np.array([x[i] @ (without(x, y, i) - m) for i in range(len(x))])
    with jax.enable_x64(True):
        q = Posterior(jnp.asarray(m), jnp.asarray(np.diag(a)))
        got = sensitivity(lambda w, x: x @ w, squared_error)(
            q, jnp.asarray(x), targets=jnp.asarray(y)
        )
        got = jax.tree.map(np.asarray, got)
    leverage = got.variance / NOISE_VARIANCE
    np.testing.assert_allclose(got.variance, np.sum(x**2 / np.diag(a), -1), rtol=1e-12)
    np.testing.assert_allclose(got.error, (x @ m - y) / NOISE_VARIANCE, rtol=1e-10)
    np.testing.assert_allclose(got.deviation / (1 - leverage), change, rtol=1e-10)
    np.testing.assert_allclose(got.score, np.abs(got.deviation), rtol=1e-12)


def test_several_outputs_are_exact_too():
    """Two outputs with a full 2×2 covariance: the weights of a shared basis are orthogonal."""
    x, y = orthogonal_problem(n=10)
    mix = np.array([[1.0, 0.6], [-0.4, 1.2]])  # f = (x·w₀, x·w₁) mix
    design = np.einsum("nk,oj->nojk", x, mix.T)  # n, output, basis, feature
    targets = np.stack([y, y[::-1]], -1)
    flat = design.reshape(len(x) * 2, -1)
    m, a = ridge(flat, targets.ravel())
    # V is diagonal only if mix is orthogonal, so the full posterior enters through its square root.
    root = np.linalg.cholesky(np.linalg.inv(a))
    apply = lambda z, d: jnp.einsum("nop,p->no", d, jnp.asarray(root) @ z)  # noqa: E731
    loss = lambda f, y: jnp.sum(squared_error(f, y))  # noqa: E731
    with jax.enable_x64(True):
        q = Posterior(jnp.asarray(np.linalg.solve(root, m)), jnp.ones(len(m)))
        d = design.reshape(len(x), 2, -1)
        got = leave_one_out(apply, loss, second_order=True)(
            q, jnp.asarray(d), targets=jnp.asarray(targets)
        )
        for i in range(len(x)):
            rest = np.delete(d, i, 0).reshape(-1, len(m)), np.delete(targets, i, 0).ravel()
            np.testing.assert_allclose(got.output[i], d[i] @ ridge(*rest)[0], rtol=1e-9)


def test_an_estimate_without_a_proper_posterior_is_nan():
    """v/s² ≥ 1: the example alone has more information than the posterior."""
    q = Posterior(jnp.ones(1), jnp.array([1.0]))
    f = leave_one_out(lambda w, x: x @ w, lambda f, y: (f - y) ** 2, second_order=True)
    assert np.isnan(f(q, jnp.ones((1, 1)), targets=jnp.zeros(1)).output).all()
    first = leave_one_out(lambda w, x: x @ w, lambda f, y: (f - y) ** 2)
    np.testing.assert_allclose(first(q, jnp.ones((1, 1)), targets=jnp.zeros(1)).output, [3.0])


@functools.cache
def tumours():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0))[:120]
    left, _, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    x = left[:, :4] * np.sqrt(120)  # whitened principal components: nearly a diagonal posterior
    return np.column_stack([np.ones(120), x]), y[:120]


def newton(x, y):
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + PRIOR_PRECISION * np.eye(len(w))
        w -= np.linalg.solve(hessian, x.T @ (p - y) + PRIOR_PRECISION * w)
    return w


@pytest.fixture(scope="module")
def trained_logistic():
    """IVON's posterior, and the change of each logit when its example is left out."""
    x, y = tumours()
    n = len(x)
    data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def loss(w):
        return jnp.mean(optax.sigmoid_binary_cross_entropy(data[0] @ w, data[1]))

    schedule = lambda t: 0.3 * (1 - t.astype(jnp.float32) / 3000)  # noqa: E731
    tx = ivon(schedule, ess=n, hess_init=0.1, b2=0.999, weight_decay=PRIOR_PRECISION / n)

    def step(state, key):
        sample, noise = sample_params(key, state)
        return tx.update(jax.grad(loss)(sample), state, noise=noise)[1], None

    keys = jax.random.split(jax.random.key(0), 3000)
    state, _ = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(tx.init(jnp.zeros(5)), keys)
    full = newton(x, y)
    change = [x[i] @ (newton(np.delete(x, i, 0), np.delete(y, i)) - full) for i in range(n)]
    return posterior(state), np.array(change)


def apply(w, x):
    return x @ w


def test_sensitivity_to_real_data_correlates_with_retraining(trained_logistic):
    q, change = trained_logistic
    x, y = (jnp.asarray(z, jnp.float32) for z in tumours())
    got = sensitivity(apply, optax.sigmoid_binary_cross_entropy, data_batch_size=40)(
        q, x, targets=y
    )
    assert np.corrcoef(got.deviation, change)[0, 1] > 0.9
    assert np.corrcoef(got.score, np.abs(change))[0, 1] > 0.9


@pytest.mark.parametrize("second_order", [False, True])
def test_leave_one_out_of_real_data_is_near_retraining(second_order, trained_logistic):
    """The estimate of the NLL lies much closer to the true one than the training NLL does."""
    q, change = trained_logistic
    x, y = (jnp.asarray(z, jnp.float32) for z in tumours())
    f = leave_one_out(apply, optax.sigmoid_binary_cross_entropy, second_order=second_order)
    got = f(q, x, targets=y)
    at_mean = np.asarray(optax.sigmoid_binary_cross_entropy(x @ q.mean, y))
    logits = np.asarray(tumours()[0] @ newton(*tumours())) + change
    true = np.mean(np.asarray(optax.sigmoid_binary_cross_entropy(jnp.asarray(logits), y)))
    assert abs(float(got.loss.mean()) - true) < 0.35 * (true - at_mean.mean())
    assert np.corrcoef(got.output - x @ q.mean, change)[0, 1] > 0.9
