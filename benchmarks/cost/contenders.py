"""The optimizers that are compared, each as one training step of the same form."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ivon_jax import auto_sample, ivon, sample_params

PyTree = Any
ValueAndGrad = Callable[[PyTree], tuple[jax.Array, PyTree]]

# The cost does not depend on the values, as long as all of them stay finite.
IVON: dict[str, Any] = {"learning_rate": 1e-3, "ess": 1e6}


class Contender(NamedTuple):
    """An optimizer in a training loop.

    Attributes:
      init: from parameters to everything that the loop carries, in buffers of its own.
      step: from what is carried, and the loss and its gradient as a function of the parameters, to
        what is carried next and the loss.
    """

    init: Callable[[PyTree], PyTree]
    step: Callable[[PyTree, ValueAndGrad], tuple[PyTree, jax.Array]]


def plain(tx: optax.GradientTransformation) -> Contender:
    """A loop that was written for AdamW."""

    def init(params: PyTree) -> PyTree:
        params = jax.tree.map(jnp.array, params)
        return params, tx.init(params)

    def step(carry: PyTree, value_and_grad: ValueAndGrad) -> tuple[PyTree, jax.Array]:
        params, state = carry
        loss, grads = value_and_grad(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return Contender(init, step)


def explicit() -> Contender:
    """The explicit loop of README."""
    tx = ivon(**IVON)

    def init(params: PyTree) -> PyTree:
        params = jax.tree.map(jnp.array, params)
        return params, tx.init(params), jax.random.key(0)

    def step(carry: PyTree, value_and_grad: ValueAndGrad) -> tuple[PyTree, jax.Array]:
        params, state, key = carry
        key, draw_key = jax.random.split(key)
        sample, noise = sample_params(draw_key, state)
        loss, grads = value_and_grad(sample)
        updates, state = tx.update(grads, state, params, noise=noise)
        return (optax.apply_updates(params, updates), state, key), loss

    return Contender(init, step)


def peer(path: Path) -> Contender:
    """The authors' JAX implementation, a file that is not on the package index, as it documents."""
    spec = importlib.util.spec_from_file_location("peer_ivon", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tx = module.ivon(IVON["learning_rate"], IVON["ess"], 1.0, 0.9, 0.99999, 1e-4)

    def init(params: PyTree) -> PyTree:
        params = jax.tree.map(jnp.array, params)
        return params, tx.init(params), jax.random.key(0)

    def step(carry: PyTree, value_and_grad: ValueAndGrad) -> tuple[PyTree, jax.Array]:
        params, state, key = carry
        key, draw_key = jax.random.split(key)
        sample, noise = tx.sampled_params(draw_key, params, state)
        loss, grads = value_and_grad(sample)
        state = tx.accumulate(grads, state, noise)
        updates, state = tx.step(state, params)
        return (optax.apply_updates(params, updates), state, key), loss

    return Contender(init, step)


def without_draws() -> Contender:
    """`ivon` alone with an estimate of h given: what is left of the step without random numbers."""
    tx = ivon(**IVON)

    def init(params: PyTree) -> PyTree:
        params = jax.tree.map(jnp.array, params)
        return params, tx.init(params)

    def step(carry: PyTree, value_and_grad: ValueAndGrad) -> tuple[PyTree, jax.Array]:
        params, state = carry
        loss, grads = value_and_grad(params)
        updates, state = tx.update(grads, state, params, hess=grads)
        return (optax.apply_updates(params, updates), state), loss

    return Contender(init, step)


def lean(**options: Any) -> Contender:
    """`auto_sample` without a stored mean."""
    return plain(auto_sample(ivon(**IVON, **options), 0, store_mean=False))


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "optax.adamw": lambda: plain(optax.adamw(1e-3)),
    "optax.sgd": lambda: plain(optax.sgd(1e-3, momentum=0.9)),
    "auto_sample": lambda: plain(auto_sample(ivon(**IVON), 0)),
    "auto_sample, lean": lean,
    "lean, bfloat16 momentum": lambda: lean(momentum_dtype=jnp.bfloat16),
    "antithetic": lambda: plain(auto_sample(ivon(**IVON), 0, antithetic=True)),
    "explicit": explicit,
    "no draw, h given": without_draws,
}
BASELINE = "optax.adamw"


def build(names: list[str], peer_path: Path | None) -> dict[str, Contender]:
    """The named contenders, AdamW first, and the peer if there is one."""
    chosen = [BASELINE, *(name for name in names if name != BASELINE)]
    built = {name: CONTENDERS[name]() for name in chosen}
    return built if peer_path is None else {**built, "JAX peer": peer(peer_path)}
