"""The logistic regression with two weights: exact answers against brute force, and a run."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

pytest.importorskip("sklearn", reason='the examples need: pip install -e ".[examples]"')
pytest.importorskip("matplotlib", reason='the examples need: pip install -e ".[examples]"')

from benchmarks.evidence.uses import logistic_2d
from benchmarks.evidence.uses.logistic_2d_exact import (
    PRIOR_PRECISION,
    Diagonal,
    energy,
    exact_posterior,
    free_energy,
    laplace,
    optimal_diagonal,
)

SIGNED = logistic_2d.flowers()
GRID = exact_posterior(SIGNED)


def log_joint(w1, w2):
    """By SciPy's distributions, independently of `energy`."""
    w = np.array([w1, w2])
    prior = scipy.stats.norm(0, PRIOR_PRECISION**-0.5).logpdf(w).sum()
    return prior + scipy.stats.logistic.logcdf(SIGNED @ w).sum()


def test_flowers_are_standardised_and_signed():
    assert SIGNED.shape == (20, 2)
    # A sign flips no square: the mean square of a standardised feature is 1.
    np.testing.assert_allclose(np.mean(SIGNED**2, axis=0), 1.0)
    # Both petals are larger in virginica, which has the label +1.
    assert np.all(SIGNED.mean(axis=0) > 0)


def test_energy_is_minus_the_log_joint_density():
    for w in ([0.0, 0.0], [3.0, -1.0], [-20.0, 15.0]):
        np.testing.assert_allclose(energy(np.array(w), SIGNED), -log_joint(*w))


def test_the_grid_agrees_with_adaptive_quadrature():

    def moment(power):
        def integrand(w2, w1):
            w = np.array([w1, w2])
            return w1**power * np.exp(-energy(w, SIGNED) - GRID.log_evidence)

        return scipy.integrate.dblquad(integrand, -8, 20, -8, 20, epsabs=1e-5, epsrel=1e-5)[0]

    one, mean, square = moment(0), moment(1), moment(2)
    np.testing.assert_allclose(one, 1.0, rtol=1e-4)
    np.testing.assert_allclose(GRID.mean[0], mean, rtol=1e-4)
    np.testing.assert_allclose(GRID.std[0], np.sqrt(square - mean**2), rtol=1e-4)
    # Nothing is cut off.
    edges = np.concatenate([GRID.density[[0, -1]].ravel(), GRID.density[:, [0, -1]].ravel()])
    assert edges.max() < 1e-6 * GRID.density.max()


def kl_on_the_grid(q):
    area = (GRID.ticks[0][1] - GRID.ticks[0][0]) ** 2
    marginals = [scipy.stats.norm(m, s).pdf(t) for m, s, t in zip(*q, GRID.ticks, strict=True)]
    density = np.outer(*marginals)
    return np.sum(np.where(density > 0, density * np.log(density / GRID.density), 0)) * area


@pytest.mark.parametrize("q", [([3.0, 3.0], [1.0, 2.0]), ([4.0, 1.0], [0.5, 1.5])])
def test_free_energy_is_the_divergence_up_to_the_evidence(q):
    q = Diagonal(*map(np.array, q))
    value, _ = free_energy(q, SIGNED)
    expected = kl_on_the_grid(q)
    np.testing.assert_allclose(value + GRID.log_evidence, expected, rtol=1e-5)


def test_the_gradient_of_the_free_energy_by_finite_differences():
    theta = np.array([3.0, -1.0, 0.3, -0.5])

    def value(theta):
        return free_energy(Diagonal(theta[:2], np.exp(theta[2:])), SIGNED)

    steps = 1e-5 * np.eye(4)
    expected = [(value(theta + e)[0] - value(theta - e)[0]) / 2e-5 for e in steps]
    np.testing.assert_allclose(value(theta)[1], expected, rtol=1e-4)


def test_the_best_diagonal_gaussian_is_below_its_neighbours():
    best = optimal_diagonal(SIGNED)
    lowest, gradient = free_energy(best, SIGNED)
    assert np.max(np.abs(gradient)) < 1e-6
    for e in 0.05 * np.concatenate([np.eye(4), -np.eye(4)]):
        moved = Diagonal(best.mean + e[:2], best.std * np.exp(e[2:]))
        assert kl_on_the_grid(moved) > kl_on_the_grid(best)
    assert lowest < free_energy(laplace(SIGNED), SIGNED)[0]


def test_laplace_is_the_mode_and_the_curvature_there():
    mode, std = laplace(SIGNED)
    step = 1e-3
    for axis in np.eye(2):
        up, here, down = (-log_joint(*(mode + k * step * axis)) for k in (1, 0, -1))
        assert abs(up - down) / (2 * step) < 1e-5
        np.testing.assert_allclose((up - 2 * here + down) / step**2, 1 / (axis @ std) ** 2, 1e-4)


def run(train, values, steps, seeds=6):
    keys = jax.random.split(jax.random.key(0), seeds)
    data = jnp.asarray(SIGNED, jnp.float32)
    return jax.device_get(jax.jit(jax.vmap(lambda key: train(data, steps, values, key)))(keys))


def test_ivon_ends_at_the_best_diagonal_gaussian():
    mean, std = (x[:, -1] for x in run(logistic_2d.train_ivon, logistic_2d.IVON, 20_000))
    best = optimal_diagonal(SIGNED)
    assert np.max(np.abs(mean.mean(axis=0) - best.mean) / best.std) < 0.05
    assert np.max(np.abs(std.mean(axis=0) / best.std - 1)) < 0.08


def test_sgd_ends_at_the_mode():
    weights = run(logistic_2d.train_sgd, logistic_2d.SGD, 20_000)[:, -1]
    np.testing.assert_allclose(weights, np.tile(laplace(SIGNED).mean, (len(weights), 1)), atol=0.1)


def test_the_script_prints_a_table_and_writes_a_figure(tmp_path):
    command = [sys.executable, "-W", "error", EXAMPLES / "logistic_2d.py"]
    done = subprocess.run(
        [*command, "--seeds", "2", "--steps", "50"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for row in ("exact posterior", "best diagonal", "IVON", "Laplace", "where SGD ends", "KL(q‖p)"):
        assert row in done.stdout
    assert (tmp_path / "logistic_2d.png").stat().st_size > 10_000


def test_a_missing_package_is_one_clear_line(tmp_path):
    code = "import runpy, sys; sys.modules['sklearn'] = None; runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", code, EXAMPLES / "logistic_2d.py"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert 'pip install -e ".[examples]"' in done.stderr
