"""What `axis_name` does under vmap, pmap and shard_map, and what it refuses."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from ivon_jax import ivon, sample_params

DEVICES = 4
PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.5, 0.1])}
X = jnp.sin(jnp.arange(2.0 * 16)).reshape(16, 2)
SETTINGS = {"ess": 30.0, "hess_init": 0.5, "b2": 0.5}
# Means of four numbers of order one in another order.
REORDERED = {"rtol": 1e-5, "atol": 1e-6}


def loss(params, x):
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"][None]) ** 2, axis=-1))


def device_step(tx, key, state, x):
    """One step in which each device draws its own sample."""
    key = jax.random.fold_in(key, jax.lax.axis_index("d"))
    sample, noise = sample_params(key, state)
    return tx.update(jax.grad(loss)(sample, x), state, noise=noise)


def reference():
    """The same step on one device, with the four samples on a Monte Carlo axis."""
    tx = ivon(0.1, **SETTINGS)
    state = tx.init(PARAMS)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(DEVICES))
    samples, noise = jax.vmap(sample_params, (0, None))(keys, state)
    grads = jax.vmap(jax.grad(loss))(samples, X.reshape(DEVICES, 4, 2))
    return tx.update(grads, state, noise=noise)


def assert_equals_reference(result):
    chex.assert_trees_all_close(result, reference(), **REORDERED)


def mesh():
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_a_sample_on_each_device_equals_stacked_samples(check_vma):
    tx = ivon(0.1, **SETTINGS, axis_name="d")
    replicated, split = PartitionSpec(), PartitionSpec("d")
    step = jax.shard_map(
        functools.partial(device_step, tx, jax.random.key(0)),
        mesh=mesh(),
        in_specs=(replicated, split),
        out_specs=replicated,
        check_vma=check_vma,
    )
    assert_equals_reference(jax.jit(step)(tx.init(PARAMS), X))


def test_vmap_with_an_axis_name_equals_stacked_samples():
    tx = ivon(0.1, **SETTINGS, axis_name="d")
    step = jax.vmap(
        functools.partial(device_step, tx, jax.random.key(0)),
        in_axes=(None, 0),
        out_axes=None,
        axis_name="d",
    )
    assert_equals_reference(jax.jit(step)(tx.init(PARAMS), X.reshape(DEVICES, 4, 2)))


def test_pmap_equals_stacked_samples():
    tx = ivon(0.1, **SETTINGS, axis_name="d")
    step = jax.pmap(
        functools.partial(device_step, tx, jax.random.key(0)),
        in_axes=(None, 0),
        out_axes=None,
        axis_name="d",
        devices=jax.devices()[:DEVICES],
    )
    assert_equals_reference(step(tx.init(PARAMS), X.reshape(DEVICES, 4, 2)))


def test_two_axes_are_averaged_together():
    tx = ivon(0.1, **SETTINGS, axis_name=("r", "c"))
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda p: jnp.stack([p * i for i in range(4)]), PARAMS)
    square = jax.tree.map(lambda g: g.reshape(2, 2, *g.shape[1:]), grads)

    def update(g):
        return tx.update(g, state, noise=g)

    for name in ("c", "r"):
        update = jax.vmap(update, out_axes=None, axis_name=name)
    stacked = ivon(0.1, **SETTINGS).update(grads, state, noise=grads)
    chex.assert_trees_all_close(update(square), stacked, **REORDERED)


def test_the_summed_gradient_of_a_replicated_sample_is_refused_under_shard_map():
    tx = ivon(0.1, **SETTINGS, axis_name="d")
    state = tx.init(PARAMS)
    sample, noise = sample_params(jax.random.key(0), state)

    def step(sample, x):
        return tx.update(jax.grad(loss)(sample, x), state, noise=noise)

    specs = {"in_specs": (PartitionSpec(), PartitionSpec("d")), "out_specs": PartitionSpec()}
    with pytest.raises(ValueError, match=r"axis_name='d'.*already summed.*axis size"):
        jax.jit(jax.shard_map(step, mesh=mesh(), **specs))(sample, X)
    # With check_vma=False nothing is known of the gradient, and nothing may be refused.
    jax.jit(jax.shard_map(step, mesh=mesh(), **specs, check_vma=False))(sample, X)


def test_an_axis_that_is_not_mapped_is_an_error():
    tx = ivon(0.1, **SETTINGS, axis_name="d")
    with pytest.raises(NameError, match="d"):
        tx.update(PARAMS, tx.init(PARAMS), noise=PARAMS)


@pytest.mark.parametrize("value", [3, ["d"], ("d", None)])
def test_an_axis_name_of_the_wrong_type_is_refused_at_construction(value):
    with pytest.raises(TypeError, match="axis_name must be the name of an axis"):
        ivon(0.1, **SETTINGS, axis_name=value)


def test_axis_name_works_under_chain_and_inject_hyperparams():
    for tx in (
        optax.chain(optax.identity(), ivon(0.1, **SETTINGS, axis_name="d")),
        optax.inject_hyperparams(ivon)(0.1, **SETTINGS, axis_name="d"),
    ):
        step = jax.vmap(
            functools.partial(device_step, tx, jax.random.key(0)),
            in_axes=(None, 0),
            out_axes=None,
            axis_name="d",
        )
        updates, _ = step(tx.init(PARAMS), X.reshape(DEVICES, 4, 2))
        chex.assert_trees_all_close(updates, reference()[0], **REORDERED)
