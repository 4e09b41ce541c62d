"""IVON's arithmetic for one leaf, line by line as in the docstring of `ivon`.

Plain functions of arrays: no trees, no checks. Everything is computed in the leaf's own dtype.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Scalar = float | jax.Array


class Rule(NamedTuple):
    """The constants of the update rule.

    Attributes:
      hess_init: h₀.
      b1: β₁.
      one_minus_b1: 1−β₁.
      one_minus_b2: 1−β₂ (from a Python number: in float32 1−0.99999 is off by 0.14 %).
      clip_radius: ξ.
      floor: smallest h+δ as a share of h₀+δ.
      rescale_lr: whether α is multiplied by h₀+δ.
      debias: whether g is debiased by 1−β₁ᵗ.
    """

    hess_init: Scalar
    b1: Scalar
    one_minus_b1: Scalar
    one_minus_b2: Scalar
    clip_radius: Scalar
    floor: Scalar
    rescale_lr: bool
    debias: bool

    def astype(self, dtype: Any) -> "Rule":
        """The rule with its numbers in this dtype."""
        numbers = Rule._fields[: Rule._fields.index("rescale_lr")]
        return self._replace(**{name: jnp.asarray(getattr(self, name), dtype) for name in numbers})


class LeafPrior(NamedTuple):
    """The prior N(m₀, 1/(λδ)) of one leaf.

    Attributes:
      center: m₀; where δ is infinite the parameter is fixed there. None is zero, and fixes nothing.
      delta: δ, a scalar or one number per element; with a basis, of each coordinate.
      rate_delta: the scalar δ in the factor h₀+δ of the learning rate.
    """

    center: jax.Array | None
    delta: jax.Array
    rate_delta: jax.Array

    def astype(self, dtype: Any) -> "LeafPrior":
        """The prior in this dtype."""
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), self)

    def where_fixed(self, fixed: Any, free: jax.Array) -> jax.Array:
        """`fixed` where δ is infinite, and `free` elsewhere."""
        return free if self.center is None else jnp.where(jnp.isinf(self.delta), fixed, free)


def hess_estimate(precision: jax.Array, products: jax.Array) -> jax.Array:
    """ĥ = λ(h+δ) ⊙ mean_s(n_s ⊙ ĝ_s), from the old precision λ(h+δ) and the mean product."""
    return precision * products


def statistics(
    rule: Rule,
    h: jax.Array,
    g: jax.Array,
    grad: jax.Array,
    hess: jax.Array,
    old_delta: jax.Array,
    prior: LeafPrior,
) -> tuple[jax.Array, jax.Array]:
    """New h and g, from the averaged ĝ and ĥ and the δ under which the noise was drawn."""
    rule, prior = rule.astype(h.dtype), prior.astype(h.dtype)
    g = rule.b1 * g.astype(h.dtype) + rule.one_minus_b1 * grad
    d = rule.one_minus_b2 * (hess - h)
    # h + d + ½d²/(h+δ), grouped so that float32 keeps small changes and d² cannot overflow.
    new = h + (d + 0.5 * d * (d / (h + old_delta.astype(h.dtype))))
    return prior.where_fixed(h, floored(rule, new, prior.delta)), g


def floored(rule: Rule, h: jax.Array, delta: jax.Array) -> jax.Array:
    """h with h+δ no smaller than the share `floor` of h₀+δ."""
    rule, delta = rule.astype(h.dtype), delta.astype(h.dtype)
    return jnp.maximum(h, rule.floor * (rule.hess_init + delta) - delta)


def bias_correction(b1: Scalar, count: jax.typing.ArrayLike, dtype: Any) -> jax.Array:
    """1/(1−β₁ᵗ), without cancellation for β₁ near 1."""
    if isinstance(b1, float):
        log_b1 = math.log(b1) if b1 > 0 else -math.inf
    else:
        log_b1 = jnp.log(b1).astype(dtype)
    return 1 / -jnp.expm1(jnp.asarray(count, dtype) * log_b1)


def direction(pull: jax.Array, h: jax.Array, g_bar: jax.Array, delta: jax.Array) -> jax.Array:
    """(ḡ + δ(m−m₀))/(h+δ), the preconditioned step before the clip; the pull is δ(m−m₀)."""
    numerator = g_bar + pull
    # Neither a clip nor the division may turn a statistic that has overflowed into a number.
    proper = jnp.isfinite(numerator) & jnp.isfinite(h)
    return jnp.where(proper, numerator / (h + delta.astype(h.dtype)), jnp.nan)


def mean_step(
    rule: Rule,
    lr: Scalar,
    correction: jax.Array | None,
    pull: jax.Array,
    h: jax.Array,
    g: jax.Array,
    prior: LeafPrior,
) -> jax.Array:
    """α(h₀+δ)u with u = clip((ḡ + δ(m−m₀))/(h+δ), ±ξ), of the old m and the new h and g.

    The pull is δ(m−m₀); the correction that of `bias_correction`, or None.
    """
    u = direction(pull, h, g if correction is None else g * correction, prior.delta)
    is_clipped = rule.clip_radius != math.inf if isinstance(rule.clip_radius, float) else True
    rule, prior = rule.astype(h.dtype), prior.astype(h.dtype)
    if is_clipped:
        u = jnp.clip(u, -rule.clip_radius, rule.clip_radius)
    rate = jnp.asarray(lr, h.dtype)
    if rule.rescale_lr:
        rate = rate * (rule.hess_init + prior.rate_delta)
    return rate * u


def moved(m: jax.Array, step: jax.Array, prior: LeafPrior) -> jax.Array:
    """m − α(h₀+δ)u, and m₀ where the prior fixes it."""
    prior = prior.astype(m.dtype)
    return prior.where_fixed(prior.center, m - step)
