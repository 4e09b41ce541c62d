"""The methods that `out_of_domain.py` compares, against computations of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax", reason='the examples need: pip install -e ".[examples]"')

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import jax
import jax.numpy as jnp
from scipy.stats import norm

from benchmarks.evidence.images import ood_methods as ood
from benchmarks.evidence.images import ood_tuning, out_of_domain
from ivon_jax import Posterior

RUN = ood.Run(epochs=4, batch_size=10, num_samples=3)
VALUES = {method: ood_tuning.CHOSEN[method] for method in ood.METHODS}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    images = rng.uniform(size=(40, 8, 8, 1)) * 0.2 + np.eye(10)[labels][:, None, :8, None] * 0.8
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)


@pytest.fixture
def lax_promotion():
    """Optax's schedules mix integers and floats; for so few steps optimised code does not pay."""
    with jax.numpy_dtype_promotion("standard"):
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def test_the_script_prints_its_tables_and_writes_the_figure(tmp_path):
    options = ["--epochs", "1", "--seeds", "2", "--posterior-samples", "2", "--methods", "ivon"]
    command = [sys.executable, "-W", "error", EXAMPLES / "out_of_domain.py", *options]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # to compile faster
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for text in ("gradients", "photo patches", "FPR95", "IVON", "±", "Figure written to"):
        assert text in done.stdout
    assert "nan" not in done.stdout
    assert (tmp_path / "out_of_domain.png").stat().st_size > 10_000


def test_rows_hold_the_scores_in_the_order_of_the_columns():
    familiar, unfamiliar = np.arange(0.0, 1.0, 0.01), np.array([0.505, 0.605, 2.0, 3.0])
    scores = out_of_domain.Scores(
        accuracy=0.975,
        nll=0.0625,
        entropy={"test": familiar, "letters": unfamiliar},
        information={"test": familiar, "letters": 2.0 + unfamiliar},
        widths=np.array([0.1, 0.2]),
    )
    results = {"sgd": [scores._replace(widths=None)], "ivon": [scores], "ensemble": [scores]}
    sgd, ivon, ensemble = out_of_domain.cost_rows(results, 2000, 64)[1:]
    assert sgd == ["SGD", "2,000", "1", "97.50", "0.0625", "0.495", ""]
    assert ivon[2] == "64" and ivon[-1] == "0.100 to 0.200"
    assert ensemble[1:3] == ["10,000", "5"]
    header, sgd, ivon, _ = out_of_domain.detection_rows(results, "letters", "letters")
    row = dict(zip(header, ivon, strict=True))
    pairs = np.mean(unfamiliar[:, None] > familiar)  # the AUROC by its definition
    assert row["AUROC"] == f"{100 * pairs:.1f}"
    # 95 of 100 digits are at most 0.94, as are two of the four letters.
    assert row["FPR95"] == "50.0" and row["AUROC of MI"] == "100.0"
    assert sgd[-1] == ""


def test_swag_moments_are_those_of_a_loop_over_snapshots():
    snapshots = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    q = ood.swag_of({"w": jnp.asarray(snapshots)}, rank=4)
    mean, square, deviations = np.zeros((2, 3)), np.zeros((2, 3)), []
    for n, theta in enumerate(snapshots):  # Algorithm 1 of Maddox et al. 2019
        mean = (n * mean + theta) / (n + 1)
        square = (n * square + theta**2) / (n + 1)
        deviations.append(theta - mean)
    np.testing.assert_allclose(q.mean["w"], mean, atol=1e-6)
    np.testing.assert_allclose(q.variance["w"], square - mean**2, atol=1e-6)
    np.testing.assert_allclose(q.deviations["w"], deviations[-4:], atol=1e-6)


def test_swag_draws_have_the_covariance_of_the_paper_across_leaves():
    rng = np.random.default_rng(0)
    deviations = rng.normal(size=(4, 3)).astype(np.float32)
    q = ood.Swag(
        {"a": jnp.zeros(1), "b": jnp.ones(2)},
        {"a": jnp.array([2.0]), "b": jnp.array([0.5, 0.0])},
        {"a": jnp.asarray(deviations[:, :1]), "b": jnp.asarray(deviations[:, 1:])},
    )
    keys = jax.random.split(jax.random.key(0), 40_000)
    draws = jax.jit(jax.vmap(ood.draw_swag, (0, None)))(keys, q)
    flat = np.concatenate([draws["a"], draws["b"]], axis=1)
    expected = 0.5 * np.diag([2.0, 0.5, 0.0]) + deviations.T @ deviations / (2 * (4 - 1))
    np.testing.assert_allclose(flat.mean(axis=0), [0, 1, 1], atol=0.03)
    np.testing.assert_allclose(np.cov(flat.T), expected, atol=0.03)


