"""The divergence of one diagonal Gaussian from another."""

import jax
import jax.numpy as jnp

from ivon_jax._core.state import Posterior, gaussian
from ivon_jax._core.trees import PyTree, Slots


def kl_divergence(q: PyTree, prior: Posterior) -> jax.Array:
    """KL(q‖prior) = ½Σ[s₀σ² + s₀(m−m₀)² − 1 − log(s₀σ²)] of two diagonal Gaussians, in nats.

    Elements with a flat prior (s₀ = 0), which have no divergence, and those that are fixed in q
    (σ = 0) are left out.

    Args:
      q: a posterior, or a state.
      prior: a Gaussian over the same tree, such as `prior_of(state)`.

    Returns:
      A scalar; +inf where the prior fixes an element at another value, or one that is free in q.

    Raises:
      ValueError: if the trees do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import Posterior, kl_divergence
      >>> q = Posterior(jnp.array([1.0]), jnp.array([1.0]))
      >>> print(kl_divergence(q, Posterior(jnp.zeros(1), jnp.ones(1))))
      0.5
    """
    return divergence(gaussian(q), gaussian(prior))


def divergence(q: Posterior, prior: Posterior) -> jax.Array:
    """The same for two Gaussians."""
    slots = Slots(q.mean)
    trees = {
        "q.precision": q.precision,
        "prior.mean": prior.mean,
        "prior.precision": prior.precision,
    }
    leaves = []
    for name, tree in trees.items():
        split, _ = slots.split(name, tree)
        slots.check_shapes(name, split)
        leaves.append(split)
    total = jnp.zeros([])
    for m, p, m0, p0 in zip(slots.leaves, *leaves, strict=True):
        p0, shift = p0.astype(p.dtype), m.astype(p.dtype) - m0.astype(p.dtype)
        fixed, only_prior = jnp.isinf(p), jnp.isinf(p0) & ~jnp.isinf(p)
        # Not p0 > 0, so that a NaN is counted and seen.
        counted = (p0 != 0) & ~fixed & ~only_prior
        ratio, square = jnp.where(counted, p0 / p, 1), jnp.where(counted, p0, 0) * shift**2
        terms = ratio - 1 - jnp.log(ratio) + jnp.where(counted, square, 0)
        impossible = only_prior | (fixed & jnp.isinf(p0) & (shift != 0))
        total = total + 0.5 * jnp.sum(jnp.where(impossible, jnp.inf, terms)).astype(total.dtype)
    return total
