"""A general Gaussian prior N(m₀, 1/s₀) in the place of weight decay."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.checks import Number, check_floating, check_precision
from ivon_jax._core.state import IVONState, Posterior
from ivon_jax._core.trees import PyTree, Slots, copy_array

DEFAULT_WEIGHT_DECAY = 1e-4


def check_prior(prior: Any, weight_decay: Number, mask: Any) -> None:
    """Refuses what is not a prior, and other ways of giving one beside it.

    Raises:
      TypeError: if it is not a `Posterior`.
      ValueError: if a precision is negative or NaN, or `weight_decay` or `mask` is given as well.
    """
    if not isinstance(prior, Posterior):
        raise TypeError(
            f"prior must be a Posterior(mean, precision), such as posterior(state); got "
            f"{type(prior).__name__}."
        )
    if mask is not None or not _is_default(weight_decay):
        raise ValueError(
            "prior takes the place of weight_decay and mask: give either. A weight decay δ is the "
            "prior of mean 0 and precision ess·δ."
        )
    check_precision("prior.precision", prior.precision)


def check_same_prior(prior: Posterior | None, state: IVONState) -> None:
    """Refuses the state of an optimizer with a prior in one without, and the reverse."""
    if (prior is None) == bool(state.prior):
        has, lacks = ("the state", "this ivon()") if prior is None else ("this ivon()", "the state")
        raise ValueError(
            f"{has} has a general prior and {lacks} has none: pass the state that this same "
            "transformation's init returned. For a new prior call init again, with the parameters "
            "at posterior_mean(state)."
        )


def _is_default(weight_decay: Number) -> bool:
    if isinstance(weight_decay, jax.core.Tracer):
        return True
    # By identity: who writes 1e-4 has given a weight decay. inject_hyperparams makes the default an
    # array, which comes back with float32's rounding.
    rounded = float(np.float32(DEFAULT_WEIGHT_DECAY))
    return weight_decay is DEFAULT_WEIGHT_DECAY or bool(weight_decay == rounded)


def owned_prior(prior: Posterior, mean: PyTree) -> Posterior:
    """Copies of the prior's leaves that belong to the mean's, in their dtypes.

    Raises:
      ValueError: if the prior does not fit the parameters.
    """
    slots = Slots(mean)
    if not slots.leaves:  # none is owned, or optax has put its placeholder in their place
        return Posterior(mean, mean)

    def owned(name: str, tree: PyTree) -> PyTree:
        leaves, _ = slots.split(name, tree)
        check_floating(slots, name, leaves)
        slots.check_shapes(name, leaves)
        copies = [
            copy_array(jnp.asarray(x, m.dtype)) for x, m in zip(leaves, slots.leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(mean), copies)

    return Posterior(owned("prior.mean", prior.mean), owned("prior.precision", prior.precision))


def start_at_prior(mean: PyTree, prior: Posterior) -> PyTree:
    """The initial mean: the prior's where its precision is infinite."""
    return jax.tree.map(
        lambda m, m0, s0: jnp.where(jnp.isinf(s0), m0, m), mean, prior.mean, prior.precision
    )


def smallest_decay(prior: Posterior, ess: Number) -> jax.Array:
    """The smallest δ = s₀/λ of each leaf; zero for a leaf that is fixed throughout.

    Element by element, α(h₀+δ)/(h+δ) would make steps of confident weights as long as h₀/h.
    """
    smallest = [
        jnp.min(s0, initial=jnp.inf).astype(jnp.float32) for s0 in jax.tree.leaves(prior.precision)
    ]
    if not smallest:
        return jnp.zeros(0, jnp.float32)
    stacked = jnp.stack(smallest)
    return jnp.where(jnp.isinf(stacked), 0, stacked) / ess
