"""Pruning the weights that the posterior cannot tell from zero."""

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import varying_axes, varying_over
from ivon_jax._core.checks import Number, check_number
from ivon_jax._core.gaussians import gaussian
from ivon_jax._core.posteriors import marginals
from ivon_jax._core.state import Posterior
from ivon_jax._core.trees import Owned, PyTree, as_numbers


def signal_to_noise(state: PyTree) -> PyTree:
    """|m|/σ of each weight: +inf where it is fixed.

    Args:
      state: an optax or `flax.nnx` state that contains an `IVONState`, or a `Posterior`.

    Returns:
      A tree like the posterior's mean.

    Example:
      >>> from ivon_jax import Posterior, signal_to_noise
      >>> print(signal_to_noise(Posterior(jnp.array([3.0, -1.0]), jnp.array([4.0, 1.0]))))
      [6. 1.]
    """
    q = marginals(gaussian(state))
    own = Owned(q.mean)
    precisions, _ = own.split("the precision", q.precision)
    return own.join(ratio_leaves(own.leaves, precisions))


def prune(
    state: PyTree, *, fraction: Number | None = None, threshold: Number | None = None
) -> tuple[Posterior, PyTree]:
    """Sets the weights with the smallest |m|/σ to zero, and fixes them there.

    Weights that are fixed already (infinite precision) are neither counted nor pruned.

    Args:
      state: as in `signal_to_noise`.
      fraction: share of the free weights to prune, 0 ≤ fraction < 1, ranked over all leaves
        together in float32: ⌊fraction·n⌋ of n, more only where weights tie with the last one.
      threshold: alternatively, prune where |m|/σ is below this number.

    Returns:
      The `Posterior` with mean 0 and precision +inf at pruned weights (which prediction, sampling
      and `ivon(prior=...)` leave at zero), and a tree of bools: False where this call has pruned.

    Raises:
      ValueError: if not exactly one of `fraction` and `threshold` is given, or it is out of range
        (traced, the mean is NaN then).

    Example:
      >>> from ivon_jax import Posterior, prune
      >>> pruned, kept = prune(Posterior(jnp.array([3.0, -1.0]), jnp.ones(2)), fraction=0.5)
      >>> pruned.mean, kept
      (Array([3., 0.], dtype=float32), Array([ True, False], dtype=bool))
    """
    if (fraction is None) == (threshold is None):
        raise ValueError("prune needs exactly one of fraction= and threshold=.")
    q = gaussian(state)
    if q.basis:
        raise ValueError(
            "a weight cannot be fixed in a posterior that is diagonal in other coordinates: prune "
            "marginals(state), which leaves the correlations out."
        )
    own = Owned(q.mean)
    precisions, _ = own.split("the precision", q.precision)
    ratios = ratio_leaves(own.leaves, precisions)
    if threshold is not None:
        given = bound = check_number("threshold", threshold, low=0.0, allow_inf=True)
        drop = [x < jnp.asarray(bound, x.dtype) for x in ratios]
    else:
        given = fraction = check_number("fraction", fraction, low=0.0, high=1.0)
        free = sum(jnp.sum(~jnp.isinf(p)).astype(jnp.float32) for p in precisions)
        exact = jnp.asarray(fraction, jnp.float32) * free
        near = jnp.round(exact)  # in float32 0.59 of 100 is 58.99…
        close = jnp.abs(near - exact) <= jnp.minimum(exact * 2.0**-22, 0.25)
        number = jnp.where(close, near, jnp.floor(exact))
        # Free weights come first in the ranking, because the ratio of a fixed one is infinite.
        bound = lower_quantiles(ratios, jnp.maximum(number - 1, 0).reshape(1))[0]
        drop = [(x.astype(jnp.float32) <= bound) & (number > 0) for x in ratios]
    drop = [d & ~jnp.isinf(p) for d, p in zip(drop, precisions, strict=True)]
    pruned = Posterior(
        own.join([_zeroed(given, d, m) for d, m in zip(drop, own.leaves, strict=True)]),
        own.join([jnp.where(d, jnp.inf, p) for d, p in zip(drop, precisions, strict=True)]),
    )
    return pruned, own.join([~d for d in drop])


def _zeroed(given: Number, drop: jax.Array, mean: jax.Array) -> jax.Array:
    """Zero where it is dropped; NaN if what was given, and traced, is out of its range."""
    if not jnp.issubdtype(mean.dtype, jnp.floating):  # fixed, and it may be no number
        return mean
    return jnp.where(jnp.isnan(given), jnp.nan, jnp.where(drop, 0, mean)).astype(mean.dtype)


def ratio_leaves(means: list[jax.Array], precisions: list[jax.Array]) -> list[jax.Array]:
    """|m|/σ of each leaf, +inf where it is fixed."""
    return [
        # Zero times infinity would be NaN for a weight that is fixed at zero.
        jnp.where(jnp.isinf(p), jnp.inf, jnp.abs(as_numbers(m, p.dtype)) * jnp.sqrt(p))
        for m, p in zip(means, precisions, strict=True)
    ]


def lower_quantiles(leaves: list[jax.Array], ranks: jax.Array) -> jax.Array:
    """The elements of given ranks among all leaves, without copying, sorting or gathering them.

    Bisection over the bit patterns of float32, which are ordered like the numbers: 33 passes, each
    a sum over every leaf that runs where the leaf is stored.

    For each rank r, from 0 and in float32 (exact up to 2²⁴ elements, then to 1 part in 10⁷), that
    is the smallest element, in float32, with more than r elements at or below it.
    """

    def count(x: jax.Array, bounds: jax.Array) -> jax.Array:
        below = x.astype(jnp.float32)[..., None] <= bounds.reshape((1,) * x.ndim + (-1,))
        return jnp.sum(below, axis=tuple(range(x.ndim))).astype(jnp.float32)

    def num_at_most(bounds: jax.Array) -> jax.Array:
        return sum((count(x, bounds) for x in leaves), jnp.zeros(bounds.shape, jnp.float32))

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval
        # The mean of two int32 without overflow.
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = num_at_most(_number(middle)) > ranks
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    infinity = _pattern(jnp.float32(jnp.inf))
    axes = frozenset[str]().union(*(varying_axes(jax.typeof(x)) for x in [*leaves, ranks]))
    interval = [jnp.full(ranks.shape, x) for x in (_pattern(jnp.float32(-jnp.inf)), infinity)]
    low, high = (varying_over(x, axes) for x in interval)
    _, high = jax.lax.fori_loop(0, 33, halve, (low, high))
    found = _number(high)
    # Backends that flush subnormal numbers cannot tell them from zero.
    return jnp.where(jnp.abs(found) < jnp.finfo(jnp.float32).tiny, 0, found)


def _pattern(x: jax.Array) -> jax.Array:
    """An int32 for each float32, in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _number(pattern: jax.Array) -> jax.Array:
    bits = jnp.where(pattern < 0, jnp.int32(-(2**31)) - pattern, pattern)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
