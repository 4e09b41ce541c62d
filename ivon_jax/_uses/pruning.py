"""Pruning the weights that the posterior cannot tell from zero."""

import jax
import jax.numpy as jnp

from ivon_jax._core.checks import Number, check_number
from ivon_jax._core.state import Posterior, gaussian
from ivon_jax._core.trees import PyTree, Slots
from ivon_jax._uses.order import lower_quantiles


def signal_to_noise(state: PyTree) -> PyTree:
    """|m|/σ of each weight: +inf where it is fixed.

    Args:
      state: an optax or `flax.nnx` state that contains an `IVONState`, or a `Posterior`.

    Returns:
      A tree like the posterior's mean.

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import Posterior, signal_to_noise
      >>> print(signal_to_noise(Posterior(jnp.array([3.0, -1.0]), jnp.array([4.0, 1.0]))))
      [6. 1.]
    """
    q = gaussian(state)
    slots = Slots(q.mean)
    precisions, _ = slots.split("the precision", q.precision)
    return slots.join(ratio_leaves(slots.leaves, precisions))


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
      The `Posterior` with mean 0 and precision +inf at pruned weights (prediction, sampling and
      `ivon(prior=...)` all leave such weights at zero), and a tree of bools: False where this
      call has pruned.

    Raises:
      ValueError: if not exactly one of `fraction` and `threshold` is given, or it is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import Posterior, prune
      >>> pruned, kept = prune(Posterior(jnp.array([3.0, -1.0]), jnp.ones(2)), fraction=0.5)
      >>> pruned.mean, kept
      (Array([3., 0.], dtype=float32), Array([ True, False], dtype=bool))
    """
    if (fraction is None) == (threshold is None):
        raise ValueError("prune needs exactly one of fraction= and threshold=.")
    q = gaussian(state)
    slots = Slots(q.mean)
    precisions, _ = slots.split("the precision", q.precision)
    ratios = ratio_leaves(slots.leaves, precisions)
    if threshold is not None:
        bound = check_number("threshold", threshold, low=0.0, allow_inf=True)
        drop = [x < jnp.asarray(bound, x.dtype) for x in ratios]
    else:
        fraction = check_number("fraction", fraction, low=0.0, high=1.0)
        free = sum(jnp.sum(~jnp.isinf(p)).astype(jnp.float32) for p in precisions)
        number = jnp.floor(jnp.asarray(fraction, jnp.float32) * free)
        # Free weights come first in the ranking, because the ratio of a fixed one is infinite.
        bound = lower_quantiles(ratios, jnp.maximum(number - 1, 0).reshape(1))[0]
        drop = [(x.astype(jnp.float32) <= bound) & (number > 0) for x in ratios]
    drop = [d & ~jnp.isinf(p) for d, p in zip(drop, precisions, strict=True)]
    pruned = Posterior(
        slots.join([jnp.where(d, 0, m) for d, m in zip(drop, slots.leaves, strict=True)]),
        slots.join([jnp.where(d, jnp.inf, p) for d, p in zip(drop, precisions, strict=True)]),
    )
    return pruned, slots.join([~d for d in drop])


def ratio_leaves(means: list[jax.Array], precisions: list[jax.Array]) -> list[jax.Array]:
    """|m|/σ of each leaf, +inf where it is fixed."""
    return [
        # Zero times infinity would be NaN for a weight that is fixed at zero.
        jnp.where(jnp.isinf(p), jnp.inf, jnp.abs(m.astype(p.dtype)) * jnp.sqrt(p))
        for m, p in zip(means, precisions, strict=True)
    ]
