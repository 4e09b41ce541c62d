"""Prediction, sensitivity and their relatives under `shard_map` over the examples."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from ivon_jax import (
    Posterior,
    diagnostics,
    ivon,
    leave_one_out,
    linearize,
    metrics,
    predict_draws,
    predict_log_probs,
    prune,
    sensitivity,
    task_arithmetic,
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


def test_a_posterior_on_each_device_is_described_and_pruned_there():
    settings = {"learning_rate": 0.1, "ess": 100.0}
    tx = ivon(**settings)
    params = jnp.asarray(np.random.default_rng(0).standard_normal((4, 9)), jnp.float32)
    states = jax.vmap(tx.init)(params)

    def described(state):
        numbers = diagnostics(state, settings)["signal_to_noise/p50"]
        return prune(state, fraction=0.5)[0].mean, numbers

    def on_device(states):
        found = described(jax.tree.map(lambda x: x[0], states))
        return jax.tree.map(lambda x: x[None], found)

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spread = jax.shard_map(on_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    chex.assert_trees_all_close(jax.jit(spread)(states), jax.vmap(described)(states), rtol=1e-6)


@pytest.mark.parametrize(
    "use",
    {
        **USES,
        "batches of data": lambda q, x, y: predict_log_probs(apply, 4, data_batch_size=3)(
            KEY, q, x
        ),
        "batches of examples": lambda q, x, y: sensitivity(apply, CROSS_ENTROPY, data_batch_size=3)(
            q, x, targets=y
        ),
        "ece": lambda q, x, y: [
            metrics.ece(jax.nn.log_softmax(apply(q.mean, x)), y, equal_mass=mass)
            for mass in (False, True)
        ],
        "risk": lambda q, x, y: metrics.risk_coverage(jax.nn.log_softmax(apply(q.mean, x)), y),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_examples_on_an_explicit_mesh_give_the_same_results(use):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    alone = use[1](Q, X, LABELS)
    with jax.set_mesh(mesh):
        q = jax.device_put(Q, P())
        x, y = jax.device_put((X, LABELS), P("data"))
        spread = jax.jit(use[1])(q, x, y)
    chex.assert_trees_all_close(alone, spread, rtol=2e-4, atol=1e-5)


def test_weights_on_an_explicit_mesh_are_summed_where_they_are():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        a, b = (jax.device_put(x * jnp.arange(8.0), P("model")) for x in (1.0, 3.0))
        merged = task_arithmetic([b], a, weights=[0.5])
        assert jax.typeof(merged).sharding == jax.typeof(a).sharding
    np.testing.assert_array_equal(merged, 2 * np.arange(8.0))
