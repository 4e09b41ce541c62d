"""The state of `ivon`, the Gaussian it stands for, and finding both in any optax state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.checks import check_precision
from ivon_jax._core.trees import (
    PyTree,
    Slots,
    get_field,
    has_fields,
    is_masked,
    wide_dtype,
    without_nnx,
)


class Posterior(NamedTuple):
    """A Gaussian with diagonal precision over a tree of parameters.

    Attributes:
      mean: tree of means.
      precision: tree of precisions 1/σ², of the same structure; +inf means *fixed*.
    """

    mean: PyTree
    precision: PyTree


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
      ess: effective sample size λ under which the current posterior stands, float32.
      weight_decay: prior precision δ per example, float32: a scalar, or with a mask a vector
        with an entry for each owned leaf. With a general prior its entries are the smallest δ of
        each leaf, which the learning rate is multiplied with.
      prior: a general Gaussian prior, with trees like `mean`; `()` without one.
      window: sums of an unfinished window of `auto_sample(num_samples=k)`; otherwise `()`.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] optax calls it so
    mean: PyTree
    hess: PyTree
    momentum: PyTree
    ess: jax.Array
    weight_decay: jax.Array
    prior: Posterior | tuple[()] = ()
    window: Window | tuple[()] = ()


class AutoSampleState(NamedTuple):
    """State of `auto_sample`.

    Attributes:
      key: data of the key for the draws to come, uint32 of shape (2,).
      draw_key: data of the key with which the loop's current parameters were drawn.
      calls: number of calls in the current window of `num_samples`, int32.
      at_mean: whether the loop's current parameters are the mean and not a sample, bool.
      inner_state: state of the wrapped transformation.
      mirrored: with `antithetic`, whether these parameters were drawn with the noise negated, bool;
        otherwise `()`.
    """

    key: jax.Array
    draw_key: jax.Array
    calls: jax.Array
    at_mean: jax.Array
    inner_state: Any
    mirrored: jax.Array | tuple[()] = ()

    def sign(self) -> jax.Array | float:
        """The sign of the noise in the loop's current parameters."""
        return 1.0 if isinstance(self.mirrored, tuple) else jnp.where(self.mirrored, -1.0, 1.0)


_REQUIRED = tuple(f for f in IVONState._fields if f not in IVONState._field_defaults)
_REQUIRED_AUTO = tuple(
    f for f in AutoSampleState._fields if f not in AutoSampleState._field_defaults
)


def is_ivon_state(node: Any) -> bool:
    """Whether a node is an `IVONState`, or the mapping that `flax.nnx.state` makes of it."""
    return has_fields(node, IVONState, _REQUIRED)


def is_auto_sample_state(node: Any) -> bool:
    """Whether a node is an `AutoSampleState`, or the mapping that `flax.nnx.state` makes of it."""
    return has_fields(node, AutoSampleState, _REQUIRED_AUTO)


def is_lean(state: IVONState) -> bool:
    """Whether the state does not store its mean (`auto_sample(store_mean=False)`)."""
    return bool(jax.tree.leaves(state.hess)) and not jax.tree.leaves(state.mean)


def find_states(state: PyTree) -> list[IVONState]:
    """Every `IVONState` in a nested optax or `flax.nnx` state, in tree order.

    Raises:
      ValueError: if there is none.
    """
    nodes = [x for x in jax.tree.leaves(state, is_leaf=is_ivon_state) if is_ivon_state(x)]
    if not nodes:
        raise ValueError(
            f"found no IVONState in a state of type {type(state).__name__}. Pass what the "
            "optimizer's init or update returned; the optimizer must contain ivon()."
        )
    return [_as_state(node) for node in nodes]


def _as_state(node: Any) -> IVONState:
    fields = without_nnx({field: get_field(node, field) for field in IVONState._fields})
    if fields["prior"]:
        fields["prior"] = Posterior(*(get_field(fields["prior"], f) for f in Posterior._fields))
    return IVONState(**fields)


