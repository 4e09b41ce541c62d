"""What one of several processes does in `test_processes.py`; the test does the same alone."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ivon_jax import ivon, sample_params

STEPS = 10
HEARTBEAT = 10
PARAMS = {
    "matrix": np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3),
    "vector": np.linspace(-1, 1, 8, dtype=np.float32),
    "scalar": np.float32(0.3),
}
SPECS = {
    "matrix": PartitionSpec("x", None),
    "vector": PartitionSpec("x"),
    "scalar": PartitionSpec(),
}
INPUTS = np.sin(np.arange(96, dtype=np.float32)).reshape(32, 3)
TARGETS = np.cos(np.arange(32, dtype=np.float32))


def mesh_of(devices):
    return jax.make_mesh((len(devices),), ("x",), axis_types=(AxisType.Auto,), devices=devices)


def spread(mesh, array, spec):
    """A global array of which every process makes its own part."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(np.shape(array), sharding, lambda i: array[i])


def named(what, tree):
    return {f"{leaf}-{what}": array for leaf, array in tree.items()}


def draw(mesh):
    """Sample and noise of a posterior whose elements lie on different devices."""
    params = {name: spread(mesh, array, SPECS[name]) for name, array in PARAMS.items()}
    state = ivon(0.1, 10.0, weight_decay=0.3).init(params)
    state = state._replace(hess=jax.tree.map(lambda m: 0.1 + m**2, state.mean))
    sample, noise = jax.jit(sample_params)(jax.random.key(3), state)
    return named("sample", sample) | named("noise", noise)


def loss(params, inputs, targets):
    outputs = jnp.tanh(inputs @ params["w"] + params["b"])
    return jnp.mean((outputs - targets) ** 2)


def train(mesh, steps=STEPS, after_step=lambda t: None):
    """Data-parallel training: replicated parameters, examples on all devices."""
    tx = ivon(0.2, 50.0, b2=0.9)
    params = {
        "w": spread(mesh, np.array([0.5, -0.5, 1.0], np.float32), PartitionSpec()),
        "b": spread(mesh, np.zeros((), np.float32), PartitionSpec()),
    }
    batch = [spread(mesh, array, PartitionSpec("x")) for array in (INPUTS, TARGETS)]
    state = tx.init(params)

    @jax.jit
    def step(key, params, state, batch):
        sample, noise = sample_params(key, state)
        grads = jax.grad(loss)(sample, *batch)
        updates, state = tx.update(grads, state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(jax.random.key(t), params, state, batch)
        jax.block_until_ready(params)
        after_step(t)
    return named("mean", state.mean) | named("hess", state.hess)


def save_parts(folder, arrays):
    """What this process holds of each array; NaN elsewhere."""
    for name, array in arrays.items():
        whole = np.full(array.shape, np.nan, np.float32)
        for shard in array.addressable_shards:
            whole[shard.index] = shard.data
        np.save(folder / f"{name}.{jax.process_index()}.npy", whole)


def main(task, process, processes, port, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        int(processes),
        int(process),
        heartbeat_timeout_seconds=HEARTBEAT if task == "forever" else 100,
    )
    folder = pathlib.Path(folder)
    mesh = mesh_of(jax.devices())
    if task == "forever":
        started = folder / f"started.{process}"
        train(mesh, 10**9, lambda t: started.touch() if t == 3 else None)
    save_parts(folder, draw(mesh))
    save_parts(folder, train(mesh))


if __name__ == "__main__":
    main(*sys.argv[1:])
