"""Bayesian linear regression ends at the mean-field posterior, which has a closed form.

With noise of known variance s², ℓ̄ = mean((y − Xθ)²)/(2s²) and A = (λ/N)·XᵀX/s² + λ·diag(δ),
the optimum over diagonal Gaussians is m = A⁻¹(λ/N)Xᵀy/s² (ridge) and precision diag(A).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import auto_sample, ivon, mc_value_and_grad, posterior, sample_params

N, NOISE_SD = 60, 0.5
STEPS = 10_000
H_START = 100  # h is the running mean of ĥ, in which h₀ counts as this many steps

PRIORS = {
    "decayed": {"weight_decay": 0.2},
    "flat": {"weight_decay": 0.0},
    "masked": {"weight_decay": 0.2, "mask": {"w": True, "b": False}},
    "cold": {"weight_decay": 0.2, "ess": 3.0 * N},
}


def data(orthogonal=False):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, 4))
    if orthogonal:
        x = np.linalg.qr(np.column_stack([np.ones(N), x]))[0][:, 1:] * np.sqrt(N)
    else:
        x = x @ (np.eye(4) + 0.2 * rng.standard_normal((4, 4))) + 0.2
    return x, x @ np.array([1.0, -0.5, 0.0, 2.0]) + 0.7 + NOISE_SD * rng.standard_normal(N)


def loss(params, x, y):
    return 0.5 * jnp.mean((x @ params["w"] + params["b"] - y) ** 2) / NOISE_SD**2


def closed_form(x, y, *, weight_decay, mask=None, ess=N):
    """m and A in the order b, w (that of the sorted tree)."""
    design = np.column_stack([np.ones(N), x])
    flags = np.ones(5) if mask is None else np.array([mask["b"], *[mask["w"]] * 4], float)
    a = ess / N * design.T @ design / NOISE_SD**2 + ess * weight_decay * np.diag(flags)
    return np.linalg.solve(a, ess / N * design.T @ y / NOISE_SD**2), a


def optimizer(learning_rate, **settings):
    """IVON whose h is the running mean of ĥ: 1−β₂ = 1/(t + H_START)."""
    settings = {"ess": float(N), "hess_init": 2.0, "rescale_lr": False} | settings
    factory = optax.inject_hyperparams(ivon, ("mask",), hyperparam_dtype=jnp.float32)
    decay = lambda t: 1 - 1 / (jnp.asarray(t, jnp.float32) + H_START)  # noqa: E731
    return factory(learning_rate, b2=decay, **settings)


def scanned(step, tx, steps=STEPS):
    params = {"b": jnp.zeros(()), "w": jnp.zeros(4)}
    keys = jax.random.split(jax.random.key(0), steps)
    run = jax.jit(lambda c, k: jax.lax.scan(lambda c, k: (step(k, *c), None), c, k)[0])
    return posterior(run((params, tx.init(params)), keys)[1])


def flat(tree):
    return np.concatenate([np.ravel(tree["b"]), tree["w"]]).astype(np.float64)


def variance_of_estimate(a, m, delta, ess, estimator):
    """Var ĥ of one sample at the optimum, ĝ = Hn − δm: E ε⁴ = 3, everything else E ε² = 1."""
    hess = a / ess - np.diag(delta)
    if estimator == "hutchinson":
        return np.sum(hess**2, axis=1) - np.diag(hess) ** 2
    p = np.diag(a)
    b = hess * np.sqrt(p[:, None] / p[None, :])
    return np.sum(b**2, axis=1) + np.diag(b) ** 2 + p * (delta * m) ** 2


def assert_mean_field(q, x, y, prior, estimator, samples, mean_sd, steps=STEPS):
    """Means within `mean_sd` posterior standard deviations, precisions within 5 standard errors.

    `samples` is the number of independent products n⊙ĝ per step. h₀, which counts as 100 steps
    among 10000, adds |h₀−h|/100 to the bound.
    """
    m, a = closed_form(x, y, **prior)
    ess = prior.get("ess", N)
    delta = np.diag(a) / ess - np.mean(np.column_stack([np.ones(N), x]) ** 2, 0) / NOISE_SD**2
    sd = 1 / np.sqrt(np.diag(a))
    assert np.max(np.abs(flat(q.mean) - m) / sd) < mean_sd
    variance = variance_of_estimate(a, m, delta, ess, estimator)
    bound = 5 * np.sqrt(variance / (samples * steps))
    bound += np.abs(2.0 - np.diag(a) / ess + delta) * H_START / steps
    error = np.abs(flat(q.precision) - np.diag(a)) / ess
    assert np.all(error < bound), (error, bound)
    assert np.all(bound < 0.15 * np.diag(a) / ess), "a bound that tells a posterior from another"


@pytest.mark.parametrize(
    ("estimator", "prior"),
    [*(("reparam", p) for p in PRIORS), ("hutchinson", "decayed"), ("hutchinson", "masked")],
)
def test_mc_value_and_grad_reaches_the_closed_form(estimator, prior):
    """Antithetic pairs give the exact gradient of a quadratic: m has only float32 rounding."""
    x, y = data()
    tx = optimizer(0.2, **PRIORS[prior])
    f = mc_value_and_grad(
        loss, num_samples=8, sample_batch_size=8, antithetic=True, estimator=estimator
    )

    def step(key, params, state):
        _, grads, hess = f(key, state, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
        updates, state = tx.update(grads, state, params, hess=hess)
        return optax.apply_updates(params, updates), state

    # A pair has one product n⊙Hn; the probes of hutchinson are independent.
    samples = 4 if estimator == "reparam" else 8
    assert_mean_field(scanned(step, tx), x, y, PRIORS[prior], estimator, samples, mean_sd=1e-3)


def averaging(t):
    """Newton steps of size ~3/t average the noise of single gradients."""
    return 3 / (jnp.asarray(t, jnp.float32) + 30)


# With α = 3/t the noise D⁻¹Hn leaves, in an eigendirection of D⁻¹A with value μ, the variance
# 9μ²/(6μ−1)/T in units of the posterior's: at most 2.8/T for 0.4 < μ < 1.7, a standard deviation
# of 0.017 at T = 10000.
AVERAGED_SD = 5 * 0.017


@pytest.mark.parametrize("prior", ["flat", "masked", "cold"])
def test_auto_sample_reaches_the_closed_form(prior):
    x, y = data()
    tx = auto_sample(optimizer(averaging, **PRIORS[prior]), key=1)

    def step(_, params, state):
        grads = jax.grad(loss)(params, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    assert_mean_field(scanned(step, tx), x, y, PRIORS[prior], "reparam", 1, AVERAGED_SD)


@pytest.mark.parametrize("samples", [None, 4])
def test_explicit_samples_reach_the_closed_form(samples):
    x, y = data()
    tx = optimizer(averaging, **PRIORS["masked"])
    args = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def step(key, params, state):
        if samples is None:
            sample, noise = sample_params(key, state)
            grads = jax.grad(loss)(sample, *args)
        else:
            keys = jax.random.split(key, samples)
            sample, noise = jax.vmap(sample_params, (0, None))(keys, state)
            grads = jax.vmap(jax.grad(loss), (0, None, None))(sample, *args)
        updates, state = tx.update(grads, state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    q = scanned(step, tx)
    assert_mean_field(q, x, y, PRIORS["masked"], "reparam", samples or 1, AVERAGED_SD)


@pytest.mark.parametrize("prior", ["decayed", "flat"])
def test_on_an_orthogonal_design_hutchinson_has_no_noise_and_the_posterior_is_exact(prior):
    """The Hessian is diagonal, every probe returns it: β₂ < 1 constant, no averaging needed."""
    x, y = data(orthogonal=True)
    tx = ivon(0.2, N, hess_init=2.0, b2=0.98, **PRIORS[prior])
    f = mc_value_and_grad(loss, num_samples=2, antithetic=True, estimator="hutchinson")

    def step(key, params, state):
        _, grads, hess = f(key, state, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
        updates, state = tx.update(grads, state, params, hess=hess)
        return optax.apply_updates(params, updates), state

    q = scanned(step, tx, steps=1000)
    m, a = closed_form(x, y, **PRIORS[prior])
    np.testing.assert_allclose(a, np.diag(np.diag(a)), atol=1e-9)
    # 0.98^1000 = 2e-9 of h₀ is left: float32 rounding of a sum over 60 examples remains.
    np.testing.assert_allclose(flat(q.precision), np.diag(a), rtol=1e-5)
    np.testing.assert_allclose(flat(q.mean), m, rtol=0, atol=1e-5)
