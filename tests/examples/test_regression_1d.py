"""Regression in one dimension: every method against closed forms of a linear model, and a run."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package, reason='the examples need: pip install -e ".[examples]"')
pytest.importorskip("blackjax", reason='this example needs: pip install -e ".[hmc]"')

from benchmarks.evidence.uses import regression_1d_methods as methods
from benchmarks.evidence.uses.regression_1d_methods import NOISE, Problem
from benchmarks.evidence.uses.regression_1d_report import BAND, covered, measure
from ivon_jax import Moments, Posterior, ivon, with_mean

SETTINGS = {"learning_rate": 0.1, "hess_init": 50.0, "b2": 0.999}


def line(weights, x):
    return weights[0] + weights[1] * x


def few_points():
    rng = np.random.default_rng(0)
    x = np.array([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5])
    return x, 0.5 - x + NOISE * rng.normal(size=x.shape)


def exact_line():
    """Mean and covariance of the posterior of `line` under a standard Gaussian prior."""
    x, y = few_points()
    design = np.column_stack([np.ones_like(x), x])
    covariance = np.linalg.inv(design.T @ design / NOISE**2 + np.eye(2))
    return covariance @ design.T @ y / NOISE**2, covariance


def as_arrays(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def test_ivon_learns_the_posterior_of_a_line():
    x, y = as_arrays(*few_points())  # x is centred: the exact covariance is diagonal
    mean, covariance = exact_line()
    np.testing.assert_allclose(covariance[0, 1], 0.0, atol=1e-12)
    keys = jax.random.split(jax.random.key(0), 4)

    def train(key):
        return methods.train_ivon(line, x, y, 10_000, SETTINGS, jnp.zeros(2), key)

    states = jax.jit(jax.vmap(train))(keys)
    std = np.mean((states.ess[:, None] * (states.hess + states.weight_decay[:, None])) ** -0.5, 0)
    np.testing.assert_allclose(np.mean(states.mean, axis=0), mean, atol=0.1 * std.max())
    np.testing.assert_allclose(std, np.sqrt(np.diag(covariance)), rtol=0.08)


def test_adamw_without_decay_ends_at_least_squares():
    x, y = few_points()
    values = {"learning_rate": 0.01, "weight_decay": 0.0}
    data = as_arrays(x, y)
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw promotes dtypes implicitly
        train = jax.jit(lambda start: methods.train_adamw(line, *data, 5000, values, start))
        found = train(jnp.zeros(2))
    np.testing.assert_allclose(found, np.polyfit(x, y, 1)[::-1], atol=1e-4)


@pytest.mark.slow
def test_nuts_draws_from_the_posterior_of_a_line():
    mean, covariance = exact_line()
    inputs = np.array([-3.0, 0.0, 2.0])
    features = np.column_stack([np.ones(3), inputs])
    arguments = as_arrays(*few_points(), inputs)
    # blackjax promotes dtypes implicitly.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        chains = jax.jit(lambda starts, key: methods.run_nuts(line, *arguments, 500, starts, key))(
            jax.random.normal(jax.random.key(1), (4, 2)), jax.random.key(2)
        )
    assert chains.functions.shape == (4, 500, 3)
    assert chains.divergences == 0
    draws = chains.functions.reshape(-1, 3)
    std = np.sqrt(np.diag(features @ covariance @ features.T))
    assert np.max(np.abs(draws.mean(axis=0) - features @ mean) / std) < 0.15
    np.testing.assert_allclose(draws.std(axis=0), std, rtol=0.1)


def test_free_energy_of_a_line_in_closed_form():
    x, y = few_points()
    mean, std = np.array([0.3, -0.7]), np.array([0.2, 0.1])
    state = ivon(0.1, ess=len(x), weight_decay=1 / len(x)).init(jnp.zeros(2))
    hess = jnp.asarray(std**-2 / len(x) - 1 / len(x), jnp.float32)
    state = with_mean(state._replace(hess=hess), jnp.asarray(mean, jnp.float32))
    variance = std[0] ** 2 + std[1] ** 2 * x**2
    expected = np.sum((y - mean[0] - mean[1] * x) ** 2 + variance) / (2 * NOISE**2)
    q = scipy.stats.norm(mean, std)
    # KL(q‖N(0, 1)) = E_q[−log p] − H[q]
    expected += np.sum(0.5 * (np.log(2 * np.pi) + mean**2 + std**2) - q.entropy())
    found = methods.free_energy(line, *as_arrays(x, y), state, jax.random.key(0), 20_000)
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_kl_divergence_against_dense_matrices():
    q = Posterior({"a": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)}, None)
    q = q._replace(precision={"a": jnp.array([4.0, 0.5]), "b": jnp.array(2.0)})
    p = Posterior({"a": jnp.zeros(2), "b": jnp.ones(())}, None)
    p = p._replace(precision={"a": jnp.array([1.0, 3.0]), "b": jnp.array(0.7)})
    s, s0 = np.diag([0.25, 2.0, 0.5]), np.diag([1.0, 1 / 3, 1 / 0.7])
    d = np.array([1.0, 2.0, -0.5])
    inverse = np.linalg.inv(s0)
    expected = 0.5 * (np.trace(inverse @ s) + d @ inverse @ d - 3)
    expected += 0.5 * np.log(np.linalg.det(s0) / np.linalg.det(s))
    np.testing.assert_allclose(methods.kl_divergence(q, p), expected, rtol=1e-5)


def bayes_by_backprop(problem, start, steps, key):
    """The same objective by Adam on means and log standard deviations: not IVON's equations."""

    def free_energy(variational, key):
        mean, log_std = variational
        sample = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        loss = methods.loss_fn(methods.network, sample, problem.x, problem.y)
        kl = 0.5 * jnp.sum(jnp.exp(2 * log_std) + mean**2 - 1 - 2 * log_std)
        return len(problem.x) * loss + kl

    tx = optax.adam(lambda t: 0.01 * (1 - jnp.asarray(t, jnp.float32) / steps))

    def step(carry, key):
        variational, state = carry
        updates, state = tx.update(jax.grad(free_energy)(variational, key), state)
        return (optax.apply_updates(variational, updates), state), None

    variational = (start, jnp.full_like(start, -3.0))
    carry = (variational, tx.init(variational))
    (variational, _), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    energies = jax.vmap(free_energy, (None, 0))(variational, jax.random.split(key, 1000))
    return jnp.mean(energies)


