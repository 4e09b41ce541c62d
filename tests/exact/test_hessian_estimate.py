"""E[ĥ] is the Hessian diagonal: exactly on a quadratic, under q elsewhere (by quadrature)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import ivon, mc_value_and_grad, posterior, sample_params

Z = 4.5  # two-sided probability 7e-6 per component; the keys are fixed

HESSIAN = np.array([[2.0, 0.8, -0.3], [0.8, 1.0, 0.4], [-0.3, 0.4, 3.0]])
CENTRE = np.array([0.7, -0.2, 1.1])
INPUTS = np.random.default_rng(0).standard_normal((5, 3)) * np.array([1.0, 2.0, 0.5])


def wide_state():
    """A posterior of two leaves with different h, not at any optimum, σ between 0.4 and 0.9."""
    params = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(0.8)}
    state = ivon(0.1, ess=2.0, weight_decay=0.125).init(params)
    return state._replace(hess={"a": jnp.array([0.5, 2.0]), "b": jnp.array(1.0)})


def joined(params):
    return jnp.append(params["a"], params["b"])


def flat(tree):
    """Leading axes kept, parameters last."""
    a, b = np.asarray(tree["a"], np.float64), np.asarray(tree["b"], np.float64)
    return np.concatenate([a, b[..., None]], axis=-1)


def quadratic(params):
    r = joined(params) - jnp.asarray(CENTRE, jnp.float32)
    return 0.5 * r @ jnp.asarray(HESSIAN, jnp.float32) @ r


def logistic(params):
    return jnp.mean(jax.nn.softplus(-(jnp.asarray(INPUTS, jnp.float32) @ joined(params))))


def separable(params):
    return jnp.sum(jnp.log(jnp.cosh(joined(params))) * jnp.arange(1.0, 4.0))


def quadratic_moments(mean, variance):
    """E_q of loss, gradient and Hessian diagonal."""
    r = mean - CENTRE
    value = 0.5 * r @ HESSIAN @ r + 0.5 * np.diag(HESSIAN) @ variance
    return value, HESSIAN @ r, np.diag(HESSIAN)


def logistic_moments(mean, variance, nodes=80):
    """The predictor xᵀθ is a one-dimensional Gaussian: Gauss–Hermite, good to 1e-6."""
    t, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / np.sqrt(2 * np.pi)
    z = (INPUTS @ mean)[:, None] + np.sqrt(INPUTS**2 @ variance)[:, None] * t
    p = 1 / (1 + np.exp(z))
    n = len(INPUTS)
    value = np.sum(w * np.logaddexp(0, -z)) / n
    return value, (w * -p).sum(1) @ INPUTS / n, (w * p * (1 - p)).sum(1) @ INPUTS**2 / n


LOSSES = {"quadratic": (quadratic, quadratic_moments), "logistic": (logistic, logistic_moments)}


def replicates(f, state, number, seed=0):
    """Independent repetitions of an estimate, from which its standard error is taken."""
    keys = jax.random.split(jax.random.key(seed), number)
    return jax.jit(jax.vmap(f, (0, None)))(keys, state)


def assert_unbiased(estimates, expected, relative_se):
    """Within Z standard errors, which must be small enough for the test to mean something."""
    estimates = np.asarray(estimates, np.float64)
    se = estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))
    z = (estimates.mean(axis=0) - expected) / se
    assert np.all(np.abs(z) < Z), z
    assert np.all(se < relative_se * np.abs(expected)), se / np.abs(expected)


@pytest.mark.parametrize("options", [{}, {"antithetic": True, "sample_batch_size": 24}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_reparam_gives_value_gradient_and_hessian_diagonal_under_q(loss, options):
    fun, moments = LOSSES[loss]
    state = wide_state()
    q = posterior(state)
    value, grads, hess = replicates(mc_value_and_grad(fun, num_samples=64, **options), state, 4000)
    expected = moments(flat(q.mean), 1 / flat(q.precision))
    assert_unbiased(value, expected[0], relative_se=0.01)
    if loss == "quadratic" and options.get("antithetic"):
        # The noise cancels in each pair: the exact gradient, to float32 rounding.
        np.testing.assert_allclose(flat(grads), np.tile(expected[1], (4000, 1)), atol=1e-5)
    else:
        assert_unbiased(flat(grads), expected[1], relative_se=0.01)
    assert_unbiased(flat(hess), expected[2], relative_se=0.03)


def test_under_q_is_not_at_the_mean():
    """The quadrature reference of the logistic loss is far from the Hessian at the mean."""
    q = posterior(wide_state())
    _, _, under_q = logistic_moments(flat(q.mean), 1 / flat(q.precision))
    _, _, at_mean = logistic_moments(flat(q.mean), 1e-12 / flat(q.precision))
    # Three times the standard errors that are asked for above.
    assert np.all(np.abs(under_q / at_mean - 1) > 0.09)


@pytest.mark.parametrize(("loss", "antithetic"), [("quadratic", False), ("logistic", True)])
def test_hutchinson_is_unbiased_for_the_hessian_diagonal_at_the_mean(loss, antithetic):
    fun, moments = LOSSES[loss]
    state = wide_state()
    f = mc_value_and_grad(
        fun, 4, antithetic=antithetic, estimator="hutchinson", sample_batch_size=4
    )
    _, _, hess = replicates(f, state, 10_000)
    mean = flat(posterior(state).mean)
    assert_unbiased(flat(hess), moments(mean, 0 * mean)[2], relative_se=0.01)


def test_hutchinson_probes_of_antithetic_pairs_are_independent():
    """With u and −u the pair would repeat one product; independent probes halve the variance."""
    state = wide_state()

    def variance(samples):
        f = mc_value_and_grad(quadratic, samples, antithetic=True, estimator="hutchinson")
        return flat(replicates(f, state, 20_000)[2]).var(axis=0)

    expected = np.sum(HESSIAN**2, axis=1) - np.diag(HESSIAN) ** 2
    # The relative standard error of a variance from 20000 bounded draws is below 1.5 %.
    np.testing.assert_allclose(variance(2), expected / 2, rtol=0.06)


def test_hutchinson_is_exact_for_every_probe_where_the_hessian_is_diagonal():
    state = wide_state()
    f = mc_value_and_grad(separable, estimator="hutchinson")
    _, _, hess = replicates(f, state, 20)
    mean = flat(posterior(state).mean)
    expected = np.arange(1.0, 4.0) / np.cosh(mean) ** 2
    np.testing.assert_allclose(flat(hess), np.tile(expected, (20, 1)), rtol=1e-5)


@pytest.mark.parametrize(("samples", "split_batch", "scale"), [(1, False, 16.0), (4, True, 4.0)])
def test_gradsq_times_the_batch_size_is_the_fisher_diagonal_of_a_well_specified_model(
    samples, split_batch, scale
):
    """Labels drawn from the model itself, q narrow at the truth: E[B ĝ²] = mean p(1−p)x²."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((16, 3)), jnp.float32)
    truth = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(0.8)}
    # σ = 1e-6: the posterior's own spread adds a relative 1e-10.
    state = ivon(0.1, ess=1e12).init(truth)

    def loss(params, x, y):
        z = x @ joined(params)
        return jnp.mean(jax.nn.softplus(z) - y * z)

    f = mc_value_and_grad(
        loss,
        num_samples=samples,
        split_batch=split_batch,
        estimator="gradsq",
        estimator_scale=scale,
        sample_batch_size=samples,
    )

    def replicate(key, state):
        key_y, key = jax.random.split(key)
        y = jax.random.bernoulli(key_y, jax.nn.sigmoid(x @ joined(truth))).astype(jnp.float32)
        return f(key, state, x, y)

    _, _, hess = replicates(replicate, state, 40_000)
    p = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ flat(truth)))
    fisher = np.mean((p * (1 - p))[:, None] * np.asarray(x, np.float64) ** 2, axis=0)
    assert_unbiased(flat(hess), fisher, relative_se=0.01)