def check_single(state: Any) -> None:
    """Refuses what is not the `IVONState` of one model.

    Raises:
      TypeError: if it is not an `IVONState`.
      ValueError: if it is a stack of states, whose ess would be broadcast along a wrong axis.
    """
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


def leaf_weight_decay(weight_decay: jax.Array, num_leaves: int) -> list[jax.Array]:
    """δ of each owned leaf, from a scalar or from one entry per leaf."""
    return [weight_decay[i] if weight_decay.ndim else weight_decay for i in range(num_leaves)]


def decay_leaves(state: IVONState) -> list[jax.Array]:
    """δ of each owned leaf: a scalar, or s₀/λ element by element under a general prior."""
    if isinstance(state.prior, Posterior):
        return [s0 / state.ess.astype(s0.dtype) for s0 in jax.tree.leaves(state.prior.precision)]
    return leaf_weight_decay(state.weight_decay, len(jax.tree.leaves(state.hess)))


def precision_leaves(state: IVONState) -> list[jax.Array]:
    """λ(h+δ) of each owned leaf."""
    check_single(state)
    hess, deltas = jax.tree.leaves(state.hess), decay_leaves(state)
    return [
        state.ess.astype(h.dtype) * (h + d.astype(h.dtype))
        for h, d in zip(hess, deltas, strict=True)
    ]


def gaussian_mean(state: PyTree) -> PyTree:
    """The mean of a `Posterior`, or of all IVON states in `state`, without a copy.

    Leaves that no state owns are `MaskedNode`.
    """
    if isinstance(state, Posterior):
        return without_nnx(state.mean)
    parts = find_states(state)
    if any(map(is_lean, parts)):
        raise ValueError(
            "this state does not store the mean (auto_sample with store_mean=False), which is "
            "recovered from the parameters of the loop: give them as well, as in "
            "posterior(state, params), with the whole state of auto_sample; what takes a state "
            "only takes that posterior."
        )
    return functools.reduce(merge_owned, [part.mean for part in parts])


def gaussian(state: PyTree) -> Posterior:
    """Mean and precision, as in `gaussian_mean`.

    Raises:
      ValueError: if a `Posterior` has a precision that is known and negative or NaN.
    """
    if isinstance(state, Posterior):
        check_precision("precision", state.precision)
        return without_nnx(state)
    parts = find_states(state)
    precisions = [Slots(part.mean).join(precision_leaves(part)) for part in parts]
    return Posterior(gaussian_mean(state), functools.reduce(merge_owned, precisions))


def prior_gaussian(state: PyTree) -> Posterior:
    """The prior of all IVON states in `state`, as in `gaussian`."""
    parts = find_states(state)
    zeros = [jax.tree.map(jnp.zeros_like, part.hess) for part in parts]
    priors = [
        part.prior or Posterior(zero, Slots(zero).join(precision_leaves(part._replace(hess=zero))))
        for part, zero in zip(parts, zeros, strict=True)
    ]
    means, precisions = zip(*priors, strict=True)
    return Posterior(
        functools.reduce(merge_owned, means), functools.reduce(merge_owned, precisions)
    )


def merge_owned(a: PyTree, b: PyTree) -> PyTree:
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
    return treedef_a.unflatten(map(merge_owned, children_a, children_b))


def fill_unowned(slots: Slots, owned: list[Any], params: PyTree, fill: Any) -> PyTree:
    """A tree like `params`: `owned` where IVON owns the leaf, `fill(leaf)` elsewhere."""
    leaves, others = slots.split("params", params)
    slots.check_shapes("params", leaves)
    pure = slots.join(owned, [jax.tree.map(fill, x) for x in others])
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(pure))


def wide_zeros(leaf: Any) -> jax.Array:
    """Zeros in the shape of a leaf that IVON does not own, in the dtype of statistics."""
    dtype = jnp.result_type(leaf)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.zeros(jnp.shape(leaf), wide_dtype(dtype) if floating else jnp.float32)
