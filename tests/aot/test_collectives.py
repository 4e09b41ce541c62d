"""On a TPU pod the steps of IVON have AdamW's collectives, in number, kind and shape, and no more.

libtpu compiles for a topology of 64 chips on a machine that has none.
"""

import functools
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.tpu.hlo_collectives import collectives
from ivon_jax import auto_sample, ivon, mc_value_and_grad, sample_params

pytest.importorskip("libtpu", reason='the TPU compiler comes with: pip install -e ".[aot]"')

LAYERS, WIDTH, ROWS = 2, 256, 64
KEY = jax.random.key(0)


@functools.cache
def mesh():
    devices = topologies.get_topology_desc(topology_name="v5e:8x8", platform="tpu").devices
    return Mesh(
        np.array(devices).reshape(16, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
    )


# Matrices are in shards of both axes, biases in those of their activations. The other small leaves
# are on every chip, or in shards as well.
SMALL = {"replicated": P(), "sharded": P("fsdp")}


def layers(scanned, small):
    """Shapes and shardings of layers x + W₂ gelu(W₁ x·scale + b₁) and of an embedding."""
    one = {
        "up": ((WIDTH, 4 * WIDTH), P("fsdp", "tensor")),
        "down": ((4 * WIDTH, WIDTH), P("tensor", "fsdp")),
        "bias": ((4 * WIDTH,), P("tensor")),
        "scale": ((WIDTH,), SMALL[small]),
    }
    stacked = {k: ((LAYERS, *shape), P(None, *spec)) for k, (shape, spec) in one.items()}
    tree = {"blocks": stacked if scanned else [one] * LAYERS, "out": ((WIDTH, 1000), P("fsdp"))}
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda x: on_mesh(x[0], x[1]), tree, is_leaf=is_leaf)


def on_mesh(shape, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh(), spec))


def loss(params, x):
    def block(x, p):
        hidden = jax.nn.gelu((x * p["scale"][None]) @ p["up"] + p["bias"][None])
        return x + hidden @ p["down"], None

    if isinstance(params["blocks"], list):
        for p in params["blocks"]:
            x, _ = block(x, p)
    else:
        x, _ = jax.lax.scan(block, x, params["blocks"])
    return jnp.mean(jax.nn.logsumexp(x @ params["out"], axis=-1))


def clipped(optimizer):
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def drop_in(tx):
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def explicit(tx):
    def step(params, state, x):
        sample, noise = sample_params(jax.random.fold_in(KEY, state[1].count), state)
        updates, state = tx.update(jax.grad(loss)(sample, x), state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def estimated(tx):
    def step(params, state, x):
        key = jax.random.fold_in(KEY, state[1].count)
        _, grads, hess = mc_value_and_grad(loss)(key, state, x)
        updates, state = tx.update(grads, state, params, hess=hess)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def compiled_collectives(form, params):
    init, step = form
    x = on_mesh((ROWS, WIDTH), P("fsdp"))
    state = jax.eval_shape(init, params)
    replicated = NamedSharding(mesh(), P())
    # Arrays of the state that belong to a parameter have the end of its path, and its shape.
    parameters = [(path[-2:], x) for path, x in jax.tree_util.tree_leaves_with_path(params)]

    def placed(path, x):
        for end, p in parameters:
            if path[-len(end) :] == end and x.shape == p.shape:
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    state = jax.tree_util.tree_map_with_path(placed, state)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    with jax.numpy_dtype_promotion("standard"):  # adamw needs it
        return collectives(jitted.lower(params, state, x).compile().as_text())


IVON = clipped(ivon(0.1, ess=1e6))
FORMS = {
    "auto_sample": drop_in(auto_sample(IVON, 0)),
    "lean": drop_in(auto_sample(IVON, 0, store_mean=False)),
    "antithetic": drop_in(auto_sample(IVON, 0, antithetic=True)),
    "explicit": explicit(IVON),
    "mc_value_and_grad": estimated(IVON),
}


@functools.cache
def of_adamw(scanned, small):
    return compiled_collectives(drop_in(clipped(optax.adamw(1e-3))), layers(scanned, small))


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("scanned", [False, True], ids=["layers", "scanned layers"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_has_the_collectives_of_adamw(form, scanned, small):
    found = compiled_collectives(FORMS[form], layers(scanned, small))
    adamw = of_adamw(scanned, small)
    assert adamw.total() > 10
    assert found == adamw, (found - adamw, adamw - found)
