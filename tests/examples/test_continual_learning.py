"""`continual_learning.py` as a user runs it, and its tasks, penalties and summaries."""

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

from benchmarks.evidence.uses import continual_learning as script
from benchmarks.evidence.uses import continual_training as training
from benchmarks.evidence.uses.merging_fisher import diagonal_fisher
from ivon_jax import Posterior


def test_the_script_prints_a_table_and_writes_a_figure(tmp_path):
    options = ("--benchmarks", "split", "--steps", "5", "--seeds", "2")
    command = [sys.executable, "-W", "error", EXAMPLES / "continual_learning.py", *options]
    # Most of the time is the compiler's.
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr
    for text in ("Split digits", "at the end", "forgotten", "EWC", "IVON, posterior as prior"):
        assert text in done.stdout
    assert "Permuted" not in done.stdout
    assert (tmp_path / "continual_learning.png").stat().st_size > 10_000


def test_summaries_of_an_accuracy_matrix():
    # Rows: after each of three tasks; columns: on each of them. One seed.
    matrices = np.array([[[90.0, 50, 50], [60, 80, 50], [70, 75, 95]]])
    assert script.final_accuracy(matrices) == pytest.approx([80])
    assert script.new_accuracy(matrices) == pytest.approx([(90 + 80 + 95) / 3])
    # Task 1 has lost 90 − 70 and task 2 80 − 75; what was known before learning does not count.
    assert script.forgetting(matrices) == pytest.approx([(20 + 5) / 2])
    matrices[0, 0, 1] = 99.0
    assert script.forgetting(matrices) == pytest.approx([(20 + 5) / 2])


def test_every_chosen_setting_is_complete():
    for chosen in script.CHOSEN.values():
        assert chosen.keys() == training.METHODS.keys() == script.GRIDS.keys()
        for method, values in chosen.items():
            assert values.keys() == script.GRIDS[method].keys()


def test_permuted_tasks_hold_the_same_pixels_in_other_places():
    rng = np.random.default_rng(0)
    images, labels = rng.random((6, 64)).astype(np.float32), np.arange(6)
    tasks, task_labels = training.permuted(images, labels, seed=3)
    np.testing.assert_array_equal(tasks[0], images)
    assert task_labels.shape == (5, 6) and (task_labels == labels).all()
    for task in tasks[1:]:
        assert not np.array_equal(task, images)
        np.testing.assert_array_equal(np.sort(task, axis=1), np.sort(images, axis=1))
        # One order for all images of a task.
        order = [int(np.flatnonzero(images[0] == value)[0]) for value in task[0]]
        np.testing.assert_array_equal(task, images[:, order])
    assert not np.array_equal(tasks[1], tasks[2])


def test_split_tasks_hold_two_digits_each_and_are_labelled_by_parity():
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 0, 1, 5])
    images = np.tile(labels[:, None], (1, 64)).astype(np.float32)
    tasks, task_labels = training.split(images, labels, seed=0)
    assert tasks.shape == (5, 2, 64)  # as many as of the rarest pair
    for number, (task, label) in enumerate(zip(tasks, task_labels, strict=True)):
        assert set(task[:, 0]) <= {2 * number, 2 * number + 1}
        np.testing.assert_array_equal(label, task[:, 0] % 2)


@pytest.mark.parametrize("size, steps", [(170, 7), (50, 3)])
def test_batches_repeat_no_row_within_a_pass(size, steps):
    rows = training.batch_rows(np.random.default_rng(0), size, steps)
    assert rows.shape == (steps, training.BATCH_SIZE)
    per_pass = size // training.BATCH_SIZE
    for first in range(0, steps, per_pass):
        seen = rows[first : first + per_pass].ravel()
        assert len(set(seen)) == len(seen) and seen.max() < size