def test_swag_collects_the_weights_after_each_of_the_last_epochs(data, lax_promotion):
    run = RUN._replace(epochs=8)  # of which two are collected
    q = ood.make_runner("swag", run).fit(VALUES["swag"], 0, data)
    deviations = q.deviations["params"]["Dense_0"]["kernel"]
    variance = q.variance["params"]["Dense_0"]["kernel"]
    assert deviations.shape == (2, 64, 128)
    np.testing.assert_array_equal(deviations[0], 0.0)  # the running mean of the first is itself
    # Of two snapshots the second is √variance away from their mean.
    np.testing.assert_allclose(deviations[1] ** 2, variance, atol=1e-5)
    assert float(jnp.max(variance)) > 1e-5


def test_kl_is_the_expectation_of_the_log_ratio():
    mean, std, precision = {"w": jnp.array([0.3, -1.0])}, {"w": jnp.array([0.5, 0.1])}, 4.0
    q = norm(np.asarray(mean["w"], float), np.asarray(std["w"], float))
    p = norm(0.0, precision**-0.5)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    theta = q.mean() + q.std() * nodes[:, None]
    ratio = q.logpdf(theta) - p.logpdf(theta)
    expected = np.sum(weights[:, None] * ratio) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(ood.gaussian_kl(mean, std, precision), expected, rtol=1e-5)


def test_backprop_is_left_with_the_prior_if_the_data_weigh_nothing(data, lax_promotion):
    values = {"learning_rate": 0.05, "weight_decay": 1e3, "init_std": 0.02, "temperature": 40.0}
    run = RUN._replace(epochs=40)  # λ = 1: a prior precision of 1000 against one example's loss
    q = ood.make_runner("backprop", run).fit(values, 0, data)
    kernel = q.precision["params"]["Dense_0"]["kernel"]
    assert 0.9 < float(jnp.median(kernel)) / 1e3 < 1.1
    assert float(jnp.abs(q.mean["params"]["Dense_0"]["kernel"]).mean()) < 0.01


def test_dropout_masks_have_mean_one_are_per_image_and_vanish_at_rate_zero():
    # One path through the network: the logit is a sum of products of two masks.
    params = {
        "Dense_0": {"kernel": jnp.zeros((64, 128)), "bias": jnp.ones(128)},
        "Dense_1": {"kernel": jnp.eye(128), "bias": jnp.zeros(128)},
        "Dense_2": {"kernel": jnp.ones((128, 10)), "bias": jnp.zeros(10)},
    }
    forward = jax.jit(ood.dropout_logits)
    images, key = jnp.zeros((500, 8, 8, 1)), jax.random.key(0)
    logits = np.asarray(forward({"params": params}, key, images, 0.3))[:, 0]
    # A product is 1/0.7² with probability 0.7², else 0.
    np.testing.assert_allclose(logits.mean(), 128.0, rtol=0.01)
    np.testing.assert_allclose(logits.std(), np.sqrt(128 * (0.7**-2 - 1)), rtol=0.1)
    np.testing.assert_array_equal(forward({"params": params}, key, images, 0.0), 128.0)


def test_members_of_the_ensemble_are_networks_of_seeds_of_their_own(data, lax_promotion):
    fit = ood.make_runner("ensemble", RUN).fit
    kernels = [
        fit(VALUES["sgd"], seed, data)["params"]["Dense_0"]["kernel"]
        for seed in (3, 3 + ood.MEMBER_STRIDE)
    ]
    assert len(kernels[0]) == ood.MEMBERS
    np.testing.assert_allclose(kernels[0][1:], kernels[1][:-1], atol=1e-6)
    assert not np.allclose(kernels[0][0], kernels[0][1], atol=1e-2)


def test_dropout_learns_and_its_samples_are_log_probabilities(data, lax_promotion):
    runner, values = ood.make_runner("dropout", RUN._replace(epochs=20)), VALUES["dropout"]
    fitted = runner.fit(values, 0, data)
    samples = runner.predict(values, jax.random.key(0), fitted, data[0])
    assert samples.shape == (3, 40, 10)
    np.testing.assert_allclose(np.exp(samples).sum(-1), 1.0, atol=1e-4)
    assert not np.allclose(samples[0], samples[1])
    assert (samples[0].argmax(-1) == data[1]).mean() > 0.5


def test_widths_are_quantiles_of_the_standard_deviation():
    std = np.linspace(1.0, 2.0, 101)
    q = Posterior({}, {"a": jnp.asarray(std[:50] ** -2), "b": jnp.asarray(std[50:] ** -2)})
    np.testing.assert_allclose(out_of_domain.width_quantiles(q), [1.05, 1.95], rtol=1e-5)


def test_every_method_is_tuned_with_as_many_settings_and_the_choice_is_one_of_them():
    assert {len(ood_tuning.grid(method)) for method in ood.METHODS} == {24}
    assert all(ood_tuning.CHOSEN[method] in ood_tuning.grid(method) for method in ood.METHODS)
