"""Samples of `mc_value_and_grad` over a mesh axis: one for each group, at the cost of one."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ivon_jax import ivon, mc_value_and_grad

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8), "b": jnp.linspace(0.0, 1.0, 8)}
X = jnp.sin(jnp.arange(16.0 * 8)).reshape(16, 8)
# Sums of 16 terms of order one in another order, and a mean of four of them.
REORDERED = {"rtol": 1e-5, "atol": 1e-5}


def loss(params, x):
    return jnp.mean(jnp.square(x @ params["w"] + params["b"][None]))


def on_mesh(kind):
    """A mesh of four groups of two devices, and state and batch on it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
    params = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in PARAMS.items()}
    batch = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    return mesh, ivon(0.1, ess=50.0, hess_init=0.5).init(params), batch


def reference(**options):
    state = ivon(0.1, ess=50.0, hess_init=0.5).init(PARAMS)
    return mc_value_and_grad(loss, **options)(jax.random.key(1), state, X)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("num_samples", [4, 8])
def test_samples_split_over_a_mesh_axis_equal_those_on_one_device(kind, num_samples):
    mesh, state, batch = on_mesh(kind)
    options = {"num_samples": num_samples, "sample_batch_size": 4, "split_batch": True}
    f = mc_value_and_grad(loss, **options, spmd_axis_name="data")
    with jax.set_mesh(mesh):
        result = jax.jit(f)(jax.random.key(1), state, batch)
    chex.assert_trees_all_close(result, reference(**options), **REORDERED)
    shardings = [x.sharding for x in jax.tree.leaves(result[1:])]
    owners = [x.sharding for x in jax.tree.leaves((state.mean, state.mean))]
    ranks = [x.ndim for x in jax.tree.leaves((state.mean, state.mean))]
    assert all(a.is_equivalent_to(b, n) for a, b, n in zip(shardings, owners, ranks, strict=True))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_samples_one_after_another_work_on_any_mesh(kind):
    mesh, state, batch = on_mesh(kind)
    with jax.set_mesh(mesh):
        result = jax.jit(mc_value_and_grad(loss, num_samples=3))(jax.random.key(1), state, batch)
    chex.assert_trees_all_close(result, reference(num_samples=3), **REORDERED)


def test_a_sample_for_each_group_costs_what_one_sample_costs():
    mesh, state, batch = on_mesh(AUTO)

    def compiled(**options):
        f = jax.jit(mc_value_and_grad(loss, **options))
        with jax.set_mesh(mesh):
            return f.lower(jax.random.key(1), state, batch).compile()

    one = compiled()
    four = compiled(num_samples=4, sample_batch_size=4, split_batch=True, spmd_axis_name="data")
    flops = [c.cost_analysis()["flops"] for c in (one, four)]
    # Four draws on one device of the eight would be more than twice the work.
    assert flops[1] < 1.2 * flops[0]
    assert "all-gather" not in four.as_text() and "all-to-all" not in four.as_text()


@pytest.mark.parametrize("name", ["data", ("rows", "data")])
def test_without_a_mesh_that_has_the_axis_the_error_says_what_to_do(name):
    f = mc_value_and_grad(loss, num_samples=4, sample_batch_size=4, spmd_axis_name=name)
    state = ivon(0.1, ess=50.0).init(PARAMS)
    with pytest.raises(ValueError, match=r"spmd_axis_name.*jax\.set_mesh"):
        jax.jit(f)(jax.random.key(1), state, X)


def test_samples_that_cannot_be_split_are_refused():
    for wrong in ({}, {"sample_batch_size": 3}):
        with pytest.raises(ValueError, match="give their number as sample_batch_size"):
            mc_value_and_grad(loss, num_samples=4, **wrong, spmd_axis_name="data")
    mesh, state, batch = on_mesh(AUTO)
    f = mc_value_and_grad(loss, num_samples=6, sample_batch_size=6, spmd_axis_name="data")
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"sample_batch_size=6 .* over 4 devices"),
    ):
        jax.jit(f)(jax.random.key(1), state, batch)
