"""Parameters that a loop has changed: loaded before the first step, or unknown to the optimizer."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import varying_axes
from ivon_jax._core.basis import in_coordinates
from ivon_jax._core.checks import is_concrete
from ivon_jax._core.gaussians import (
    current_coordinates,
    gaussian,
    gaussian_mean,
    owned_leaves,
)
from ivon_jax._core.rule import LeafPrior
from ivon_jax._core.state import (
    AutoSampleState,
    IVONState,
    as_auto_sample_state,
    find_states,
    is_auto_sample_state,
    is_lean,
    leaf_priors,
    map_states,
)
from ivon_jax._core.trees import Owned, PyTree, unflatten_like

CHANGED = (
    "something changes the parameters or their updates behind the optimizer's back. A "
    "transformation after ivon (optax.transforms.freeze, reduce_on_plateau, a projection) belongs "
    "inside: use optax.partition, or inject_hyperparams. After a line of the loop that edits "
    "parameters (clipping, averaging, loading) call with_mean(state, params); evaluate a copy of "
    "the mean, and go on with the loop's parameters."
)


def with_loaded(
    state: IVONState, params: list[jax.Array], when: jax.Array, noise: list[jax.Array] | None = None
) -> IVONState:
    """The state with parameters that were loaded after `init` as its mean.

    Those are neither the mean, which may have been rounded, nor the sample of the noise.
    """
    leaves = zip(
        jax.tree.leaves(state.mean),
        params,
        leaf_priors(state),
        noise or [None] * len(params),
        strict=True,
    )
    return state._replace(mean=unflatten_like(state.mean, [_adopted(when, *x) for x in leaves]))


@jax.jit  # traced once for leaves of one shape
def _adopted(
    when: jax.Array, m: jax.Array, p: jax.Array, prior: LeafPrior, n: jax.Array | None
) -> jax.Array:
    if varying_axes(jax.typeof(p)) - varying_axes(jax.typeof(m)):
        return m  # each device has a sample of its own
    loaded = when & _differ(p, m)
    if n is not None and n.shape == m.shape and jnp.issubdtype(n.dtype, jnp.floating):
        loaded &= _differ(p, m + n.astype(m.dtype))
    return prior.where_fixed(m, jnp.where(loaded, p.astype(m.dtype), m))


def with_loaded_means(state: AutoSampleState, owned: list[jax.Array]) -> AutoSampleState:
    """The same for the states in that of `auto_sample`, as long as the loop is at the mean."""
    params = owned_leaves(state.inner_state).join(owned)

    def adopt(node: Any) -> IVONState:
        (part,) = find_states(node)
        mine = Owned(part.hess).split("params", params)[0]
        return with_loaded(part, mine, (part.count == 0) & state.at_mean)

    return state._replace(inner_state=map_states(adopt, state.inner_state))


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
    """Whether the loop's parameters are not what the last step asked for, or `with_mean` set."""
    means = jax.tree.leaves(gaussian_mean(state.inner_state))
    expected = jax.tree.leaves(state.expected)
    changed = [
        jnp.abs(p - jnp.where(state.at_mean, m.astype(p.dtype), e)) > 4 * _spacing(p, jnp.abs(p))
        for p, e, m in zip(owned, expected, means, strict=True)
    ]
    # At the first call they may be loaded, or differ where a prior fixes the mean.
    begun = _any(part.count > 0 for part in find_states(state.inner_state)) | ~state.at_mean
    return begun & _any(changed)


def _updates_changed(
    old: PyTree, new: PyTree, owned: list[jax.Array], updates: list[jax.Array]
) -> jax.Array:
    """Whether a step of a mean is not what the transformations around `ivon` have returned."""
    own = owned_leaves(new)
    params, updates = own.join(owned), own.join(updates)
    changed = []
    for before, after in zip(find_states(old), find_states(new), strict=True):
        mine = Owned(after.mean)
        leaves = zip(
            mine.leaves, mine.split("", params)[0], mine.split("", updates)[0], strict=True
        )
        for m, p, u in leaves:
            wide = p.astype(m.dtype)
            off = jnp.abs(u.astype(m.dtype) - (m - wide))
            wrong = off > 4 * _spacing(p, jnp.abs(m) + jnp.abs(wide))
            changed.append((after.count > before.count) & wrong)
    return _any(changed)


