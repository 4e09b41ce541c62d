"""Policy updates as in PureJaxRL: seeds by `vmap`, epochs and minibatches by `scan`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import auto_sample, ivon, posterior_mean

nn = pytest.importorskip("flax.linen")
train_state = pytest.importorskip("flax.training.train_state")

UPDATES, EPOCHS, MINIBATCHES, STEPS = 15, 2, 4, 64


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16)(x))
        return nn.Dense(3)(x), nn.Dense(1)(x)[..., 0]


def make_train():
    network = ActorCritic()

    def loss_fn(params, batch):
        obs, action, old_log_prob, reward, value = batch
        logits, new_value = network.apply(params, obs)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        ratio, advantage = jnp.exp(log_p - old_log_prob), reward - value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        actor = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
        return actor + 0.5 * jnp.square(new_value - reward).mean()

    def train(rng):
        rng, init_rng, noise_rng = jax.random.split(rng, 3)
        # The seed's own key: with key=0 all seeds would share their draws.
        tx = auto_sample(
            optax.chain(optax.clip_by_global_norm(0.5), ivon(0.3, ess=1e4, hess_init=0.1, b2=0.99)),
            noise_rng,
        )
        params = network.init(init_rng, jnp.zeros((1, 3)))
        state = train_state.TrainState.create(apply_fn=network.apply, params=params, tx=tx)

        def update_step(carry, rng):
            state = carry
            obs_rng, action_rng, *epoch_rngs = jax.random.split(rng, 2 + EPOCHS)
            # A contextual bandit: the largest feature is the right action.
            obs = jax.random.normal(obs_rng, (STEPS, 3))
            logits, value = state.apply_fn(state.params, obs)
            action = jax.random.categorical(action_rng, logits)
            log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
            reward = (action == jnp.argmax(obs, -1)).astype(jnp.float32)
            data = (obs, action, log_prob, reward, value)

            def epoch(state, rng):
                order = jax.random.permutation(rng, STEPS).reshape(MINIBATCHES, -1)
                batches = jax.tree.map(lambda x: x[order], data)

                def minibatch(state, batch):
                    grads = jax.grad(loss_fn)(state.params, batch)
                    return state.apply_gradients(grads=grads), None

                return jax.lax.scan(minibatch, state, batches)

            state, _ = jax.lax.scan(epoch, state, jnp.stack(epoch_rngs))
            return state, reward.mean()

        state, rewards = jax.lax.scan(update_step, state, jax.random.split(rng, UPDATES))
        return state.params, posterior_mean(state), rewards

    return train


def test_policies_of_several_seeds_are_trained_in_one_program():
    rngs = jax.random.split(jax.random.key(0), 3)
    params, mean, rewards = jax.jit(jax.vmap(make_train()))(rngs)
    assert np.all(rewards[:, -3:].mean(axis=1) > rewards[:, :3].mean(axis=1) + 0.15)
    # Each seed has noise of its own, in units of itself.
    noise = np.asarray(params["params"]["Dense_0"]["kernel"] - mean["params"]["Dense_0"]["kernel"])
    correlation = np.corrcoef(noise.reshape(3, -1)) - np.eye(3)
    assert np.abs(correlation).max() < 0.5
