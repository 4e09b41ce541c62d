"""The states of `ivon` and `auto_sample`, what their fields mean, and finding them anywhere."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.basis import (
    Basis,
    EigenState,
    as_basis,
    as_eigen_state,
    diagonal_in,
    in_coordinates,
    in_parameters,
)
from ivon_jax._core.rule import LeafPrior
from ivon_jax._core.trees import (
    PyTree,
    get_field,
    has_fields,
    wide_dtype,
    without_nnx,
)


class Posterior(NamedTuple):
    """A Gaussian with diagonal precision over a tree of parameters, or over their coordinates.

    Attributes:
      mean: tree of means.
      precision: tree of precisions 1/σ², of the same structure; +inf means *fixed*.
      basis: `()`, or for every leaf M of the mean, in the tree's order, the orthogonal matrices
        `Sides(rows, columns)`, Q_L and Q_R, in whose coordinates Q_Lᵀ M Q_R the precision is
        diagonal (`ivon(..., basis=Eigenbasis())`).
    """

    mean: PyTree
    precision: PyTree
    basis: Basis = ()


class GaussianPrior(NamedTuple):
    """A general Gaussian prior N(m₀, 1/s₀) in a state.

    Attributes:
      mean: tree of m₀.
      precision: tree of s₀; +inf fixes the element at m₀, 0 is flat.
      smallest: smallest s₀ of each leaf, float32; 0 for a leaf that is fixed throughout.
      basis: where the state's basis turns, the one in whose coordinates s₀ is, `()` for those of
        the parameters. Otherwise `()`: s₀ is in the coordinates of the state.
    """

    mean: PyTree
    precision: PyTree
    smallest: jax.Array
    basis: Basis = ()


class Window(NamedTuple):
    """Sums over the calls that one step of `auto_sample(num_samples=k)` averages.

    Attributes:
      calls: number of gradients summed, int32.
      draws: how many of them were taken at a posterior sample (not at the mean), int32.
      grads: Σ ĝ, a tree like the mean.
      products: Σ n⊙ĝ, likewise.
    """

    calls: jax.Array
    draws: jax.Array
    grads: PyTree
    products: PyTree


class IVONState(NamedTuple):
    """State of `ivon`: the posterior N(mean, 1 / (ess (hess + weight_decay))) and its momentum.

    Leaves that IVON does not own are `optax.MaskedNode` in the three trees.

    Attributes:
      count: number of steps taken, int32.
      mean: posterior mean m, at least float32.
      hess: estimate h of the diagonal Hessian of the mean loss per example.
      momentum: moving average g of the gradients.
      ess: effective sample size λ of the current posterior, float32.
      weight_decay: δ, float32: a scalar, or one entry for each owned leaf; `()` with a prior.
      prior: a general Gaussian prior; `()` without one.
      window: sums of an unfinished window of `auto_sample(num_samples=k)`; otherwise `()`.
      basis: the basis in whose coordinates `hess` and `momentum` are; `()` for the parameters'.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] optax calls it so
    mean: PyTree
    hess: PyTree
    momentum: PyTree
    ess: jax.Array
    weight_decay: Any = ()
    prior: GaussianPrior | tuple[()] = ()
    window: Window | tuple[()] = ()
    basis: EigenState | tuple[()] = ()


class AutoSampleState(NamedTuple):
    """State of `auto_sample`.

    Attributes:
      key: data of the key for the draws to come, uint32 of shape (2,).
      draw_key: data of the key with which the loop's current parameters were drawn.
      calls: number of calls in the current window of `num_samples`, int32.
      at_mean: whether the loop's current parameters are the mean and not a sample, bool.
      inner_state: state of the wrapped transformation.
      mirrored: with `antithetic`, whether their noise was negated, bool; otherwise `()`.
      expected: with `check`, the owned parameters as the loop should have them; otherwise `()`.
    """

    key: jax.Array
    draw_key: jax.Array
    calls: jax.Array
    at_mean: jax.Array
    inner_state: Any
    mirrored: jax.Array | tuple[()] = ()
    expected: PyTree = ()


NO_BASIS, KEPT, TURNING = "no basis", "the basis of its prior", "a basis that turns"


def is_ivon_state(node: Any) -> bool:
    """Whether a node is an `IVONState`, or the mapping that `flax.nnx.state` makes of it."""
    return has_fields(node, IVONState)


def is_auto_sample_state(node: Any) -> bool:
    """Whether a node is an `AutoSampleState`, or the mapping that `flax.nnx.state` makes of it."""
    return has_fields(node, AutoSampleState)


def is_lean(state: IVONState) -> bool:
    """Whether the state does not store its mean (`auto_sample(store_mean=False)`)."""
    return bool(jax.tree.leaves(state.hess)) and not jax.tree.leaves(state.mean)


def find_states(state: PyTree) -> list[IVONState]:
    """Every `IVONState` in a nested optax or `flax.nnx` state, in tree order."""
    nodes = [x for x in jax.tree.leaves(state, is_leaf=is_ivon_state) if is_ivon_state(x)]
    if not nodes:
        raise ValueError(
            f"found no IVONState in a state of type {type(state).__name__}. Pass what the "
            "optimizer's init or update returned; the optimizer must contain ivon()."
        )
    return [_as_state(node) for node in nodes]


def as_auto_sample_state(node: Any) -> AutoSampleState:
    """A node for which `is_auto_sample_state` holds, of plain arrays."""
    return AutoSampleState(**without_nnx({f: get_field(node, f) for f in AutoSampleState._fields}))


