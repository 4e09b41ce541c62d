"""The prior of every leaf, from `weight_decay`, `mask` and `prior`.

`WeightDecay` and `GeneralPrior` are the two sources of the prior fields of an `IVONState`;
`state.leaf_priors` reads them back as what the rule takes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.basis import Basis, EigenState, Sides, check_sides, mixes, product
from ivon_jax._core.checks import (
    Number,
    check_floating,
    check_number,
    check_precision,
    is_concrete,
)
from ivon_jax._core.masks import leaf_flags
from ivon_jax._core.state import (
    GaussianPrior,
    IVONState,
    Posterior,
    basis_of_prior,
    leaf_priors,
    vectors_of,
)
from ivon_jax._core.trees import Owned, PyTree, copy_array, place, unflatten_like

DEFAULT_WEIGHT_DECAY = 1e-4
ORTHOGONAL = 1e-2  # largest error of an element of QᵀQ, far above that of saved eigenvectors

_STATIC_MASK = " Under inject_hyperparams pass static_args=('mask',)."
_SINGLE_MASK = (
    "Under inject_hyperparams a function is taken for a schedule: pass static_args=('mask',). To "
    "treat all leaves alike leave mask out, or set weight_decay=0."
)


class WeightDecay(NamedTuple):
    """N(0, I/(λδ)) for the leaves that the mask names, and a flat prior for the others."""

    delta: Number
    mask: Any

    def init(self, mean: PyTree, params: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The initial mean, and the state's fields that hold the prior."""
        return mean, self._fields_of(mean, params)

    def update(self, state: IVONState, params: PyTree | None) -> dict[str, Any]:
        """The fields for the next state, with this call's δ."""
        _check_same_kind(state, general=False)
        return self._fields_of(state.mean, state.mean if params is None else params)

    def _fields_of(self, mean: PyTree, params: PyTree) -> dict[str, Any]:
        """δ: a float32 scalar, or with a mask a vector with one entry for each owned leaf."""
        # A copy even of an injected hyperparameter, so that donating the state frees neither.
        delta = jnp.array(self.delta, jnp.float32)
        if self.mask is not None:
            flags = leaf_flags("mask", self.mask, mean, params, _SINGLE_MASK, _STATIC_MASK)
            delta = delta * np.array(flags, np.float32)
        return {"weight_decay": delta}


