"""The same draws, states and trajectories on one, two, four and eight devices under jit."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ivon_jax import (
    AutoSampleState,
    Eigenbasis,
    IVONState,
    auto_sample,
    ivon,
    mc_value_and_grad,
    sample_params,
)

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SHAPES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}


def mesh_of(devices, axis_type):
    kinds = (axis_type, axis_type)
    return jax.make_mesh(
        SHAPES[devices], ("data", "model"), axis_types=kinds, devices=jax.devices()[:devices]
    )


def put(tree, specs, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def assert_sharded(tree, specs, mesh):
    for name, spec in specs.items():
        assert tree[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), tree[name].ndim)


# --- draws -----------------------------------------------------------------------------------

UNEVEN = {
    "matrix": np.linspace(-1, 1, 96, dtype=np.float32).reshape(8, 12),
    "vector": np.linspace(-2, 1, 8, dtype=np.float32).astype(jnp.bfloat16),
    "scalar": np.float32(0.3),
}
LAYOUTS = {
    "over rows and columns": {
        "matrix": P("data", "model"),
        "vector": P(("data", "model")),
        "scalar": P(),
    },
    "transposed": {
        "matrix": P("model", "data"),
        "vector": P("data"),
        "scalar": P(),
    },
}


@functools.cache
def curved():
    """A state with a different precision for every element, none a power of two."""
    state = ivon(0.1, 10.0, weight_decay=0.3).init(UNEVEN)
    return jax.device_get(state._replace(hess=jax.tree.map(lambda m: 0.1 + m**2, state.mean)))


@functools.cache
def unsharded_draw(impl):
    words = jax.random.key_data(jax.random.key(5, impl=impl))
    return jax.device_get(jax.jit(sample_params)(words, curved(), UNEVEN))


@pytest.mark.parametrize(
    ("devices", "axis_type", "layout", "impl"),
    [
        (1, AUTO, "transposed", "threefry2x32"),
        (2, AUTO, "over rows and columns", "threefry2x32"),
        (2, EXPLICIT, "transposed", "threefry2x32"),
        (4, AUTO, "transposed", "threefry2x32"),
        (4, EXPLICIT, "over rows and columns", "rbg"),
        (8, AUTO, "over rows and columns", "rbg"),
        (8, EXPLICIT, "transposed", "threefry2x32"),
    ],
)
def test_draws_do_not_depend_on_devices_layout_or_axis_type(devices, axis_type, layout, impl):
    mesh, specs = mesh_of(devices, axis_type), LAYOUTS[layout]
    params, mean, hess = (put(x, specs, mesh) for x in (UNEVEN, curved().mean, curved().hess))
    state = curved()._replace(mean=mean, hess=hess, momentum=mean)
    drawn = jax.jit(sample_params)(jax.random.key(5, impl=impl), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, unsharded_draw(impl))
    chex.assert_trees_all_equal(drawn, unsharded_draw(impl))
    for tree in drawn:
        assert_sharded(tree, specs, mesh)


# --- the state's sharding, and what the step adds to the program -------------------------------

SPECS = LAYOUTS["transposed"]
WIDE = jax.tree.map(np.float32, UNEVEN)  # optax's global norm does not add different dtypes
CLIP = optax.clip_by_global_norm(1.0)
OPTIMIZERS = {
    "ivon": ivon(0.1, 100.0),
    "auto_sample of a chain": auto_sample(optax.chain(CLIP, ivon(0.1, 100.0)), key=0),
    "auto_sample in windows": auto_sample(ivon(0.1, 100.0), key=0, num_samples=2),
}


def is_state(x):
    return isinstance(x, IVONState)


def assert_state_sharded_as_parameters(state, mesh):
    (found,) = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    window = [found.window.grads, found.window.products] if found.window else []
    for tree in (found.mean, found.hess, found.momentum, *window):
        assert_sharded(tree, SPECS, mesh)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_init_shards_the_state_as_the_parameters(axis_type, name):
    mesh = mesh_of(8, axis_type)
    state = OPTIMIZERS[name].init(put(WIDE, SPECS, mesh))
    assert_state_sharded_as_parameters(state, mesh)


def test_jitted_init_shards_the_state_on_an_explicit_mesh():
    mesh = mesh_of(8, EXPLICIT)
    state = jax.jit(OPTIMIZERS["auto_sample in windows"].init)(put(WIDE, SPECS, mesh))
    assert_state_sharded_as_parameters(state, mesh)


def test_jitted_init_takes_out_shardings_from_the_parameters():
    mesh, tx = mesh_of(8, AUTO), OPTIMIZERS["auto_sample in windows"]
    params = put(WIDE, SPECS, mesh)
    shardings = optax.tree_map_params(
        tx,
        lambda _, p: p.sharding,
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert_state_sharded_as_parameters(state, mesh)
    chex.assert_trees_all_equal(state, tx.init(WIDE), strict=True)


def take_step(tx, key, params, state, grads):
    if isinstance(state, AutoSampleState):
        updates, state = tx.update(grads, state, params)
    else:
        _, noise = sample_params(key, state, params)
        updates, state = tx.update(grads, state, params, noise=noise)
    return optax.apply_updates(params, updates), state


def collectives(compiled):
    kinds = r"all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter"
    return re.findall(rf"\s({kinds})(?:-start)?\(", compiled.as_text())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_a_donated_step_keeps_the_sharding_and_adds_no_collective(axis_type, name):
    mesh, tx = mesh_of(8, axis_type), OPTIMIZERS[name]
    params, grads = (put(WIDE, SPECS, mesh) for _ in range(2))
    arguments = jax.random.key(0), params, tx.init(params), grads
    step = jax.jit(functools.partial(take_step, tx), donate_argnums=(1, 2))
    compiled = step.lower(*arguments).compile()
    if "chain" in name:
        clipped = jax.jit(lambda g: CLIP.update(g, CLIP.init(g))[0]).lower(grads).compile()
        norm = collectives(clipped)
        assert set(norm) == {"all-reduce"}
        assert collectives(compiled) == norm
    else:
        assert collectives(compiled) == []
    new_params, state = compiled(*arguments)
    assert params["matrix"].is_deleted()
    assert_sharded(new_params, SPECS, mesh)
    assert_state_sharded_as_parameters(state, mesh)


@pytest.mark.parametrize(("spec", "gathers"), [(P(), 0), (P("data", None), 8)])
def test_a_basis_gathers_what_is_split_and_adds_nothing_where_all_is_replicated(spec, gathers):
    """Of noise, out and back, of gradient, mean and step; at a turn of momentum (2) and h."""
    mesh, tx = mesh_of(8, EXPLICIT), ivon(0.1, 100.0, basis=Eigenbasis())
    params = {"w": jax.device_put(np.ones((16, 4), np.float32), NamedSharding(mesh, spec))}
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(take_step, tx))
        compiled = step.lower(jax.random.key(0), params, tx.init(params), params).compile()
    assert collectives(compiled) == ["all-gather"] * gathers
    _, state = compiled(jax.random.key(0), params, tx.init(params), params)
    assert state.hess["w"].sharding.is_equivalent_to(params["w"].sharding, 2)


# --- trajectories ------------------------------------------------------------------------------

STEPS, EXAMPLES = 10, 32
MODEL = {
    "w": np.sin(np.arange(48, dtype=np.float32)).reshape(3, 16),
    "v": np.cos(np.arange(16, dtype=np.float32)),
}
MODEL_SPECS = {"w": P(None, "model"), "v": P("model")}
BATCH = (
    np.sin(np.arange(3 * EXAMPLES, dtype=np.float32)).reshape(EXAMPLES, 3),
    np.cos(np.arange(EXAMPLES, dtype=np.float32)),
)
BATCH_SPECS = (P("data", None), P("data"))


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["w"])
    return jnp.mean((jnp.sum(hidden * params["v"][None], axis=-1) - y) ** 2)


def explicit_step(tx, key, params, state, batch):
    sample, noise = sample_params(key, state)
    updates, state = tx.update(jax.grad(loss)(sample, *batch), state, params, noise=noise)
    return optax.apply_updates(params, updates), state


def drop_in_step(tx, key, params, state, batch):
    updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
    return optax.apply_updates(params, updates), state


def estimator_step(tx, key, params, state, batch):
    _, grads, hess = mc_value_and_grad(loss, 2)(key, state, *batch)
    updates, state = tx.update(grads, state, params, hess=hess)
    return optax.apply_updates(params, updates), state


LEARNER = ivon(0.1, 50.0, hess_init=0.5, b2=0.9)
# Of the rows only: the second moments of three rows have no eigenvectors of sixteen columns.
TURNED = ivon(0.1, 50.0, hess_init=0.5, b2=0.9, basis=Eigenbasis(update_every=2, max_dim=3))
LOOPS = {
    "explicit": (LEARNER, explicit_step),
    "eigenbasis": (TURNED, explicit_step),
    "auto_sample": (auto_sample(LEARNER, key=3), drop_in_step),
    "mc_value_and_grad": (LEARNER, estimator_step),
}


@functools.cache
def trajectory(loop, devices, axis_type):
    """Parameters, mean and hess after every step."""
    tx, step = LOOPS[loop]
    mesh = mesh_of(devices, axis_type)
    params, batch = put(MODEL, MODEL_SPECS, mesh), put(BATCH, BATCH_SPECS, mesh)

    @jax.jit
    def run(params, state, batch):
        def body(carry, key):
            params, state = step(tx, key, *carry, batch)
            now = state.inner_state if loop == "auto_sample" else state
            return (params, state), {"params": params, "mean": now.mean, "hess": now.hess}

        return jax.lax.scan(body, (params, state), jax.random.split(jax.random.key(1), STEPS))[1]

    return jax.device_get(run(params, tx.init(params), batch))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("devices", "axis_type"), [(2, EXPLICIT), (4, AUTO), (8, AUTO), (8, EXPLICIT)]
)
def test_trajectories_do_not_depend_on_the_devices(devices, axis_type, loop):
    # Every step reorders sums over the examples, worth their number times ε of their size.
    rounding = STEPS * EXAMPLES * np.finfo(np.float32).eps
    rounding *= 10 if loop == "eigenbasis" else 1  # eigenvectors move by it over gaps
    alone = trajectory(loop, 1, AUTO)
    spread = trajectory(loop, devices, axis_type)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(spread), strict=True
    ):
        scale = np.max(np.abs(a))
        np.testing.assert_allclose(
            b, a, rtol=0, atol=rounding * scale, err_msg=jax.tree_util.keystr(path)
        )
        assert np.max(np.abs(a[-1] - a[0])) > 50 * rounding * scale


# --- a gradient that is not finite -------------------------------------------------------------

REPLICATED = P()
AVERAGING = ivon(0.1, 50.0, hess_init=0.5, b2=0.9, axis_name="d")
INFINITE = (np.where(np.arange(EXAMPLES)[:, None] == 20, np.float32(np.inf), BATCH[0]), BATCH[1])


def assert_untouched(state, before):
    assert int(state.total_notfinite) == 1
    for x, y in zip(
        jax.tree.leaves(state.inner_state), jax.tree.leaves(before.inner_state), strict=True
    ):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(y)[shard.index])


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_an_infinite_example_on_one_device_leaves_every_device_untouched_under_jit(axis_type):
    mesh, tx = mesh_of(8, axis_type), optax.apply_if_finite(LEARNER, 3)
    params = put(MODEL, MODEL_SPECS, mesh)
    before = tx.init(params)
    step = jax.jit(functools.partial(explicit_step, tx))
    new, state = step(jax.random.key(0), params, before, put(INFINITE, BATCH_SPECS, mesh))
    assert_untouched(state, before)
    chex.assert_trees_all_equal(new, MODEL, strict=True)
    _, state = step(jax.random.key(0), params, before, put(BATCH, BATCH_SPECS, mesh))
    assert int(state.inner_state.count) == 1


def mapped(step, check_vma, out_specs=REPLICATED):
    """`step(state, x, y)` with the examples on four devices."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AUTO,), devices=jax.devices()[:4])
    specs = {"in_specs": (P(), P("d"), P("d")), "out_specs": out_specs}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs, check_vma=check_vma))


