"""Noticing what changes parameters or their updates behind the optimizer's back."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from ivon_jax._core.checks import is_concrete
from ivon_jax._core.state import (
    AutoSampleState,
    IVONState,
    Posterior,
    current_noise,
    find_states,
    gaussian,
    gaussian_mean,
    map_states,
)
from ivon_jax._core.trees import Owned, PyTree

CHANGED = (
    "something changes the parameters or their updates behind the optimizer's back: a "
    "transformation after ivon (optax.transforms.freeze, reduce_on_plateau, a projection), or a "
    "line of the loop (clipping, averaging or loading weights). Put it inside the optimizer, by "
    "optax.partition or inject_hyperparams, or call with_mean(state, params) after the change."
)


def checked(
    state: AutoSampleState,
    inner_state: PyTree,
    owned: list[jax.Array],
    updates: list[jax.Array],
    *,
    handed_over: bool,
) -> PyTree:
    """The new inner state, with a mean of NaN if something has changed parameters or updates.

    Args:
      state: the state of `auto_sample` before the step.
      inner_state: the wrapped transformation's state after it.
      owned: the parameters of the loop that `ivon` owns.
      updates: what the wrapped transformation returned for them.
      handed_over: whether the parameters come from the loop.

    Raises:
      ValueError: in place of NaN, outside `jit`.
    """
    changed = _updates_changed(state.inner_state, inner_state, owned, updates)
    if handed_over:
        changed |= _params_changed(state, owned)
    if is_concrete(changed):
        if bool(changed):
            raise ValueError(CHANGED)
        return inner_state

    def spoil(node: IVONState) -> IVONState:
        mean = jax.tree.map(lambda m: jnp.where(changed, jnp.nan, m), node.mean)
        return node._replace(mean=mean)

    return map_states(spoil, inner_state)


def _params_changed(state: AutoSampleState, owned: list[jax.Array]) -> jax.Array:
    """Whether the loop's parameters are farther than σ/10 from the sample that was drawn.

    Not before the first step, where weights that were loaded become the mean.
    """
    q = gaussian(state.inner_state)
    sigmas = [jax.lax.rsqrt(s) for s in jax.tree.leaves(q.precision)]
    noise = [jnp.where(state.at_mean, 0, n) for n in current_noise(state)]
    leaves = zip(owned, jax.tree.leaves(q.mean), noise, sigmas, strict=True)
    begun = _any(part.count > 0 for part in find_states(state.inner_state))
    return (begun | ~state.at_mean) & _any(
        jnp.abs(p.astype(m.dtype) - (m + n)) > 0.1 * sigma + _rounding(p, jnp.abs(m) + sigma)
        for p, m, n, sigma in leaves
    )


def _updates_changed(
    old: PyTree, new: PyTree, owned: list[jax.Array], updates: list[jax.Array]
) -> jax.Array:
    """Whether a step of the mean is not what the transformations around `ivon` have returned."""
    counts = zip(find_states(old), find_states(new), strict=True)
    stepped = _any(after.count > before.count for before, after in counts)
    means = jax.tree.leaves(gaussian_mean(new))
    wide = [p.astype(m.dtype) for p, m in zip(owned, means, strict=True)]
    return stepped & _any(
        jnp.abs(u.astype(m.dtype) - (m - w)) > _rounding(p, jnp.abs(m) + jnp.abs(w))
        for u, p, w, m in zip(updates, owned, wide, means, strict=True)
    )


@jax.jit
def sample_distance(q: Posterior, params: PyTree) -> jax.Array:
    """The largest |θ−m|/σ, of elements that are free, beyond what rounding explains."""
    own = Owned(q.mean)
    precisions = own.checked("the precision", q.precision)
    largest = jnp.zeros([], jnp.float32)
    for m, s, p in zip(own.leaves, precisions, own.checked("params", params), strict=True):
        # The sample is rounded once, and the sum that lands on it once more.
        slack = 2 * _eps(p, m.dtype) * (jnp.abs(m) + jax.lax.rsqrt(s))
        beyond = jnp.maximum(jnp.abs(p.astype(m.dtype) - m) - slack, 0) * jnp.sqrt(s)
        beyond = jnp.where(jnp.isfinite(beyond), beyond, 0)  # fixed, or broken
        largest = jnp.maximum(largest, jnp.max(beyond, initial=0).astype(jnp.float32))
    return largest


def _rounding(p: jax.Array, size: jax.Array) -> jax.Array:
    """More than the sums of a step can round, for parameters of the dtype of `p`."""
    return 8 * _eps(p, size.dtype) * size


def _eps(p: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.asarray(jnp.finfo(p.dtype).eps, dtype)


def _any(flags: Iterable[jax.Array]) -> jax.Array:
    found = jnp.array(False)
    for flag in flags:
        found |= jnp.any(flag)
    return found