def test_update_averages_products_and_does_not_multiply_averages():
    """ĥ read back from one step: with p = h+δ and x = (1−β₂)(ĥ−h)/p, h_new − h = p(x + x²/2)."""
    samples, b2, delta = 200_000, 0.5, 0.125
    state = wide_state()
    q = posterior(state)
    keys = jax.random.split(jax.random.key(2), samples)
    points, noise = jax.jit(jax.vmap(sample_params, (0, None)))(keys, state)
    grads = jax.jit(jax.vmap(jax.grad(logistic)))(points)
    tx = ivon(0.1, ess=2.0, weight_decay=delta, b2=b2)
    _, new = tx.update(grads, state, noise=noise)
    h = flat(state.hess)
    x = -1 + np.sqrt(1 + 2 * (flat(new.hess) - h) / (h + delta))
    hess = h + x * (h + delta) / (1 - b2)

    precision = flat(q.precision)
    expected = logistic_moments(flat(q.mean), 1 / precision)[2]
    se = (precision * flat(noise) * flat(grads)).std(axis=0) / np.sqrt(samples)
    assert np.all(np.abs(hess - expected) < Z * se + 1e-5)  # float32 rounding of the sum
    assert np.all(se < 0.03 * expected)
    # The defect of another implementation: zero in expectation.
    product_of_means = precision * flat(noise).mean(axis=0) * flat(grads).mean(axis=0)
    assert np.all(np.abs(product_of_means) < 0.1 * expected)