def own_sample_gradient(state, x, y):
    key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("d"))
    sample, noise = sample_params(key, state)
    return jax.grad(loss)(sample, x, y), noise


def test_the_mean_over_an_axis_makes_every_device_not_finite():
    def step(state, x, y):
        grads, noise = own_sample_gradient(state, x, y)
        _, state = AVERAGING.update(grads, state, noise=noise)
        return jax.tree.map(lambda a: a[None], (state.mean["w"], state.hess["w"]))

    mean, hess = mapped(step, False, P("d"))(AVERAGING.init(MODEL), *INFINITE)
    assert mean.shape[0] == hess.shape[0] == 4
    assert np.all(np.isnan(mean)) and not np.any(np.isfinite(hess))


def test_apply_if_finite_under_shard_map_refuses_averaged_estimates_on_every_device():
    tx = optax.apply_if_finite(LEARNER, 3)

    def step(state, x, y):
        _, grads, hess = mc_value_and_grad(loss, axis_name="d")(jax.random.key(0), state, x, y)
        return tx.update(grads, state, hess=hess)[1]

    before, run = tx.init(MODEL), mapped(step, True)
    assert_untouched(run(before, *INFINITE), before)
    assert int(run(before, *BATCH).inner_state.count) == 1


def agreed(grads):
    """NaN on every device if a gradient on one of them is not finite."""
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
    finite = jax.lax.pmin(finite.astype(jnp.int32), "d")
    return jax.tree.map(lambda g: jnp.where(finite == 1, g, jnp.nan), grads)


def test_apply_if_finite_around_axis_name_needs_devices_that_agree():
    tx = optax.apply_if_finite(AVERAGING, 3)

    def step(state, x, y):
        grads, noise = own_sample_gradient(state, x, y)
        return tx.update(agreed(grads), state, noise=noise)[1]

    before, run = tx.init(MODEL), mapped(step, False)
    assert_untouched(run(before, *INFINITE), before)
    assert int(run(before, *BATCH).inner_state.count) == 1
    with pytest.raises(TypeError, match="cond branches must have equal output types"):
        mapped(step, True)(before, *BATCH)
