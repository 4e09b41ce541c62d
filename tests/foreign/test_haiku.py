"""A classifier with dropout as in haiku's examples: a NamedTuple of params, average and state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from ivon_jax import auto_sample, ivon, learning_status, posterior_mean, predict_log_probs

hk = pytest.importorskip("haiku")


class TrainingState(NamedTuple):
    params: optax.Params
    avg_params: optax.Params
    opt_state: optax.OptState


def net_fn(images, is_training=True):
    x = hk.Flatten()(images)
    x = jax.nn.relu(hk.Linear(32)(x))
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.1, x)
    return hk.Linear(3)(x)


def test_a_haiku_loop_with_dropout_and_an_average_of_the_weights():
    images = jax.random.normal(jax.random.key(0), (300, 4, 4))
    labels = jnp.argmax(images[:, 0, :3], axis=-1)
    network = hk.transform(net_fn)
    settings = {"learning_rate": 0.2, "ess": 300, "hess_init": 0.3, "b2": 0.99}
    optimiser = auto_sample(optax.chain(optax.clip_by_global_norm(1.0), ivon(**settings)), key=0)

    def loss(params, rng):
        logits = network.apply(params, rng, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(state, rng):
        grads = jax.grad(loss)(state.params, rng)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average of posterior means, not of samples.
        mean = posterior_mean(opt_state)
        average = optax.incremental_update(mean, state.avg_params, step_size=0.1)
        return TrainingState(params, average, opt_state)

    params = network.init(jax.random.key(1), images)
    state = TrainingState(params, params, optimiser.init(params))
    for rng in jax.random.split(jax.random.key(2), 150):
        state = update(state, rng)

    def apply(params, x):
        return network.apply(params, None, x, is_training=False)

    log_p = predict_log_probs(apply, num_samples=8)(jax.random.key(3), state, images)
    for out in (log_p, apply(state.avg_params, images)):
        assert jnp.mean(jnp.argmax(out, -1) == labels) > 0.9
    assert learning_status(state.opt_state, settings, params=state.params).kind == "yes"
