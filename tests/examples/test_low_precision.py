"""Digits trained in bfloat16 are as good as those trained in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason='needs: pip install -e ".[examples]"')

from examples._shared.datasets import load_small_digits
from examples._shared.networks import MLP
from examples._shared.training import classification_loss, train
from ivon_jax import auto_sample, ivon, metrics, predict_log_probs, recipes

SEEDS = 4


def losses(dtype):
    """NLL of 32 averaged samples, for each seed."""
    data, network = load_small_digits(), MLP()
    images = data.train_images.astype(dtype)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    start = network.init(jax.random.key(0), images[:1])
    settings = recipes.start(start, num_examples=1000, num_steps=200, learning_rate=0.3)

    def apply(params, images):
        return network.apply(params, images).astype(jnp.float32)

    def nll(key):
        init_key, noise_key, shuffle_key, draw_key = jax.random.split(key, 4)
        params = network.init(init_key, images[:1])
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        params, state = train(
            auto_sample(ivon(**settings), noise_key),
            classification_loss(apply),
            params,
            (images, data.train_labels),
            key=shuffle_key,
            epochs=10,
            batch_size=50,
            progress=False,
        )
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        test = data.test_images.astype(dtype)
        log_probs = predict_log_probs(apply, 32)(draw_key, state, test, params=params)
        return metrics.nll(log_probs, data.test_labels)

    return np.asarray(jax.vmap(nll)(keys))


@pytest.mark.slow
def test_digits_in_bfloat16_reach_the_loss_of_float32():
    full, half = losses(jnp.float32), losses(jnp.bfloat16)
    difference = half - full  # with the same initial weights, order and noise
    error = difference.std(ddof=1) / np.sqrt(SEEDS)
    assert full.mean() < 0.2
    assert abs(difference.mean()) < 3 * error
    assert error < 0.01
