"""From gradients and noise to a step: at once, or when a window of `auto_sample` closes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.checks import check_floating
from ivon_jax._core.rule import LeafPrior, hess_estimate
from ivon_jax._core.state import (
    IVONState,
    Window,
    leaf_priors,
    precision_leaves,
)
from ivon_jax._core.trees import Owned, PyTree


class Draw(NamedTuple):
    """What `auto_sample` hands to `ivon` as noise.

    Attributes:
      noise: coordinates of the noise of the point at which the gradient was taken.
      at_sample: false if that point is the mean: such a gradient must not move `hess`.
      closes: whether the step is taken now, or the statistics only accumulated.
    """

    noise: PyTree
    at_sample: jax.Array | bool = True
    closes: jax.Array | bool = True


Leaves = list[jax.Array]


def lined_up(
    own: Owned, grads: Leaves, name: str, other: PyTree
) -> tuple[Leaves, Leaves, Callable[[Leaves], Leaves]]:
    """ĝ_s, the owned leaves of `other`, and what averages such leaves over samples s, if any."""
    leaves, _ = own.split(name, other)
    check_floating(own, name, leaves)
    stacked = own.num_samples(**{"grads": grads, name: leaves}) is not None

    def mean(leaves: Leaves) -> Leaves:
        return [jnp.mean(x, axis=0) for x in leaves] if stacked else leaves

    def wide(leaves: Leaves) -> Leaves:
        return [jnp.asarray(x, m.dtype) for x, m in zip(leaves, own.leaves, strict=True)]

    return wide(grads), wide(leaves), mean


def step_or_wait(
    step: Callable[..., IVONState],
    state: IVONState,
    grads: list[jax.Array],
    products: list[jax.Array],
    draw: Draw,
) -> IVONState:
    """Takes the step from n⊙ĝ, or adds to an unfinished window of `auto_sample`."""
    if not isinstance(state.window, Window):
        draws = jnp.asarray(draw.at_sample, jnp.int32)
        return step(state, grads, _hess_estimate(state, products, draws))
    products = [jnp.where(draw.at_sample, x, 0) for x in products]
    window = Window(
        calls=state.window.calls + 1,
        draws=state.window.draws + jnp.asarray(draw.at_sample, jnp.int32),
        grads=_plus(state.window.grads, grads),
        products=_plus(state.window.products, products),
    )
    carried = state._replace(window=())

    def close() -> IVONState:
        grads = [g / window.calls.astype(g.dtype) for g in jax.tree.leaves(window.grads)]
        products = jax.tree.leaves(window.products)
        return step(carried, grads, _hess_estimate(carried, products, window.draws))

    # Zeroed outside the branches, so that both return the same types under shard_map.
    zeroed = jax.tree.map(lambda x: jnp.where(draw.closes, jnp.zeros_like(x), x), window)
    return jax.lax.cond(draw.closes, close, lambda: carried)._replace(window=zeroed)


def _plus(tree: PyTree, leaves: list[jax.Array]) -> PyTree:
    totals, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([t + x for t, x in zip(totals, leaves, strict=True)])


def _hess_estimate(
    state: IVONState, products: list[jax.Array], draws: jax.Array
) -> list[jax.Array]:
    """ĥ from the sum of n⊙ĝ over the draws; without a draw h itself, which leaves h where it is."""
    drawn, weight = draws > 0, 1 / jnp.maximum(draws, 1).astype(jnp.float32)

    def estimate(precision: Any, product: Any, h: Any, prior: LeafPrior) -> jax.Array:
        # A fixed element has neither noise nor curvature, not ∞·0.
        precision = prior.where_fixed(0, precision)
        return jnp.where(drawn, hess_estimate(precision, product) * weight.astype(h.dtype), h)

    leaves = (precision_leaves(state), products, jax.tree.leaves(state.hess), leaf_priors(state))
    return list(map(estimate, *leaves))
