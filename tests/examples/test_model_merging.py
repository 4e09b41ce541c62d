"""`model_merging.py` as a user runs it, and its data and merge rules."""

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

from benchmarks.evidence.uses import merging_training as training
from benchmarks.evidence.uses import model_merging as script
from ivon_jax import Posterior, merge


def test_the_script_prints_a_table_and_writes_a_figure(tmp_path):
    command = [sys.executable, "-W", "error", EXAMPLES / "model_merging.py"]
    # Most of the time is the compiler's.
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [*command, "--steps", "3", "--seeds", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    for text in ("task arithmetic", "Fisher averaging", script.OURS, "left removed", "joint"):
        assert text in done.stdout
    assert (tmp_path / "model_merging.png").stat().st_size > 10_000


def test_images_are_turned_counterclockwise():
    image = np.random.default_rng(0).random((1, 8, 8, 1)).astype(np.float32)
    turned = training.turn(image, 90).reshape(8, 8)
    np.testing.assert_allclose(turned, np.rot90(image[0, :, :, 0]), atol=1e-5)
    np.testing.assert_array_equal(training.turn(image, 0), image.reshape(1, 64))


def test_domains_share_no_training_image_and_held_out_images_are_held_out():
    data = training.make_data(1, steps=2)
    size = training.TASK_SIZE
    assert data.images.shape == (1, 3, size, 64) and data.labels.shape == (1, 3, size)
    assert data.validation[0].shape[1:3] == (3, training.VALIDATION_SIZE)
    assert 3 * size + training.VALIDATION_SIZE <= 1000
    upright = {image.tobytes() for image in np.asarray(data.images[0, 0])}
    held_out = {image.tobytes() for image in np.asarray(data.validation[0][0, 0])}
    assert not upright & held_out
    assert data.rows.max() < size <= data.joint_rows.max() < 3 * size


@pytest.fixture
def models():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    h0 = jnp.asarray(rng.uniform(1, 2, 5), jnp.float32)
    own = jnp.asarray(rng.uniform(0.5, 3, (2, 5)), jnp.float32)
    tasks = Posterior(draw(2, 5), h0[None] + own)
    return training.Models(Posterior(draw(5), h0), tasks, Posterior(draw(5), h0))


def arrays(models):
    """θ₀, H₀, θ_t and P_t as float64 NumPy arrays."""
    return (np.asarray(x, np.float64) for x in (*models.base, *models.tasks))


def test_arithmetic_at_half_weight_is_the_average_of_two(models):
    _, _, means, _ = arrays(models)
    np.testing.assert_allclose(training.by_arithmetic(models, 0.5), means.mean(0), rtol=1e-5)


@pytest.mark.parametrize("weight", [0.7, 1.0])
def test_rules_against_their_formulas(models, weight):
    base, h0, means, p = arrays(models)
    simple = (p * means).sum(0) / p.sum(0)
    found = training.without_base(models, weight)
    np.testing.assert_allclose(found, base + weight * (simple - base), rtol=1e-4, atol=1e-5)

    own = p - h0 + training.FISHER_FLOOR * training.TASK_SIZE
    fisher = (own * means).sum(0) / own.sum(0)
    found = training.own_information(models, weight)
    np.testing.assert_allclose(found, base + weight * (fisher - base), rtol=1e-4, atol=1e-5)

    total = h0 + weight * (p - h0).sum(0)
    general = base + weight * (p * (means - base)).sum(0) / total
    np.testing.assert_allclose(training.with_base(models, weight), general, rtol=1e-4, atol=1e-5)


def test_removing_one_of_two_merged_models_gives_back_the_other(models):
    first, second = models.each()
    merged = merge([first, second], base=models.base)
    left = training.removed(merged, first, models.base)
    np.testing.assert_allclose(left, second.mean, rtol=1e-4, atol=1e-5)


def test_removing_more_precision_than_there_is_leaves_the_base_s():
    def gaussian(mean, precision):
        return Posterior(jnp.array([mean]), jnp.array([precision]))

    base, whole, task = gaussian(0.0, 1.0), gaussian(3.0, 4.0), gaussian(1.0, 9.0)
    # The task's precision counts as 4: H̄ = 1 + 3 − 3, and θ = (4·3 − 4·1) / 1.
    np.testing.assert_allclose(training.removed(whole, task, base), [8.0], rtol=1e-6)


def test_precisions_from_fisher_informations_add_up(models, monkeypatch):
    def stand_in(logits_fn, weights, images):
        del logits_fn
        return weights**2 * jnp.mean(images)

    monkeypatch.setattr(training, "diagonal_fisher", stand_in)
    images = jnp.asarray(np.random.default_rng(1).random((3, 4, 64)), jnp.float32)
    found = training.with_fisher(models, training.Data(images, *(None,) * 6))
    base, _, means, _ = arrays(models)
    average = np.asarray(images, np.float64).mean(axis=(1, 2))
    h0 = 4 * base**2 * average[0] + training.FISHER_FLOOR * training.TASK_SIZE
    np.testing.assert_allclose(found.base.precision, h0, rtol=1e-4)
    for task, mean, domain in zip(found.each(), means, (1, 2), strict=True):
        np.testing.assert_allclose(task.precision, h0 + 4 * mean**2 * average[domain], rtol=1e-4)
        np.testing.assert_allclose(task.mean, mean, rtol=1e-6)


def test_accuracies_count_hits_and_pass_on_failed_merges():
    weights = training.NET.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (3, 6, 64))
    logits = jax.jit(jax.vmap(training.NET.apply, (None, 0)))(weights, images)
    labels = np.argmax(np.asarray(logits), axis=-1)
    labels[1, :3] = (labels[1, :3] + 1) % 10
    accuracies = jax.jit(training.accuracies)
    np.testing.assert_allclose(accuracies(weights, images, labels), [1.0, 0.5, 1.0])
    assert np.isnan(accuracies(weights * np.nan, images, labels)).all()


def test_the_weight_is_chosen_on_validation_images_and_never_a_failed_merge():
    sweep = np.zeros((2, 2, 3, 3))  # seeds, validation or test, weights, domains
    sweep[:, 0] = np.array([0.5, 0.7, np.nan])[:, None]
    sweep[:, 1] = np.array([0.9, 0.1, 0.99])[:, None]
    index, score = script.best_weight(sweep)
    assert index == 1 and score == pytest.approx(70.0)
