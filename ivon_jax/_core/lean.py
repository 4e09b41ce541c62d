"""The mean of `auto_sample(store_mean=False)`, which is in the sample and its key alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ivon_jax._core.compiler import computed_once, rounded
from ivon_jax._core.noise import THREEFRY, gaussian_noise
from ivon_jax._core.state import (
    AutoSampleState,
    IVONState,
    Posterior,
    find_states,
    gaussian,
    is_auto_sample_state,
    is_ivon_state,
    is_lean,
    merge_owned,
    precision_leaves,
)
from ivon_jax._core.trees import PyTree, Slots, get_field, wide_dtype, without_nnx


def gaussian_at(state: PyTree, params: PyTree | None) -> Posterior:
    """As `gaussian`; a mean that is not stored is recovered from the loop's parameters."""
    return gaussian(with_means(state, params))


def with_means(state: PyTree, params: PyTree | None) -> PyTree:
    """The state with the means in it, m = θ − n, where `auto_sample` does not store them.

    Raises:
      ValueError: if `params` are needed and are not given, or do not fit the state.
    """
    if isinstance(state, Posterior) or params is None:
        return state

    def recover(node: Any) -> Any:
        if not is_auto_sample_state(node):
            return node
        parts = find_states(get_field(node, "inner_state"))
        if not any(map(is_lean, parts)):
            return node
        plain = AutoSampleState(
            **without_nnx({f: get_field(node, f) for f in AutoSampleState._fields})
        )
        return plain._replace(inner_state=_recovered(plain, parts, params))

    return jax.tree.map(recover, state, is_leaf=is_auto_sample_state)


def without_means(state: PyTree) -> PyTree:
    """The state with every mean left out."""

    def drop(node: Any) -> Any:
        if not is_ivon_state(node):
            return node
        return node._replace(mean=jax.tree.map(lambda _: optax.MaskedNode(), node.mean))

    return jax.tree.map(drop, state, is_leaf=is_ivon_state)


def check_recoverable(state: PyTree, params: PyTree) -> None:
    """Refuses parameters in which the mean would drown in rounding.

    Raises:
      TypeError: if an owned leaf of `params` is below float32.
    """
    for part in find_states(state):
        slots = Slots(part.mean)
        for path, p in zip(slots.paths, slots.split("params", params)[0], strict=True):
            if wide_dtype(p.dtype) != p.dtype:
                raise TypeError(
                    f"store_mean=False recovers the mean from the loop's parameters, and these are "
                    f"{p.dtype} at {path or 'the root'}, which would lose its low bits at every "
                    "step: use store_mean=True, or float32 parameters."
                )


def _recovered(state: AutoSampleState, parts: list[IVONState], params: PyTree) -> PyTree:
    precisions = [Slots(part.hess).join(precision_leaves(part)) for part in parts]
    slots = Slots(functools.reduce(merge_owned, precisions))
    owned, _ = slots.split("params", params)
    slots.check_shapes("params", owned)
    key = jax.random.wrap_key_data(state.draw_key, impl=THREEFRY)
    noise = gaussian_noise(key, slots.leaves, state.sign())
    means = slots.join(
        computed_once(
            [
                p.astype(n.dtype) - jnp.where(state.at_mean, 0, rounded(n))
                for p, n in zip(owned, noise, strict=True)
            ]
        )
    )

    def fill(node: Any) -> Any:
        if not is_ivon_state(node):
            return node
        (part,) = find_states(node)
        own = Slots(part.hess)
        return part._replace(mean=own.join(own.split("the mean", means)[0]))

    return jax.tree.map(fill, state.inner_state, is_leaf=is_ivon_state)