class GeneralPrior(NamedTuple):
    """A Gaussian N(m₀, 1/s₀) such as yesterday's posterior: δ = s₀/λ, element by element.

    Its basis becomes that of the state, which keeps it; or where that turns, stays with the prior.
    """

    prior: Posterior
    turns: bool

    def init(self, mean: PyTree, params: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The mean, with m₀ where s₀ is infinite, and copies of m₀ and s₀ for the owned leaves.

        The smallest s₀ of each leaf is kept for the factor h₀+δ of the rate: with δ element by
        element, α(h₀+δ)/(h+δ) would make steps of confident weights as long as h₀/h.
        """
        del params
        own = Owned(mean)
        center = _owned_copy(own, "prior.mean", self.prior.mean)
        precision = _owned_copy(own, "prior.precision", self.prior.precision)
        smallest = [jnp.min(s0, initial=jnp.inf).astype(jnp.float32) for s0 in precision]
        stacked = jnp.stack(smallest) if smallest else jnp.zeros(0, jnp.float32)
        treedef = jax.tree.structure(mean)
        prior = GaussianPrior(
            treedef.unflatten(center),
            treedef.unflatten(precision),
            jnp.where(jnp.isinf(stacked), 0, stacked),  # zero for a leaf that is fixed throughout
        )
        mean = jax.tree.map(
            lambda m, m0, s0: jnp.where(jnp.isinf(s0), m0, m), mean, prior.mean, prior.precision
        )
        fields = {"weight_decay": (), "prior": prior}
        if not self.prior.basis:
            return mean, fields
        # For an empty tree an array stands in for the basis: see `Eigenbasis.init`.
        basis: Any = self._owned_basis(own) if own.leaves else jnp.zeros([])
        if self.turns:
            return mean, {**fields, "prior": prior._replace(basis=basis)}
        return mean, {**fields, "basis": EigenState(basis)}

    def _owned_basis(self, own: Owned) -> Basis:
        """Copies of the sides of the owned leaves."""
        numbers = unflatten_like(self.prior.mean, list(range(len(self.prior.basis))))
        owned, _ = own.split("prior.mean", jax.tree.map(np.int32, numbers))
        pairs = zip(owned, own.leaves, strict=True)
        cast = lambda q, m: copy_array(jnp.asarray(q, m.dtype))  # noqa: E731
        return tuple(jax.tree.map(partial(cast, m=m), self.prior.basis[int(i)]) for i, m in pairs)

    def update(self, state: IVONState, params: PyTree | None) -> dict[str, Any]:
        """Nothing: the prior stays as it is in the state."""
        del params
        _check_same_kind(state, general=True)
        return {}


def prior_source(
    weight_decay: Number | None, mask: Any, prior: Posterior | None, turns: bool
) -> WeightDecay | GeneralPrior:
    """The prior that these arguments of `ivon` stand for; whether the state's basis turns."""
    if prior is None:
        delta = DEFAULT_WEIGHT_DECAY if weight_decay is None else weight_decay
        return WeightDecay(check_number("weight_decay", delta, low=0.0), mask)
    if not isinstance(prior, Posterior):
        got = type(prior).__name__
        raise TypeError(f"prior must be a Posterior, such as posterior(state); got {got}.")
    if mask is not None or weight_decay is not None:
        raise ValueError(
            "prior takes the place of weight_decay and mask: give either. A weight decay δ is the "
            "prior of mean 0 and precision ess·δ."
        )
    check_precision("prior.precision", prior.precision)
    check_sides(prior.basis, Owned(prior.mean))
    for q in jax.tree.leaves(prior.basis):
        eye = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)
        error = jnp.max(jnp.abs(product(q.mT, q) - eye), initial=0)
        if is_concrete(error) and not bool(error < ORTHOGONAL):
            raise ValueError("prior.basis is not orthogonal: each side needs QᵀQ = I.")
    for path, x in jax.tree_util.tree_leaves_with_path(prior.mean):
        undefined = jnp.any(jnp.isnan(x))
        if is_concrete(undefined) and bool(undefined):
            raise ValueError(f"prior.mean is NaN at {place(path)}: was its run diverging?")
    return GeneralPrior(prior, turns)


def check_prior_fits(prior: Posterior, state: IVONState) -> None:
    """Refuses a general prior that has no diagonal in the coordinates of the state."""
    own = Owned(state.mean)
    leaf_priors(state)  # refuses bases of other axes
    precisions = own.split("prior.precision", prior.precision)[0]
    none = (Sides(),) * len(own.leaves)
    bases = [basis or none for basis in (vectors_of(state), basis_of_prior(state))]
    for path, s0, *sides in zip(own.paths, precisions, *bases, strict=True):
        if is_concrete(s0) and any(mixes(side, np.isinf(s0)) for side in sides):
            raise ValueError(
                f"prior.precision is infinite for a part of the leaf at {place(path)}, which a "
                "basis mixes with the rest: fix that leaf as a whole, or use no basis."
            )


def _owned_copy(own: Owned, name: str, tree: PyTree) -> list[jax.Array]:
    if not own.leaves:  # none is owned, or optax has put its placeholder in their place
        return []
    leaves = own.checked(name, tree)
    check_floating(own, name, leaves)
    return [copy_array(jnp.asarray(x, m.dtype)) for x, m in zip(leaves, own.leaves, strict=True)]


def _check_same_kind(state: IVONState, *, general: bool) -> None:
    """Refuses the state of an optimizer with a general prior in one without, and the reverse."""
    if general != isinstance(state.prior, GaussianPrior):
        has, lacks = ("this ivon()", "the state") if general else ("the state", "this ivon()")
        raise ValueError(
            f"{has} has a general prior and {lacks} has none: pass the state of this same "
            "transformation. For a new prior call init again, at posterior_mean(state)."
        )
