"""The Gaussian that a nested state stands for: mean, precision and basis, from all its parts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ivon_jax._core.basis import Basis, Sides, check_sides, in_parameters
from ivon_jax._core.checks import check_floating, check_precision, is_concrete
from ivon_jax._core.noise import THREEFRY, gaussian_noise, means_of
from ivon_jax._core.state import (
    AutoSampleState,
    IVONState,
    Posterior,
    as_auto_sample_state,
    basis_of_prior,
    find_states,
    is_auto_sample_state,
    is_lean,
    map_states,
    precision_leaves,
    vectors_of,
)
from ivon_jax._core.trees import (
    Owned,
    PyTree,
    get_field,
    is_masked,
    place,
    unflatten_like,
    wide_dtype,
    without_nnx,
)


def gaussian(state: PyTree, params: PyTree | None = None) -> Posterior:
    """Mean and precision of a `Posterior`, or of all IVON states in `state`, without copies.

    Leaves that no state owns are `MaskedNode`. A mean that is not stored is recovered from the
    loop's `params`.
    """
    if isinstance(state, Posterior):
        own = Owned(state.mean)
        precisions = wide_precisions(own, "precision", state.precision)
        check_sides(state.basis, own)
        # As jax has them: numbers of Python, and float64 of NumPy, are float32.
        means = [jnp.asarray(m) if jnp.issubdtype(m.dtype, jnp.floating) else m for m in own.leaves]
        return Posterior(own.join(means), own.join(precisions), without_nnx(state.basis))
    state = with_means(state, params)
    parts = find_states(state)
    return Posterior(gaussian_mean(state), _precision(parts), gaussian_basis(state))


def wide_precisions(own: Owned, name: str, precision: PyTree) -> list[jax.Array]:
    """The precisions of the owned leaves, no narrower than their means and than float32.

    Computations take place in the dtype of the precision, in which a mean must not be rounded.
    """
    leaves = own.exactly(name, precision)
    check_precision(name, precision)
    check_floating(own, name, leaves)
    found = []
    pairs = zip(map(jnp.asarray, own.leaves), map(jnp.asarray, leaves), strict=True)
    for path, (m, p) in zip(own.paths, pairs, strict=True):
        floating = jnp.issubdtype(m.dtype, jnp.floating)
        finite = jnp.any(jnp.isfinite(p))
        if not floating and is_concrete(finite) and bool(finite):
            raise TypeError(
                f"{name} is finite at {place(path)}, where the mean is {m.dtype} and can only be "
                "fixed: make the mean floating, or the precision inf."
            )
        both = (p.dtype, m.dtype) if floating else (p.dtype,)
        found.append(p.astype(max(map(wide_dtype, both), key=lambda x: x.itemsize)))
    return found


def gaussian_mean(state: PyTree) -> PyTree:
    """The mean alone, as in `gaussian`."""
    if isinstance(state, Posterior):
        return without_nnx(state.mean)
    parts = find_states(state)
    if any(map(is_lean, parts)):
        raise ValueError(
            "this state does not store the mean (auto_sample with store_mean=False): give the "
            "loop's parameters as well, as in posterior(state, params) or learning_status(state, "
            "settings, params=params), with the whole state of auto_sample; what takes no "
            "parameters takes that posterior."
        )
    return functools.reduce(_merge_owned, [part.mean for part in parts])


def gaussian_basis(state: PyTree) -> Basis:
    """The basis alone, in the order of the leaves that all states own."""
    parts = find_states(state)
    return _merged_basis(parts, list(map(vectors_of, parts)))


def _merged_basis(parts: list[IVONState], bases: list[Basis]) -> Basis:
    trees = []
    for part, basis in zip(parts, bases, strict=True):
        own = Owned(part.hess)
        sides = basis if own.leaves and basis else (Sides(),) * len(own.leaves)
        trees.append(own.join([_Opaque(x) for x in sides]))
    merged = functools.reduce(_merge_owned, trees)
    basis = tuple(x.sides for x in jax.tree.leaves(merged))
    return basis if jax.tree.leaves(basis) else ()


def prior_gaussian(state: PyTree) -> Posterior:
    """The prior of all IVON states in `state`, as in `gaussian`."""
    parts = find_states(state)
    flat = [part._replace(hess=jax.tree.map(jnp.zeros_like, part.hess)) for part in parts]
    means = [part.prior.mean if part.prior else part.hess for part in flat]
    precisions = [part.prior.precision if part.prior else _precision([part]) for part in flat]
    return Posterior(
        functools.reduce(_merge_owned, means),
        functools.reduce(_merge_owned, precisions),
        _merged_basis(parts, list(map(basis_of_prior, parts))),
    )


def owned_leaves(state: PyTree) -> Owned:
    """Which leaves of the parameters belong to the IVON states in `state`."""
    return Owned(functools.reduce(_merge_owned, [part.hess for part in find_states(state)]))


def with_means(state: PyTree, params: PyTree | None) -> PyTree:
    """The state with the means in it, m = θ − n, where `auto_sample` does not store them."""
    if isinstance(state, Posterior) or params is None:
        return state

    def recover(node: Any) -> Any:
        if not is_auto_sample_state(node):
            return node
        if not any(map(is_lean, find_states(get_field(node, "inner_state")))):
            return node
        return _recovered(as_auto_sample_state(node), params)

    return jax.tree.map(recover, state, is_leaf=is_auto_sample_state)


def check_recoverable(own: Owned, params: PyTree) -> None:
    """Refuses parameters in which a mean that is not stored would drown in rounding."""
    for path, p in zip(own.paths, own.split("params", params)[0], strict=True):
        if wide_dtype(p.dtype) != p.dtype:
            raise TypeError(
                f"store_mean=False recovers the mean from the loop's parameters, and these are "
                f"{p.dtype} at {place(path)}, which would lose its low bits at every step: "
                "use store_mean=True, or float32 parameters."
            )


def without_means(state: PyTree) -> PyTree:
    """The state with every mean left out."""

    def drop(node: IVONState) -> IVONState:
        return node._replace(mean=jax.tree.map(lambda _: optax.MaskedNode(), node.mean))

    return map_states(drop, state)


def current_noise(state: AutoSampleState) -> list[jax.Array]:
    """The noise of the sample that the state's keys stand for, for each owned leaf."""
    return in_parameters(gaussian_basis(state.inner_state), current_coordinates(state))


