"""`examples/leave_one_out.py`: a small run, and its mathematics against independent code."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("flax", reason='the examples need: pip install -e ".[examples]"')
pytest.importorskip("sklearn", reason='the examples need: pip install -e ".[examples]"')

from benchmarks.evidence.uses import leave_one_out as example
from benchmarks.evidence.uses import leave_one_out_report as report
from ivon_jax import Posterior


def curves(**given):
    default = [[1, 2, 3, 4]] * 2
    return report.Curves(
        **{name: np.asarray(given.get(name, default), float) for name in report.Curves._fields}
    )


@pytest.mark.parametrize(
    ("nlls", "patience", "kept"),
    [
        ([3, 2, 1, 2, 3, 0], 2, 2),  # the later minimum is never seen
        ([3, 2, 1, 2, 3, 0], 3, 5),  # patience would end at the look that is better
        ([5, 4, 3, 2, 1], 2, 4),
        ([1, 2, 3], 1, 0),
        ([np.nan, 2, np.nan, 1, 3], 2, 3),
        ([np.nan, np.nan, np.nan], 2, 0),
    ],
)
def test_stopping_point(nlls, patience, kept):
    assert report.stopping_point(np.array(nlls, float), patience) == kept


def test_rank_correlation_is_that_of_the_ranks():
    test = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 3.0, 2.0]])
    np.testing.assert_allclose(report.rank_correlation(np.exp(test), test), 1)
    np.testing.assert_allclose(report.rank_correlation(-(test**3), test), -1)
    assert np.isnan(report.rank_correlation(test[:, :2], test[:, :2])).all()


def test_a_choice_is_scored_on_the_run_that_it_is_made_for():
    full = curves(test=[[1.0, 0.5, 0.7, 0.9]] * 2, first=[[4, 3, 2, 5]] * 2)
    split = curves(test=[[2.0, 1.5, 1.6, 1.7]] * 2, valid=[[3, 2, 1, 4]] * 2)
    rows = {
        line.split("  ")[0]: line.split()
        for line in report.stopping_table(full, split, 10, 4).splitlines()
    }
    assert "0.500" in rows["best by the test set"] and "20" in rows["best by the test set"]
    assert "30" in rows["leave-one-out"] and "0.700" in rows["leave-one-out"]
    assert "0.200" in rows["leave-one-out"]  # the cost
    assert "1.600" in rows["a fifth held out"]
    assert "0.700" in rows["a fifth held out, then all learned"]
    assert "0.900" in rows["no stopping"]
    table = report.choices_table(full, split, [1e-4, 1e-3, 1e-2, 1e-1])
    assert "0.01 (2)" in table and "0.001 (2)" in table


def test_estimates_of_a_linear_model_against_numpy():
    rng = np.random.default_rng(1)
    images, labels = rng.normal(size=(6, 4)), rng.integers(0, 3, 6)
    weights, precision = rng.normal(size=(4, 3)), 40 * rng.uniform(1, 2, (4, 3))
    q = Posterior(jnp.asarray(weights, jnp.float32), jnp.asarray(precision, jnp.float32))
    first, second, undefined = example.estimates(
        lambda w, x: x @ w, q, jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    ).values()

    expected = {1: [], 2: []}
    for x, y in zip(images, labels, strict=True):
        logits = x @ weights
        probs = np.exp(logits) / np.exp(logits).sum()
        v = np.diag((x[:, None] ** 2 / precision).sum(axis=0))
        hessian = np.diag(probs) - np.outer(probs, probs)
        shift = v @ (probs - np.eye(3)[y])
        for order, move in ((1, shift), (2, np.linalg.solve(np.eye(3) - v @ hessian, shift))):
            f = logits + move
            expected[order].append(np.log(np.exp(f).sum()) - f[y])
    np.testing.assert_allclose(first, np.mean(expected[1]), rtol=1e-4)
    np.testing.assert_allclose(second, np.mean(expected[2]), rtol=1e-4)
    assert float(undefined) == 0.0


def test_a_posterior_too_wide_is_counted_and_left_out_of_second_order():
    q = Posterior(jnp.zeros((2, 3)), jnp.full((2, 3), 0.1))
    images = jnp.array([[1.0, 0.0], [1e-3, 0.0]])  # the first has v = 10, the second 1e-5
    found = example.estimates(lambda w, x: x @ w, q, images, jnp.array([0, 1]))
    assert float(found["undefined"]) == 0.5
    np.testing.assert_allclose(found["second"], np.log(3), rtol=1e-4)


# Most of a small run is compilation: do without the optimisations of the compiler.
FAST = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.mark.slow
def test_script_runs(tmp_path):
    options = ("--epochs", 15, "--seeds", 2, "--prior-epochs", 2)
    command = [sys.executable, "-W", "error", EXAMPLES / "leave_one_out.py", *map(str, options)]
    done = subprocess.run(command, cwd=tmp_path, env=FAST, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("Which epoch to keep", "a fifth held out", "no stopping", "Wall time"):
        assert text in done.stdout
    assert (tmp_path / "leave_one_out.png").stat().st_size > 10_000
