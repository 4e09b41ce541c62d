import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    Mixture,
    Posterior,
    auto_sample,
    ivon,
    mixture,
    posterior,
    predict_at_mean,
    predict_draws,
    predict_log_probs,
    predict_moments,
    predict_samples,
    reseed,
    sample_params,
)

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((10, 4)), jnp.float32)


def gaussian(precision):
    return Posterior(
        {"w": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)},
        {"w": jnp.full((4, 3), precision)},
    )


PARTS = [gaussian(p) for p in (2.0, 5.0, 50.0)]
STACKED = Mixture(jax.tree.map(lambda *x: jnp.stack(x), *PARTS))


def apply(params, x):
    return x @ params["w"]


def outputs_by_hand(num_samples):
    """Sample s is drawn with the s-th key from component s mod 3."""
    with jax.threefry_partitionable(True):
        keys = jax.random.split(KEY, num_samples)
    samples = [sample_params(k, PARTS[s % 3])[0] for s, k in enumerate(keys)]
    return np.stack([apply(sample, X) for sample in samples])


@pytest.mark.parametrize("q", [PARTS, STACKED, mixture(PARTS), mixture(STACKED)], ids=range(4))
@pytest.mark.parametrize("sizes", [{}, {"sample_batch_size": 2, "data_batch_size": 4}], ids=str)
def test_the_components_take_turns(q, sizes):
    outputs = outputs_by_hand(6)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(predict_samples(apply, 6, **sizes)(KEY, q, X), outputs, **close)
    log_p = jax.jit(predict_log_probs(apply, 6, **sizes))(KEY, q, X)
    np.testing.assert_allclose(np.exp(log_p), np.mean(jax.nn.softmax(outputs), axis=0), **close)
    moments = predict_moments(apply, 6, noise_variance=0.1, **sizes)(KEY, q, X)
    np.testing.assert_allclose(moments.mean, outputs.mean(0), **close)
    np.testing.assert_allclose(moments.model_variance, outputs.var(0), **close)


def test_the_moments_are_those_of_the_mixture():
    """For a linear network: mean of means, and mean of variances plus variance of means."""
    moments = predict_moments(apply, 30_000, noise_variance=0.0, sample_batch_size=1000)
    found = moments(KEY, PARTS, X[:2])
    means = np.stack([apply(q.mean, X[:2]) for q in PARTS])
    squares = np.sum(np.square(X[:2]), axis=1)[:, None]
    variances = np.stack([np.broadcast_to(squares / q.precision["w"][0, 0], (2, 3)) for q in PARTS])
    exact = variances.mean(0) + means.var(0)
    np.testing.assert_allclose(found.mean, means.mean(0), atol=0.05)
    np.testing.assert_allclose(found.model_variance, exact, rtol=0.05)


def test_draws_of_a_mixture_have_the_noise_of_the_observations_too():
    y = predict_draws(apply, 3000, noise_variance=4.0, sample_batch_size=3000)(KEY, PARTS, X[:1])
    model = predict_moments(apply, 3000, noise_variance=4.0)(KEY, PARTS, X[:1])
    np.testing.assert_allclose(np.var(y, axis=0), model.variance, rtol=0.15)


def members(tx, number=3):
    keys = jax.random.split(jax.random.key(7), number)
    params = jax.vmap(lambda k: {"w": jax.random.normal(k, (4, 3))})(keys)
    return params, jax.vmap(reseed)(jax.vmap(tx.init)(params), keys)


def test_a_stack_of_states_that_vmap_has_trained_is_a_mixture():
    tx = auto_sample(optax.chain(optax.clip(1.0), ivon(0.1, ess=100, b2=0.9)), 0)
    params, states = members(tx)

    @jax.jit
    @jax.vmap
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(apply(p, X) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, states = step(params, states)
    f = jax.jit(predict_log_probs(apply, 6))
    found = f(KEY, states, X)
    separate = [posterior(jax.tree.map(lambda x, i=i: x[i], states)) for i in range(3)]
    np.testing.assert_allclose(found, f(KEY, separate, X), rtol=1e-5, atol=1e-6)
    stacked = Mixture(jax.vmap(posterior)(states))
    np.testing.assert_allclose(found, f(KEY, stacked, X), rtol=1e-5, atol=1e-6)


def test_members_without_a_stored_mean_go_through_their_posteriors():
    params, states = members(auto_sample(ivon(0.1, ess=100), 0, store_mean=False))
    with pytest.raises(ValueError, match="does not store the mean"):
        mixture(states)
    q = mixture(jax.vmap(posterior)(states, params))
    assert predict_samples(apply, 3)(KEY, q, X).shape == (3, 10, 3)


def test_other_leaves_come_from_the_parameters():
    def both(params, x):
        return apply(params, x) + params["b"]

    tx = optax.partition(
        {"bayes": ivon(0.1, ess=100), "fixed": optax.set_to_zero()}, {"w": "bayes", "b": "fixed"}
    )
    params = {"w": jnp.ones((4, 3)), "b": jnp.full((1, 3), 100.0)}
    states = [tx.init(params), tx.init(params)]
    out = predict_samples(both, 2)(KEY, states, X, params=params)
    assert np.all(out > 50)
    # Each member may have leaves of its own.
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    states = jax.vmap(tx.init)(stacked)
    out = predict_samples(both, 2)(KEY, mixture(jax.vmap(posterior)(states, stacked)), X)
    assert np.all(out[0] < 150) and np.all(out[1] > 150)
    # Of stacked parameters nobody knows which of the others are stacked as well.
    shared = stacked | {"b": jnp.full((2,), 100.0)}
    with pytest.raises(ValueError, match="must be those of one network"):
        predict_samples(both, 2)(KEY, states, X, params=shared)


def test_one_component_is_the_posterior_alone():
    f = predict_log_probs(apply, 4)
    np.testing.assert_allclose(f(KEY, PARTS[:1], X), f(KEY, PARTS[0], X), rtol=1e-5, atol=1e-6)


def test_what_is_no_mixture_is_refused():
    with pytest.raises(ValueError, match="take a multiple of 3"):
        predict_log_probs(apply, 4)(KEY, PARTS, X)
    with pytest.raises(ValueError, match="at least one posterior"):
        mixture([])
    with pytest.raises(ValueError, match="the state of one run"):
        mixture(ivon(0.1, 10).init(PARTS[0].mean))
    other = Posterior({"w": jnp.zeros((4, 2))}, {"w": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match="at position 1 has other leaves or shapes"):
        mixture([PARTS[0], other])
    with pytest.raises(ValueError, match="components on axis 0 of every leaf"):
        predict_log_probs(apply, 4)(KEY, Mixture(Posterior(X[:2], X[:3])), X)
    for several in (PARTS, STACKED):
        with pytest.raises(ValueError, match="no network at their average"):
            predict_at_mean(apply)(several, X)
