"""Prediction, sensitivity and their relatives under `shard_map` over the examples."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ivon_jax import (
    Posterior,
    leave_one_out,
    linearize,
    predict_draws,
    predict_log_probs,
    sensitivity,
)

Q = Posterior(jnp.arange(6.0).reshape(2, 3) / 6, jnp.arange(1.0, 7.0).reshape(2, 3))
X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2)), jnp.float32)
LABELS = jnp.arange(8, dtype=jnp.int32) % 3
KEY = jax.random.key(0)


def apply(w, x):
    return jnp.tanh(x @ w)


def over_examples(f, *data):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    specs = (P(), *(P("data") for _ in data))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("data")))(Q, *data)


CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
USES = {
    "linearize": lambda q, x, y: linearize(apply)(q, x),
    "sensitivity": lambda q, x, y: sensitivity(apply, CROSS_ENTROPY)(q, x, targets=y),
    "leave_one_out": lambda q, x, y: leave_one_out(apply, CROSS_ENTROPY, second_order=True)(
        q, x, targets=y
    ),
    "predict": lambda q, x, y: predict_log_probs(apply, 5, sample_batch_size=2)(KEY, q, x),
}


@pytest.mark.parametrize("use", USES)
def test_examples_on_different_devices_give_the_same_results(use):
    alone, spread = USES[use](Q, X, LABELS), over_examples(USES[use], X, LABELS)
    chex.assert_trees_all_close(alone, spread, rtol=2e-4, atol=1e-5)


def test_every_device_draws_noise_of_its_own_around_the_same_sample():
    def draw(q, x):
        return predict_draws(apply, 1, noise_variance=1.0)(KEY, q, x)[0]

    noise = over_examples(draw, jnp.tile(X[:2], (4, 1))).reshape(4, -1)
    assert len(np.unique(np.round(noise, 4), axis=0)) == 4