def sample_agreement(state: PyTree, params: PyTree) -> jax.Array | None:
    """Σw(θ−m)n / Σw n² of the drawn noise n: 1 for the sample, 0 for the mean or another sample.

    The weights w = 1/(σ²+ε²), with ε the spacing of the parameters, count only what their dtype
    can show; it is 1 where that is too little to tell. None where nothing is drawn or the mean is
    recovered from the sample.
    """
    nodes = auto_sample_states(state)
    if len(nodes) != 1 or any(map(is_lean, find_states(nodes[0].inner_state))):
        return None
    return _agreement(nodes[0], params)


def auto_sample_states(state: PyTree) -> list[AutoSampleState]:
    """Every `AutoSampleState` in a nested state."""
    nodes = jax.tree.leaves(state, is_leaf=is_auto_sample_state)
    return [as_auto_sample_state(node) for node in nodes if is_auto_sample_state(node)]


@jax.jit
def _agreement(state: AutoSampleState, params: PyTree) -> jax.Array:
    q = gaussian(state.inner_state)
    own = Owned(q.mean)
    params = own.checked("params", params)
    moved = [p.astype(m.dtype) - m for m, p in zip(own.leaves, params, strict=True)]
    moved, noise = in_coordinates(q.basis, moved), current_coordinates(state)
    found = square = error = jnp.zeros([], jnp.float32)
    leaves = (own.leaves, jax.tree.leaves(q.precision), noise, moved, params)
    for m, s, n, shift, p in zip(*leaves, strict=True):
        # As in `sample_distance`; below float32 with room for weights that shrink in a step.
        spacing = (1 if p.dtype == m.dtype else 4) * _spacing(p, jnp.max(jnp.abs(m), initial=0))
        weight = jnp.where(jnp.isinf(s), 0, 1 / (1 / s + spacing**2))
        found += jnp.sum(weight * n * shift).astype(found.dtype)
        square += jnp.sum(weight * n**2).astype(found.dtype)
        error += jnp.sum((weight * n * spacing) ** 2).astype(found.dtype)
    # Five standard errors of what rounding at random adds.
    clear = ~state.at_mean & (5 * jnp.sqrt(error) < 0.1 * square)
    return jnp.where(clear, found / square, 1.0)


@jax.jit
def sample_distance(parts: list[IVONState], params: PyTree) -> jax.Array:
    """The largest |θ−m|/σ, of elements that are free, beyond what rounding explains."""
    q = gaussian(parts)
    own = Owned(q.mean)
    precisions = own.checked("the precision", q.precision)
    params = own.checked("params", params)
    moved = [p.astype(m.dtype) - m for m, p in zip(own.leaves, params, strict=True)]
    moved = in_coordinates(q.basis, moved)
    largest = jnp.zeros([], jnp.float32)
    for m, s, shift, p in zip(own.leaves, precisions, moved, params, strict=True):
        # The sum that lands on the sample is rounded as the old parameter was, which may have been
        # as large as the largest one.
        size = jnp.max(jnp.abs(m), initial=0) + jax.lax.rsqrt(s)
        slack = 2 * _spacing(p, size)
        beyond = jnp.maximum(jnp.abs(shift) - slack, 0) * jnp.sqrt(s)
        beyond = jnp.where(jnp.isfinite(beyond), beyond, 0)  # fixed, or broken
        largest = jnp.maximum(largest, jnp.max(beyond, initial=0).astype(jnp.float32))
    return largest


def _differ(p: jax.Array, x: jax.Array) -> jax.Array:
    """Where parameters are not `x`, which may have been rounded to their dtype."""
    if p.dtype == x.dtype:
        return p != x
    return jnp.abs(p.astype(x.dtype) - x) > _spacing(p, jnp.abs(x))


def _spacing(p: jax.Array, size: jax.Array) -> jax.Array:
    """How far apart numbers of this size are in the dtype of the parameters, at most."""
    info = jnp.finfo(p.dtype)
    return jnp.asarray(info.eps, size.dtype) * size + jnp.asarray(info.tiny, size.dtype)


def _any(flags: Iterable[jax.Array]) -> jax.Array:
    found = jnp.array(False)
    for flag in flags:
        found |= jnp.any(flag)
    return found
