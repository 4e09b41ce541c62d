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


def drop_in(optimizer):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def sampled(optimizer, **options):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    tx = auto_sample(tx, 0, **options)

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def explicit(optimizer):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def step(params, state, x):
        sample, noise = sample_params(jax.random.fold_in(KEY, state[1].count), state)
        updates, state = tx.update(jax.grad(loss)(sample, x), state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def estimated(optimizer):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def step(params, state, x):
        key = jax.random.fold_in(KEY, state[1].count)
        _, grads, hess = mc_value_and_grad(loss)(key, state, x)
        updates, state = tx.update(grads, state, params, hess=hess)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def compiled_collectives(build, params):
    init, step = build
    x = on_mesh((ROWS, WIDTH), P("fsdp"))
    state = jax.eval_shape(init, params)
    replicated = NamedSharding(mesh(), P())
    by_path = {p[-2:]: s.sharding for p, s in jax.tree_util.tree_leaves_with_path(params)}

    def placed(path, x):
        for length in range(len(path)):
            for name, sharding in by_path.items():
                if path[length : length + 2] == name and x.ndim:
                    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    state = jax.tree_util.tree_map_with_path(placed, state)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    with jax.numpy_dtype_promotion("standard"):  # adamw needs it
        return collectives(jitted.lower(params, state, x).compile().as_text())


IVON = ivon(0.1, ess=1e6)
FORMS = {
    "auto_sample": lambda: sampled(IVON),
    "lean": lambda: sampled(IVON, store_mean=False),
    "antithetic": lambda: sampled(IVON, antithetic=True),
    "explicit": lambda: explicit(IVON),
    "mc_value_and_grad": lambda: estimated(IVON),
}


@functools.cache
def of_adamw(scanned, small):
    return compiled_collectives(drop_in(optax.adamw(1e-3)), layers(scanned, small))


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("scanned", [False, True], ids=["layers", "scanned layers"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_has_the_collectives_of_adamw(form, scanned, small):
    found = compiled_collectives(FORMS[form](), layers(scanned, small))
    adamw = of_adamw(scanned, small)
    assert adamw.total() > 10
    assert found == adamw, (found - adamw, adamw - found)