def current_coordinates(state: AutoSampleState) -> list[jax.Array]:
    """The coordinates of that noise."""
    precision = jax.tree.leaves(_precision(find_states(state.inner_state)))
    sign = 1.0 if isinstance(state.mirrored, tuple) else jnp.where(state.mirrored, -1.0, 1.0)
    key = jax.random.wrap_key_data(state.draw_key, impl=THREEFRY)
    return gaussian_noise(key, precision, sign)


def _recovered(state: AutoSampleState, params: PyTree) -> AutoSampleState:
    own = owned_leaves(state.inner_state)
    owned = own.checked("params", params)
    check_recoverable(own, params)
    noise = [jnp.where(state.at_mean, 0, n) for n in current_noise(state)]
    mean = own.join(means_of(owned, noise))

    def fill(node: Any) -> IVONState:
        (part,) = find_states(node)
        mine = Owned(part.hess)
        return part._replace(mean=mine.join(mine.split("the mean", mean)[0]))

    return state._replace(inner_state=map_states(fill, state.inner_state))


def _precision(parts: list[IVONState]) -> PyTree:
    trees = [unflatten_like(part.hess, precision_leaves(part)) for part in parts]
    return functools.reduce(_merge_owned, trees)


class _Opaque:
    """The sides of a leaf as one leaf of a tree."""

    def __init__(self, sides: Sides):
        self.sides = sides


def _merge_owned(a: PyTree, b: PyTree) -> PyTree:
    """Fills the `MaskedNode`s of `a` from `b`, as `optax.partition` has split them."""
    if is_masked(a):
        return b
    if is_masked(b):
        return a
    children_a, treedef_a = jax.tree.flatten(a, is_leaf=lambda x: x is not a)
    children_b, treedef_b = jax.tree.flatten(b, is_leaf=lambda x: x is not b)
    is_leaf = len(children_a) == 1 and children_a[0] is a
    if is_leaf or treedef_a != treedef_b:
        raise ValueError(
            "the state holds several IVON states for the same parameters, or for different "
            "models: pass the one that is meant."
        )
    return treedef_a.unflatten(map(_merge_owned, children_a, children_b))
