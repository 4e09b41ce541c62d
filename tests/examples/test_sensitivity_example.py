"""`examples/sensitivity.py`: a small run, and its mathematics against closed forms."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("flax", reason='the examples need: pip install -e ".[examples]"')
pytest.importorskip("sklearn", reason='the examples need: pip install -e ".[examples]"')

from benchmarks.evidence.uses import sensitivity_report as report
from benchmarks.evidence.uses import sensitivity_retraining as retraining
from benchmarks.evidence.uses.small_digits import (
    Recipe,
    SoftmaxRegression,
    Weighted,
    make_ivon,
    run_epochs,
    wrong_labels,
)
from ivon_jax import linearize, posterior_mean

DECAY = 0.1
MODEL = SoftmaxRegression()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(12, 2, 2, 1)), jnp.float32)
    return Weighted(images, jnp.arange(12) % 10, jnp.ones(12))


@pytest.fixture(scope="module")
def fitted(data):
    params = MODEL.init(jax.random.key(0), data.images)
    return MODEL.apply, retraining.fit(MODEL.apply, data, DECAY, params, 60)


def numpy_logits(params, images):
    dense = params["params"]["Dense_0"]
    flat = 2 * np.asarray(images, np.float64).reshape(len(images), -1) - 1
    return flat, flat @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def test_the_fit_is_a_stationary_point_of_the_penalised_loss(data, fitted):
    _, params = fitted
    flat, logits = numpy_logits(params, data.images)
    error = (softmax(logits) - np.eye(10)[np.asarray(data.labels)]) / len(data.labels)
    dense = params["params"]["Dense_0"]
    np.testing.assert_allclose(flat.T @ error + DECAY * dense["kernel"], 0, atol=2e-6)
    np.testing.assert_allclose(error.sum(axis=0) + DECAY * dense["bias"], 0, atol=2e-6)


def test_an_example_of_weight_zero_is_left_out_of_the_fit(data, fitted):
    apply, params = fitted
    weighted = data._replace(weights=data.weights.at[3].set(0.0))
    without = retraining.fit(apply, weighted, DECAY, params, 60)
    keep = np.arange(12) != 3
    rest = Weighted(*(x[keep] for x in data))
    # With 11 terms in the mean instead of 12, the same prior is 12/11 as strong per example.
    fresh = retraining.fit(apply, rest, DECAY * 12 / 11, params, 60)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), without, fresh)


def test_whitening_gives_the_outputs_the_full_laplace_covariance(data, fitted):
    apply, params = fitted
    apply_z, q = retraining.whitened(apply, data, DECAY, params)
    found = linearize(apply_z)(q, data.images[:3])
    np.testing.assert_allclose(found.mean, apply(params, data.images[:3]), rtol=1e-5)

    flat, logits = numpy_logits(params, data.images)
    inputs = np.hstack([np.ones((12, 1)), flat])
    probs = softmax(logits)
    hessian = 12 * DECAY * np.eye(50)
    for x, p in zip(inputs, probs, strict=True):
        hessian += np.kron(np.outer(x, x), np.diag(p) - np.outer(p, p))
    inverse = np.linalg.inv(hessian)
    for x, covariance in zip(inputs[:3], found.covariance, strict=True):
        jacobian = np.kron(x, np.eye(10))
        np.testing.assert_allclose(covariance, jacobian @ inverse @ jacobian.T, atol=1e-5)


def test_retraining_without_noise_has_no_floor_on_a_convex_loss(data, fitted):
    apply, params = fitted
    truth = retraining.without_noise(apply, data, DECAY, params, jnp.array([1, 3]), 200)
    assert report.size(np.asarray(truth.floor)).max() < 1e-4
    assert report.size(np.asarray(truth.deviation)).min() > 1e-2
    weighted = data._replace(weights=data.weights.at[3].set(0.0))
    without = retraining.fit(apply, weighted, DECAY, params, 60)
    change = apply(without, data.images[3:4])[0] - apply(params, data.images[3:4])[0]
    np.testing.assert_allclose(truth.deviation[1], change, atol=1e-4)


def test_ivon_again_shares_batches_and_noise(data):
    recipe = Recipe(epochs=3, learning_rate=0.1, batch_size=4)
    params = MODEL.init(jax.random.key(0), data.images)
    state = make_ivon(recipe, 12).init(params)
    keys = jax.random.key(1), jax.random.key(2)
    data = data._replace(weights=data.weights.at[5].set(0.0))
    new_state, truth = retraining.with_ivon(
        MODEL.apply, recipe, data, state, jnp.array([5, 6]), keys
    )
    # Example 5 had no weight before: to leave it out changes nothing but rounding.
    np.testing.assert_allclose(truth.deviation[0], 0, atol=1e-5)
    assert report.size(np.asarray(truth.deviation[1:])).min() > 1e-3
    assert report.size(np.asarray(truth.floor)).min() > 1e-3
    again = run_epochs(MODEL.apply, recipe, data, state, jax.random.split(keys[0], 3))
    expected = posterior_mean(again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), truth.base, expected)
    assert int(new_state.count) == 9


def test_summary_of_an_estimate_that_is_too_small_by_a_factor():
    estimate = np.random.default_rng(0).normal(size=(20, 3))
    found = report.summarise(
        report.Agreement(estimate, 4 * estimate, np.full((20, 3), 3**-0.5), -estimate)
    )
    assert found["Spearman"] == pytest.approx(1.0)
    assert found["Pearson"] == pytest.approx(1.0)
    assert found["cosine"] == pytest.approx(1.0)
    assert found["true / est."] == pytest.approx(4.0)
    assert found["floor"] == pytest.approx(1.0)
    assert found["Spearman of e"] == pytest.approx(1.0)


def test_wrong_labels_are_another_class_in_the_given_share():
    labels = jnp.arange(20_000) % 10
    found = np.asarray(wrong_labels(jax.random.key(0), labels, 0.2))
    shift = (found - np.asarray(labels)) % 10
    assert 0.18 < np.mean(shift > 0) < 0.22
    assert np.bincount(shift, minlength=10)[1:].min() > 350  # about 444 of each other class
    np.testing.assert_array_equal(wrong_labels(jax.random.key(0), labels, 0.0), labels)


# Most of a small run is compilation: do without the optimisations of the compiler.
FAST = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.mark.slow
def test_script_runs(tmp_path):
    options = ("--epochs", 2, "--seeds", 2, "--retrained-seeds", 1, "--examples", 3)
    options = (*options, "--steps", 5)
    command = [sys.executable, "-W", "error", EXAMPLES / "sensitivity.py", *map(str, options)]
    done = subprocess.run(command, cwd=tmp_path, env=FAST, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("network, IVON again", "second order", "prediction variance", "Wall time"):
        assert text in done.stdout
    assert (tmp_path / "sensitivity.png").stat().st_size > 10_000