def test_validation_images_are_held_out_of_training():
    tasks = training.make_tasks("permuted", 1, steps=2, validate=True)
    assert tasks.images.shape[2] + tasks.eval_images.shape[2] == 1000  # (seeds, tasks, images, 64)
    test = training.make_tasks("permuted", 1, steps=2, validate=False)
    assert test.images.shape[2] == 1000 and test.eval_images.shape[2] == 797
    upright = {image.tobytes() for image in np.asarray(tasks.images[0, 0])}
    assert not upright & {image.tobytes() for image in np.asarray(tasks.eval_images[0, 0])}


def test_diagonal_fisher_of_a_linear_model():
    key = jax.random.key(0)
    inputs, weights = jax.random.normal(key, (7, 3)), jax.random.normal(key, (3, 4))
    found = diagonal_fisher(lambda w, x: x @ w, weights, inputs)
    p = np.asarray(jax.nn.softmax(inputs @ weights))
    expected = np.square(inputs).T @ (p * (1 - p)) / 7  # E x² (pₖ − pₖ²), in closed form
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_flat_network_computes_what_flax_computes():
    net, images = training.Net(3), jax.random.uniform(jax.random.key(0), (4, 64))
    weights = net.init(jax.random.key(1))
    tree = training.Perceptron(3).init(jax.random.key(1), images)
    np.testing.assert_allclose(
        net.apply(weights, images), training.Perceptron(3).apply(tree, images), rtol=1e-5, atol=1e-6
    )


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    net = training.Net(2)
    images = jnp.asarray(rng.random((50, 64)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 2, 50), jnp.int32)
    rows = jnp.tile(jnp.arange(50), (8, 1))
    start = net.init(jax.random.key(1))
    return training.Task(net, images, labels, rows, jax.random.key(0), start)


def learn(method, values, task, prior):
    # The schedules of optax mix integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda prior: training.METHODS[method].learn(values, task, prior))(prior)


def test_the_first_prior_has_precision_ess_times_decay(task):
    values = {"weight_decay": 0.01, "temperature": 0.1}
    prior = training.first_prior(values, task, task.start)
    np.testing.assert_allclose(prior.precision, 0.01 * 50 / 0.1, rtol=1e-6)
    np.testing.assert_array_equal(prior.mean, 0.0)


def test_ewc_is_held_by_its_penalty_and_adds_fisher_information(task):
    values = {"learning_rate": 1e-3, "strength": 2.0, "weight_decay": 1e-4}
    # Half of the weights are held where they start, by a stiff spring.
    held = jnp.arange(len(task.start)) % 2 == 0
    prior = Posterior(task.start, jnp.where(held, 1e8, 0.01))
    q = learn("ewc", values, task, prior)
    moved = jnp.abs(q.mean - task.start)
    assert jnp.max(moved[~held]) > 3e-3
    assert jnp.mean(moved[held]) < 0.3 * jnp.mean(moved[~held])
    fisher = diagonal_fisher(task.net.apply, q.mean, task.images)
    np.testing.assert_allclose(q.precision, prior.precision + 2.0 * 50 * fisher, rtol=1e-4)


def test_ivon_is_held_by_a_precise_prior_and_takes_the_posterior_over(task):
    values = script.ivon_values(0.02, 0.1, 1e-3, 1.0)
    held = jnp.arange(len(task.start)) % 2 == 0
    prior = Posterior(task.start, jnp.where(held, 1e6, 0.01))
    q = learn("ivon", values, task, prior)
    moved = jnp.abs(q.mean - task.start)
    assert jnp.max(moved[held]) < 1e-4 < 1e-3 < jnp.max(moved[~held])
    np.testing.assert_allclose(q.precision[held], 1e6, rtol=1e-3)
    # Under its own first prior the same task forgets where it started from, but for the start.
    afresh = learn("ivon_afresh", values, task, prior)
    assert jnp.mean(jnp.abs(afresh.mean - task.start)[held]) > 1e-3
    np.testing.assert_array_equal(afresh.precision, prior.precision)
