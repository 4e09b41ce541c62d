"""Mixtures of posteriors: several runs, each with its Gaussian."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.gaussians import gaussian
from ivon_jax._core.state import (
    IVONState,
    Posterior,
    find_states,
    is_ivon_state,
)
from ivon_jax._core.trees import Owned, PyTree


class Mixture(NamedTuple):
    """A mixture of K Gaussians with equal weights.

    Attributes:
      components: a `Posterior` with the components on a new axis 0 of every leaf.
    """

    components: Posterior


def mixture(members: PyTree) -> Mixture:
    """The mixture q(θ) = mean_k N(θ; m_k, σ_k²) of several runs.

    A Gaussian describes one mode of the true posterior, and runs from different initial weights may
    end in different ones. Train them in one program, by `jax.vmap` over `init` and the step.

    Args:
      members: a list of posteriors or states; or one of them with the members on axis 0 of every
        leaf, as `jax.vmap` makes it. States without a stored mean go through
        `jax.vmap(posterior)(states, params)` first.

    Returns:
      A `Mixture`, which the `predict_*` functions of samples take in place of a state. (They take a
      list of posteriors or states, and a stack of states, as well.)

    Raises:
      ValueError: if there is no member, or they are not of the same structure and shapes.

    Example:
      >>> from ivon_jax import ivon, mixture, predict_samples
      >>> states = [ivon(0.1, ess=100).init(jnp.full(2, x)) for x in (-1.0, 1.0)]
      >>> f = predict_samples(lambda w, x: x @ w, num_samples=8)
      >>> f(jax.random.key(0), mixture(states), jnp.ones((1, 2))).shape  # four of each
      (8, 1)
    """
    if isinstance(members, Mixture):
        return members
    if isinstance(members, list):
        return Mixture(_stacked([gaussian(member) for member in members]))
    if isinstance(members, Posterior):
        return Mixture(members)
    if not any(map(_is_stack, find_states(members))):
        raise ValueError(
            "this is the state of one run, or a tuple: give a list of states or posteriors, or the "
            "stack of states of a jax.vmap."
        )
    return Mixture(jax.vmap(gaussian)(members))


def as_mixture(state: PyTree) -> Mixture | None:
    """The mixture that a list, a stack of states or a `Mixture` stands for; None for one member."""
    if isinstance(state, Mixture) or (isinstance(state, list) and all(map(_is_member, state))):
        return mixture(state)
    if isinstance(state, Posterior):
        return None
    return mixture(state) if any(map(_is_stack, find_states(state))) else None


def num_components(q: Mixture) -> int:
    """K."""
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(q)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "a mixture needs its components on axis 0 of every leaf of mean and precision; got "
            f"leading axes {sorted(lengths)}. For a list of posteriors: mixture([q1, q2])."
        )
    return lengths.pop()[0]


def component(q: Mixture, index: Any) -> Posterior:
    """The component of that index, which may be traced."""
    return jax.tree.map(lambda x: x[index], q.components)


def check_of_one(q: Mixture, params: PyTree | None) -> None:
    """Refuses parameters that are stacked like the runs, for all of their leaves may be."""
    if params is None:
        return
    own = Owned(q.components.mean)
    pairs = zip(own.split("params", params)[0], own.leaves, strict=True)
    if any(x.shape == m.shape for x, m in pairs):
        raise ValueError(
            "params must be those of one network, whose other leaves all runs share; these are "
            "stacked. Where each run has other leaves of its own: "
            "mixture(jax.vmap(posterior)(states, params))."
        )


def _stacked(members: Sequence[Posterior]) -> Posterior:
    if not members:
        raise ValueError("a mixture needs at least one posterior; got an empty list.")
    shapes = [jax.tree.map(jnp.shape, q) for q in members]
    for i, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(
                f"the members of a mixture must be posteriors of the same network; that at "
                f"position {i} has other leaves or shapes than the first (or only one of them has "
                "a basis: marginals(q) has none)."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def _is_member(node: Any) -> bool:
    """Whether an element of a list is a posterior or a state, and not a part of one."""
    leaves = jax.tree.leaves(node, is_leaf=is_ivon_state)
    return isinstance(node, Posterior) or any(map(is_ivon_state, leaves))


def _is_stack(state: IVONState) -> bool:
    return jnp.ndim(state.ess) == 1