@pytest.mark.slow
def test_ivon_reaches_the_free_energy_of_bayes_by_backprop():
    """What it leaves out in the gap is then left out by the diagonal Gaussian."""
    steps, seeds = 10_000, 4

    def both(key):
        data_key, start_key, key = jax.random.split(key, 3)
        problem, start = methods.draw_problem(data_key), methods.draw_weights(start_key)
        values = {"learning_rate": 0.1, "hess_init": 3.0, "b2": 0.999}
        data = (methods.network, problem.x, problem.y)
        state = methods.train_ivon(*data, steps, values, start, key)
        other = bayes_by_backprop(problem, start, steps, key)
        return methods.free_energy(*data, state, key), other

    with jax.numpy_dtype_promotion("standard"):  # optax.adam promotes dtypes implicitly
        found, other = jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(0), seeds))
    assert np.mean(found) < np.mean(other) + 1


def test_problems_are_what_the_docstrings_say():
    draw = jax.jit(methods.draw_problem)
    problems = Problem(*map(np.stack, zip(*map(draw, map(jax.random.key, range(20))), strict=True)))
    distance = np.abs(problems.x)
    assert np.all((distance >= 1) & (distance <= 2))
    np.testing.assert_array_equal(np.sum(problems.x > 0, axis=1), methods.NUM_TRAIN // 2)
    noise = np.std(problems.test_y - problems.test_f)
    np.testing.assert_allclose(noise, NOISE, rtol=0.05)
    masks = list(methods.regions(problems.test_x[0]).values())
    np.testing.assert_array_equal(np.sum(masks, axis=0), 1)


def test_the_mixture_has_the_moments_of_the_pooled_functions():
    functions = jnp.asarray(np.random.default_rng(0).normal(np.arange(5), 1, (3, 8, 5)))
    members = jax.vmap(methods.moments_of)(functions)
    for found, expected in zip(
        methods.mixture(members), methods.moments_of(functions.reshape(24, 5)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    pooled = methods.moments_of(functions.reshape(24, 5))
    np.testing.assert_allclose(pooled.variance - pooled.model_variance, NOISE**2, rtol=1e-4)


def test_measures_against_their_definitions():
    rng = np.random.default_rng(0)
    x = np.linspace(-3, 3, 50)
    f, noise, error = rng.normal(size=(3, 2, 50))
    mean, model = f + 0.3 * error, rng.uniform(0.05, 0.2, (2, 50))
    reference = Moments(f, np.full_like(f, 0.5), np.full_like(f, 0.49))
    moments = Moments(mean, model + NOISE**2, model)
    problems = Problem(x, x, np.stack([x, x]), f, f + NOISE * noise)
    where = np.abs(x) < 1
    found = measure(moments, reference, problems, where)
    density = scipy.stats.norm(mean, np.sqrt(model + NOISE**2)).logpdf(f + NOISE * noise)
    np.testing.assert_allclose(found["nll"], -density[:, where].mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["std"], np.sqrt(model)[:, where].mean(axis=1))
    distance = np.linalg.norm(0.3 * error[:, where], axis=1) / np.sqrt(where.sum())
    np.testing.assert_allclose(found["mean_distance"], distance)
    inside = np.abs(scipy.stats.norm.cdf(f, mean, np.sqrt(model)) - 0.5) <= 0.475
    np.testing.assert_allclose(found["coverage"], 100 * inside[:, where].mean(axis=1))
    np.testing.assert_allclose(measure(reference, reference, problems, where)["std_distance"], 0)


def test_a_calibrated_band_covers_95_percent():
    truth = np.random.default_rng(0).normal(size=100_000)
    np.testing.assert_allclose(covered(np.zeros_like(truth), np.ones(1), truth), 0.95, atol=0.003)
    np.testing.assert_allclose(scipy.stats.norm.cdf(BAND) - scipy.stats.norm.cdf(-BAND), 0.95, 1e-4)


def run(folder, *command):
    # The compiler's optimisations would take most of the time.
    environment = os.environ | {
        "PYTHONPATH": str(EXAMPLES),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_the_script_prints_a_table_and_writes_a_figure(tmp_path):
    settings = ("--seeds", 2, "--steps", 20, "--draws", 20)
    done = run(tmp_path, EXAMPLES / "regression_1d.py", *settings)
    assert done.returncode == 0, done.stderr
    for text in ("IVON", "AdamW", "NUTS", "R-hat", "std of f, gap", "NLL, gap", "f in 95 % band"):
        assert text in done.stdout
    assert (tmp_path / "regression_1d.png").stat().st_size > 10_000


def test_without_blackjax_there_is_one_clear_line(tmp_path):
    code = "import runpy, sys; sys.modules['blackjax'] = None; runpy.run_path(sys.argv[1])"
    done = run(tmp_path, "-c", code, EXAMPLES / "regression_1d.py")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert 'pip install -e ".[examples,hmc]"' in done.stderr