def map_states(f: Callable[[Any], Any], state: PyTree) -> PyTree:
    """The nested state with `f(node)` in place of every `IVONState`."""
    return jax.tree.map(lambda x: f(x) if is_ivon_state(x) else x, state, is_leaf=is_ivon_state)


def _as_state(node: Any) -> IVONState:
    fields = without_nnx({field: get_field(node, field) for field in IVONState._fields})
    number = len(jax.tree.leaves(fields["hess"]))
    if fields["prior"]:
        prior = {f: get_field(fields["prior"], f) for f in GaussianPrior._fields}
        prior["basis"] = as_basis(prior["basis"], number) if prior["basis"] else ()
        fields["prior"] = GaussianPrior(**prior)
    fields["basis"] = as_eigen_state(fields["basis"], number)
    return IVONState(**fields)


def check_parameters(tree: PyTree) -> None:
    """Refuses a state or a posterior in the place of parameters."""
    stops = lambda x: is_ivon_state(x) or isinstance(x, Posterior)  # noqa: E731
    if any(map(stops, jax.tree.leaves(tree, is_leaf=stops))):
        raise TypeError(
            "expected parameters, got a state or a Posterior: pass posterior_mean(state)."
        )


def check_single(state: Any) -> None:
    """Refuses what is not the `IVONState` of one model."""
    if not isinstance(state, IVONState):
        raise TypeError(
            f"expected the state of ivon(), got {type(state).__name__}: pass what the init or "
            "update of this same transformation returned."
        )
    if jnp.shape(state.ess):
        raise ValueError(
            f"this is a stack of states (ess has shape {jnp.shape(state.ess)}): map over it, as in "
            "jax.vmap(posterior)(states)."
        )
    for h in jax.tree.leaves(state.hess):
        if wide_dtype(jnp.result_type(h)) != jnp.result_type(h):
            raise TypeError(
                f"hess in the state of ivon() is {h.dtype}, in which its small steps are lost: the "
                "state was cast. Cast the parameters only, and restore the state as it was."
            )


def leaf_priors(state: IVONState) -> list[LeafPrior]:
    """The prior of each owned leaf under the state's ess, with δ in the state's coordinates."""
    number = len(jax.tree.leaves(state.hess))
    if isinstance(state.prior, GaussianPrior) and number:
        centers, precisions = map(jax.tree.leaves, state.prior[:2])
        if not _is_aligned(state):
            # What is fixed is not mixed with the rest: `check_prior_fits`.
            finite = [jnp.where(jnp.isinf(s0), jnp.nan, s0) for s0 in precisions]
            turned = diagonal_in(vectors_of(state), state.prior.basis, finite)
            pairs = zip(precisions, turned, strict=True)
            precisions = [jnp.where(jnp.isinf(s0), s0, s) for s0, s in pairs]
        deltas = [s0 / state.ess.astype(s0.dtype) for s0 in precisions]
        return list(map(LeafPrior, centers, deltas, state.prior.smallest / state.ess))
    # An infinite weight decay is a mistake: it has to be seen, and fixes nothing.
    decay = jnp.where(jnp.isinf(state.weight_decay), jnp.nan, state.weight_decay)
    deltas = [decay[i] if decay.ndim else decay for i in range(number)]
    return [LeafPrior(None, delta, delta) for delta in deltas]


def prior_pulls(state: IVONState, priors: list[LeafPrior]) -> list[jax.Array]:
    """δ(m−m₀) of each owned leaf, or Λ₀(m−m₀)/λ, in the state's coordinates."""
    means, vectors = jax.tree.leaves(state.mean), vectors_of(state)
    if isinstance(state.prior, GaussianPrior) and means:
        centers, precisions = map(jax.tree.leaves, state.prior[:2])
        means = [m - m0 for m, m0 in zip(means, centers, strict=True)]
        if not _is_aligned(state):
            shifts = zip(precisions, in_coordinates(state.prior.basis, means), strict=True)
            pulls = [s0 / state.ess.astype(s0.dtype) * x for s0, x in shifts]
            return in_coordinates(vectors, in_parameters(state.prior.basis, pulls))
    shifts = zip(priors, in_coordinates(vectors, means), strict=True)
    return [prior.delta.astype(x.dtype) * x for prior, x in shifts]


def basis_of_prior(state: IVONState) -> Basis:
    """The basis in whose coordinates the precision of a general prior is."""
    if not isinstance(state.prior, GaussianPrior):
        return ()
    return vectors_of(state) if _is_aligned(state) else state.prior.basis


def _is_aligned(state: IVONState) -> bool:
    """Whether these coordinates are the state's, which has no basis or keeps that of the prior."""
    return kind_of_basis(state) != TURNING


def kind_of_basis(state: IVONState) -> str:
    """Whether the state has a basis, and one that turns."""
    if not state.basis:
        return NO_BASIS
    factors = state.basis.factors
    return KEPT if isinstance(factors, tuple) and not factors else TURNING


def precision_leaves(state: IVONState) -> list[jax.Array]:
    """λ(h+δ) of each owned leaf."""
    check_single(state)
    return [
        state.ess.astype(h.dtype) * (h + prior.delta.astype(h.dtype))
        for h, prior in zip(jax.tree.leaves(state.hess), leaf_priors(state), strict=True)
    ]


def vectors_of(state: IVONState) -> Basis:
    """The basis of one state's coordinates."""
    return state.basis.vectors if state.basis else ()
