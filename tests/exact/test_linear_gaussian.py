"""Merging, removing and continual learning in closed form.

With diagonal Gram matrices the posteriors of Bayesian linear regression are diagonal, so that
what is done with the posteriors of parts of the data must equal one regression on all of it.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import Posterior, ivon, merge, posterior, prior_of, task_arithmetic, with_ess

K, N, PRIOR = 4, 12, 0.5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def tasks(number=3):
    """Designs with orthogonal columns of different lengths, and targets from different weights."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(number):
        x = np.linalg.qr(rng.standard_normal((N, K)))[0] * rng.uniform(0.5, 3, K)
        parts.append((x, x @ rng.standard_normal(K) + rng.standard_normal(N)))
    return parts


def regression(parts, prior_mean=0.0, prior_precision=PRIOR, weights=None):
    """Mean and diagonal precision of the posterior of unit noise; likelihoods to given powers."""
    weights = weights or [1.0] * len(parts)
    gram = sum(w * x.T @ x for w, (x, _) in zip(weights, parts, strict=True))
    a = gram + prior_precision * np.eye(K)
    np.testing.assert_allclose(a, np.diag(np.diag(a)), atol=1e-12)
    moment = sum(w * x.T @ y for w, (x, y) in zip(weights, parts, strict=True))
    mean = np.linalg.solve(a, moment + prior_precision * np.broadcast_to(prior_mean, K))
    return Posterior({"w": jnp.asarray(mean)}, {"w": jnp.asarray(np.diag(a))})


BASE_MEAN = np.array([0.3, -1.0, 2.0, 0.0])
BASE = Posterior({"w": BASE_MEAN}, {"w": np.full(K, PRIOR)})


def test_the_general_merge_is_joint_training():
    parts = tasks()
    single = [regression([part], BASE_MEAN) for part in parts]
    chex.assert_trees_all_close(merge(single, base=BASE), regression(parts, BASE_MEAN), rtol=1e-12)
    chex.assert_trees_all_close(
        jax.jit(lambda q: merge(q, base=BASE))(single), regression(parts, BASE_MEAN), rtol=1e-12
    )


def test_weights_are_powers_of_the_likelihoods():
    parts, weights = tasks(), [0.5, 1.0, 2.0]
    single = [regression([part], BASE_MEAN) for part in parts]
    expected = regression(parts, BASE_MEAN, weights=weights)
    chex.assert_trees_all_close(merge(single, base=BASE, weights=weights), expected, rtol=1e-12)
    traced = jax.jit(lambda w: merge(single, base=BASE, weights=[w, 1.0, 4 * w]))(0.5)
    chex.assert_trees_all_close(traced, expected, rtol=1e-12)


def test_a_removed_task_leaves_training_on_the_rest():
    parts = tasks()
    joint, last = regression(parts, BASE_MEAN), regression(parts[2:], BASE_MEAN)
    removed = merge([joint, last], weights=[1.0, -1.0], base=BASE)
    chex.assert_trees_all_close(removed, regression(parts[:2], BASE_MEAN), rtol=1e-11)


def test_federated_clients_that_start_from_the_servers_posterior_are_joint_training():
    parts = tasks()
    server = regression(parts[:1], BASE_MEAN)
    clients = [
        regression([part], server.mean["w"], np.asarray(server.precision["w"]))
        for part in parts[1:]
    ]
    chex.assert_trees_all_close(
        merge(clients, base=server), regression(parts, BASE_MEAN), rtol=1e-12
    )


def test_the_simple_merge_is_the_precision_weighted_mean():
    parts = tasks()
    single = [regression([part]) for part in parts]
    h = np.stack([q.precision["w"] for q in single])
    theta = np.stack([q.mean["w"] for q in single])
    got = merge(single)
    np.testing.assert_allclose(got.mean["w"], (h * theta).sum(0) / h.sum(0), rtol=1e-12)
    np.testing.assert_allclose(got.precision["w"], h.sum(0), rtol=1e-12)
    # In the form of the paper, with a base whose weights cancel.
    moved = BASE_MEAN + ((h / h.sum(0)) * (theta - BASE_MEAN)).sum(0)
    np.testing.assert_allclose(got.mean["w"], moved, rtol=1e-10, atol=1e-12)


def test_task_arithmetic_is_the_merge_of_equal_precisions():
    thetas = [{"w": jnp.arange(4.0) + i} for i in range(2)]
    base = {"w": jnp.asarray(BASE_MEAN)}
    got = task_arithmetic(thetas, base, weights=[0.3, 0.5])
    expected = BASE_MEAN + 0.3 * (thetas[0]["w"] - BASE_MEAN) + 0.5 * (thetas[1]["w"] - BASE_MEAN)
    np.testing.assert_allclose(got["w"], expected, rtol=1e-12)


def learn(part, steps=400, **settings):
    """IVON with exact gradients and Hessians: Newton's method on the variational objective."""
    x, y = map(jnp.asarray, part)
    tx = ivon(0.5, ess=N, b1=0.0, b2=0.5, rescale_lr=False, **settings)
    hess = {"w": jnp.sum(x**2, 0) / N}

    def step(state, _):
        grads = {"w": x.T @ (x @ state.mean["w"] - y) / N}
        return tx.update(grads, state, hess=hess)[1], None

    return jax.jit(lambda s: jax.lax.scan(step, s, None, steps)[0])(tx.init({"w": jnp.zeros(K)}))


def test_the_posterior_as_the_next_prior_is_batch_training():
    """δ = s₀/λ is formed in float64; ess is a float32 and exact here."""
    parts = tasks()
    prior = regression([], BASE_MEAN)
    for index, part in enumerate(parts):
        state = learn(part, prior=prior)
        np.testing.assert_allclose(prior_of(state).precision["w"], prior.precision["w"])
        prior = posterior(state)
        chex.assert_trees_all_close(prior, regression(parts[: index + 1], BASE_MEAN), rtol=1e-10)


def test_a_weight_decay_is_the_prior_of_mean_zero():
    part = tasks(1)[0]
    decayed = posterior(learn(part, weight_decay=PRIOR / 16))
    prior = Posterior({"w": jnp.zeros(K)}, {"w": jnp.full(K, PRIOR / 16 * N)})
    chex.assert_trees_all_close(posterior(learn(part, prior=prior)), decayed, rtol=1e-9)


@pytest.mark.parametrize("general", [False, True])
def test_a_new_ess_keeps_the_posterior(general):
    settings = {"prior": regression([], BASE_MEAN)} if general else {"weight_decay": 0.25}
    state = learn(tasks(1)[0], **settings)
    for ess in (N / 4, 8.0 * N):
        moved = with_ess(state, ess)
        chex.assert_trees_all_close(posterior(moved), posterior(state), rtol=1e-7)  # δ is a float32
        assert moved.ess == ess
        factor = 1.0 if general else ess / N
        np.testing.assert_allclose(
            prior_of(moved).precision["w"], factor * prior_of(state).precision["w"], rtol=1e-6
        )
