"""Approximations against closed forms, and the command that compares them with NUTS."""

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')
pytest.importorskip("blackjax", reason='NUTS needs: pip install -e ".[hmc]"')

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.stats import multivariate_normal

from benchmarks.evidence.inference import main, methods
from benchmarks.evidence.inference.problems import Data, Problem, run_nuts

NOISE, PRECISION = 0.5, 2.0


@pytest.fixture(scope="module")
def line():
    """Linear regression with two correlated features, and the exact moments of its function."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)) @ np.array([[1.0, 0.5], [0.0, 0.5]])
    y = x @ np.array([1.0, -1.0]) + NOISE * rng.normal(size=60)
    test = rng.normal(size=(30, 2))
    parts = [
        Data(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
        for a, b in ((x, y), (test, y[:30]))
    ]
    with_one = [np.concatenate([a, np.ones((len(a), 1))], axis=1) for a in (x, test)]
    covariance = np.linalg.inv(with_one[0].T @ with_one[0] / NOISE**2 + PRECISION * np.eye(3))
    mean = with_one[1] @ covariance @ with_one[0].T @ y / NOISE**2
    std = np.sqrt(np.einsum("ni,ij,nj->n", with_one[1], covariance, with_one[1]))
    problem = Problem(*parts, hidden=0, outputs=1, precision=PRECISION, noise=NOISE)
    return problem, mean, std


def moments(outputs):
    return np.asarray(outputs.mean(0)), np.asarray(outputs.std(0))


def test_nuts_draws_from_the_exact_posterior(line):
    problem, mean, std = line
    found = run_nuts(problem, draws=300)
    assert found.rhat < 1.05 and found.ess > 300 and found.divergences == 0
    of_mean, of_std = moments(found.outputs)
    np.testing.assert_allclose(of_mean, mean, atol=5 * std.max() / found.ess**0.5)
    np.testing.assert_allclose(of_std, std, rtol=5 / (2 * found.ess) ** 0.5)


def test_laplace_is_exact_for_linear_regression(line):
    problem, mean, std = line
    out = methods.predictions(
        problem, "laplace", 1, 2000, jax.random.key(0), {"learning_rate": 0.1}
    )
    of_mean, of_std = moments(out)
    np.testing.assert_allclose(of_mean, mean, atol=5 * std.max() / methods.SAMPLES**0.5)
    np.testing.assert_allclose(of_std, std, rtol=5 / (2 * methods.SAMPLES) ** 0.5)


def test_the_eigenbasis_is_exact_for_correlated_features(line):
    problem, mean, std = line
    values = {"learning_rate": 0.05, "hess_init": 1.0}
    out = methods.predictions(problem, "ivon_basis", 1, 4000, jax.random.key(0), values)
    of_mean, of_std = moments(out)
    np.testing.assert_allclose(of_mean, mean, atol=0.2 * std.mean())
    np.testing.assert_allclose(of_std, std, rtol=0.2)
    _, diagonal = moments(methods.predictions(problem, "ivon", 1, 4000, jax.random.key(0), values))
    assert np.abs(of_std / std - 1).mean() < 0.5 * np.abs(diagonal / std - 1).mean()


def test_the_laplace_matrix_of_a_softmax_is_the_hessian_at_the_mode():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
    data = Data(x, jnp.asarray(rng.integers(0, 3, 40)))
    problem = Problem(data, data, hidden=0, outputs=3, precision=1.0)
    key, values = jax.random.key(0), {"learning_rate": 0.05}
    mode, root = methods.fit_laplace(problem, 500, values, key)
    flat, unravel = ravel_pytree(mode)
    hessian = jax.hessian(lambda w: 40 * problem.penalised(unravel(w), data))(flat)
    np.testing.assert_allclose(root @ root.T, hessian, atol=1e-3)


def test_ivon_is_exact_for_one_weight_at_a_time():
    """With orthogonal features the exact posterior is diagonal."""
    x = np.eye(4)[np.arange(80) % 4] * 2.0
    rng = np.random.default_rng(0)
    y = x @ rng.normal(size=4) + NOISE * rng.normal(size=80)
    parts = Data(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    test = Data(jnp.eye(4), jnp.zeros(4))
    problem = Problem(parts, test, hidden=0, outputs=1, precision=PRECISION, noise=NOISE)
    with_one = np.concatenate([x, np.ones((80, 1))], axis=1)
    precision = with_one.T @ with_one / NOISE**2 + PRECISION * np.eye(5)
    mean = np.linalg.solve(precision, with_one.T @ y / NOISE**2)
    std = np.diag(precision) ** -0.5  # of the best diagonal Gaussian, with the bias in it
    values = {"learning_rate": 0.05, "hess_init": 10.0}
    out = methods.predictions(problem, "ivon", 1, 8000, jax.random.key(0), values)
    of_mean, of_std = moments(out)
    np.testing.assert_allclose(of_mean, mean[:4] + mean[4], atol=0.05)
    np.testing.assert_allclose(of_std, (std[:4] ** 2 + std[4] ** 2) ** 0.5, rtol=0.15)


def test_the_free_energy_is_minus_the_evidence_at_the_exact_posterior():
    """One feature and no way to differ from a diagonal Gaussian: IVON's bound is tight."""
    x = np.tile([[1.0], [-1.0]], (30, 1))  # orthogonal to the bias
    y = 0.7 * x[:, 0] + NOISE * np.random.default_rng(0).normal(size=60)
    data = Data(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    problem = Problem(data, data, hidden=0, outputs=1, precision=PRECISION, noise=NOISE)
    values = {"learning_rate": 0.05, "hess_init": 4.0}
    found = methods.free_energy(problem, "ivon", 2, 16_000, jax.random.key(0), values)
    with_one = np.concatenate([x, np.ones((60, 1))], axis=1)
    covariance = NOISE**2 * np.eye(60) + with_one @ with_one.T / PRECISION
    evidence = multivariate_normal(np.zeros(60), covariance).logpdf(y)
    constant = 30 * np.log(2 * np.pi * NOISE**2)  # which the loss leaves out
    np.testing.assert_allclose(60 * found, -evidence - constant, atol=0.3)


def test_distances_are_zero_from_itself_and_known_for_a_shift(line):
    problem = line[0]
    out = jax.random.normal(jax.random.key(0), (500, 30))
    assert main.compared(problem, out, out)["W2"] == 0
    few = out[:4]  # an ensemble is its members, and nothing between them
    assert main.compared(problem, few, jnp.repeat(few, 100, axis=0))["W2"] == 0
    assert main.compared(problem, out + 2.0, out)["W2"] == pytest.approx(2.0, rel=1e-5)
    classes = Problem(problem.train, Data(problem.test.x, jnp.zeros(30, int)), 0, 2, 1.0)
    one = jnp.log(jnp.tile(jnp.array([0.9, 0.1]), (3, 30, 1)))
    other = jnp.log(jnp.tile(jnp.array([0.4, 0.6]), (3, 30, 1)))
    found = main.compared(classes, one, other)
    assert found["agreement"] == 0 and found["total variation"] == pytest.approx(0.5)
    assert found["nll"] == pytest.approx(-np.log(0.9), rel=1e-5)


@pytest.mark.parametrize(("method", "runs"), [("swag", 2), ("dropout", 1)])
def test_other_methods_draw_as_many_outputs_from_each_run(line, method, runs):
    values = {
        "swag": {"learning_rate": 0.01, "rate": 0.01},
        "dropout": {"learning_rate": 0.1, "drop": 0.1},
    }
    out = methods.predictions(line[0], method, runs, 400, jax.random.key(0), values[method])
    assert out.shape == (methods.SAMPLES, 30) and jnp.isfinite(out).all()
    assert 0 < out.std(0).mean() < 1


def test_the_command_tunes_compares_and_goes_on(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "PROBLEMS", {"line": lambda: line[0]})
    monkeypatch.setattr(
        main, "NAMES", {("map", 1): "one network (MAP)", ("ivon", 2): "IVON, mixture of 2"}
    )
    grids = {
        "map": {"learning_rate": (0.03,)},
        "ivon": {"learning_rate": (0.1,), "hess_init": (1.0,)},
    }
    monkeypatch.setattr(methods, "GRIDS", grids)
    results = tmp_path / "inference.jsonl"
    argv = ["--problems", "line", "--gradients", "400", "--draws", "50", "--seeds", "2"]
    main.main([*argv, "--results", str(results)])
    page = results.with_suffix(".md").read_text()
    rows = {line.split("  ")[0] for line in page.splitlines()}
    assert {"one network (MAP)", "IVON, mixture of 2", "NUTS", "line"} <= rows
    written = results.read_text()
    main.main([*argv, "--results", str(results)])
    assert results.read_text() == written and "nan" not in capsys.readouterr().out
    half = "\n".join(written.splitlines()[:4]) + "\n"  # without the comparison
    (tmp_path / "half.jsonl").write_text(half)
    main.main(["--report", "--results", str(tmp_path / "half.jsonl")])
    with pytest.raises(SystemExit, match="no problem circle"):
        main.main(["--problems", "circle", "--results", str(results)])
