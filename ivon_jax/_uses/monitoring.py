"""What a posterior looks like in numbers."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.basis import in_coordinates
from ivon_jax._core.checks import Number, check_number, check_scalar, is_concrete
from ivon_jax._core.gaussians import with_means
from ivon_jax._core.optimizer import ivon
from ivon_jax._core.posteriors import kl_divergence, prior_of
from ivon_jax._core.rule import LeafPrior, bias_correction, direction
from ivon_jax._core.state import (
    IVONState,
    find_states,
    leaf_priors,
    precision_leaves,
    prior_pulls,
    vectors_of,
)
from ivon_jax._core.tampering import sample_agreement, sample_distance
from ivon_jax._core.trees import PyTree
from ivon_jax._uses.pruning import lower_quantiles, ratio_leaves

PERCENTILES = (1, 25, 50, 75, 99)
MOVED = 0.1
"""An element of h has moved if it differs from h₀ by more than this share of h₀."""

MARGIN = 50.0
"""How far below the stability bound of exact gradients the steps of noisy ones should stay: read
off the runs of `benchmarks/evidence/divergence` and `robustness`."""

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ivon).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


def diagnostics(
    state: PyTree,
    settings: Mapping[str, Any],
    *,
    num_examples: Number | None = None,
    loss: Number | jax.Array | None = None,
    params: PyTree | None = None,
) -> dict[str, jax.Array]:
    """Numbers for a logger that describe the posterior; pure, and compiled once per structure.

    Nothing is sorted or gathered: memory and communication do not grow with the network.

    Args:
      state: as in `posterior`; the leaves of several `IVONState` are counted together.
      settings: the arguments that `ivon` was given, by name: `hess_init`, `clip_radius`, `b1`,
        `b2`, `rescale_lr`, `debias` and, for the risk, `learning_rate` are read; the others are in
        the state.
      num_examples: N, the size of the training set, for the temperature N/λ.
      loss: the training loss, a mean per example averaged over posterior samples, for the ELBO.
      params: the loop's parameters; needed where the mean is not stored (`store_mean=False`).

    Returns:
      A dictionary of float32 scalars, with a basis of its coordinates. Elements that a general
      prior fixes count in `fixed` only:

      * `step`, `num_parameters`, `ess`;
      * `fixed`, `nonfinite`: share of elements that are fixed, or whose mean or h is not finite;
      * `hess/p1` … `hess/p99`, `sigma/p1` …, `signal_to_noise/p1` …: percentiles of h, of σ and
        of |m|/σ (the element of rank ⌊(n−1)p/100⌋);
      * `hess/negative`: share of elements with h < 0 (their posterior is wider than the prior);
      * `hess/moved`: share of elements with |h−h₀| > 0.1 h₀;
      * `hess/inflated`: share of elements for which (1−β₂)λḡ²/2 is most of h+δ: without any
        curvature h would end up there, since ĥ = λ(h+δ)n⊙ĝ has a variance of λ(h+δ)ĝ²;
      * `update/clipped`: share of elements whose step (ḡ+δm)/(h+δ) is at the clip radius;
      * `update/idle`: share of elements whose momentum is exactly 0: no gradient has reached them;
      * `update/gain`: the largest (h₀+δ)/(h+δ), the factor by which the weight that has lost the
        most curvature takes longer steps than at the start;
      * `update/risk`, with `learning_rate`: fifty times α(h₀+δ)c/(h+δ) over 2(1+β₁)/(1−β₁), the
        bound above which a quadratic of curvature c diverges, for the smallest h+δ, with c the
        larger of h₀+δ and the median of h+δ; above one, a quiet weight that wakes up may set off a
        divergence. Zero where a clip radius bounds the steps;
      * `update/longest`, with `learning_rate`: the longest step α(h₀+δ)ξ of an element; infinite
        without a clip radius. Here and in the risk h₀+δ is left out without `rescale_lr`;
      * `kl`: KL(q‖prior) in nats, without the elements with a flat prior, of share `kl/flat`; NaN
        where a basis mixes flat or fixed elements with others;
      * `sample/distance`, with `params`: the largest |θ−m|/σ, beyond what rounding explains. A
        draw is within 5.3; more means that something changes the updates or the parameters behind
        the optimizer's back;
      * `sample/agreement`, with `params` and a state of `auto_sample` that stores the mean: the
        ratio Σw(θ−m)n / Σwn² for the noise n that was drawn, w = 1/σ² or less. It is 1, or 0 where
        a loop goes on with the mean or with another sample;
      * `temperature`: N/λ, with `num_examples`;
      * `elbo`: −λ·loss − KL in nats, and `elbo/per_example`, that over λ, with `loss`.

    Raises:
      TypeError: if `settings` has a key that is no argument of `ivon`.
      ValueError: if `state` contains no `IVONState`, or several with different `ess`.

    Example:
      >>> from ivon_jax import diagnostics, ivon
      >>> settings = dict(ess=100, hess_init=0.5, weight_decay=0.5)
      >>> state = ivon(0.1, **settings).init(jnp.ones(3))
      >>> numbers = diagnostics(state, settings)
      >>> print(f"{numbers['sigma/p50']:.2f} {numbers['hess/moved']:.2f}")
      0.10 0.00
    """
    constants = _constants(arguments(settings))
    parts = find_states(with_means(state, params))
    _check_one_ess(parts)
    given: dict[str, Any] = {}
    if params is not None:
        given["distance"] = sample_distance(parts, params)
        agreement = sample_agreement(state, params)
        if agreement is not None:
            given["agreement"] = agreement
    if "learning_rate" in settings:
        rate: Any = settings["learning_rate"]
        given["learning_rate"] = rate(parts[0].count) if callable(rate) else rate
    if num_examples is not None:
        given["num_examples"] = check_number("num_examples", num_examples, low=0.0, open_low=True)
    if loss is not None:
        check_scalar("loss", loss)
        given["loss"] = loss
    # Numbers that are traced or injected are not hashable, and compiled with all around them.
    plain = all(isinstance(x, int | float) for x in constants)
    return (_compiled_numbers if plain else _numbers)(constants, parts, given)


def _constants(known: Mapping[str, Any]) -> "_Constants":
    """The numbers among the arguments of `ivon`, in their ranges."""
    return _Constants(
        check_number("hess_init", known["hess_init"], low=0.0, open_low=True),
        check_number("clip_radius", known["clip_radius"], low=0.0, open_low=True, allow_inf=True),
        check_number("b1", known["b1"], low=0.0, high=1.0),
        check_number("b2", known["b2"], low=0.0, high=1.0),
        known["rescale_lr"],
        known["debias"],
    )


class _Constants(NamedTuple):
    """The arguments of `ivon` that the numbers depend on."""

    hess_init: Number
    clip_radius: Number
    b1: Number
    b2: Number
    rescale_lr: bool
    debias: bool


def _numbers(
    constants: _Constants, parts: list[IVONState], given: dict[str, Any]
) -> dict[str, jax.Array]:
    """What `diagnostics` returns, from the states and the numbers that it was given."""
    hess_init, clip_radius, b1, b2, rescale_lr, debias = constants
    kl = kl_divergence(parts, prior_of(parts)).astype(jnp.float32)  # refuses a missing mean
    leaves = [leaf for part in parts for leaf in _leaves(part, b1, debias)]
    ess = parts[0].ess
    number = float(sum(x.hess.size for x in leaves))
    num_free = _total(x.free for x in leaves)

    def share(flags: Callable[[_Leaf], jax.Array]) -> jax.Array:
        return _total(flags(x) & x.free for x in leaves) / jnp.maximum(num_free, 1)

    def percentiles(name: str, values: list[jax.Array], *, from_top: bool = False) -> dict:
        """Elements of the ranks ⌊(n−1)p/100⌋ among the n free ones, or counted from the top."""
        # At +inf, where the ranking of the free elements does not reach.
        values = [jnp.where(leaf.free, x, jnp.inf) for leaf, x in zip(leaves, values, strict=True)]
        ranks = jnp.floor((num_free - 1) * jnp.array(PERCENTILES, jnp.float32) / 100)
        found = lower_quantiles(values, num_free - 1 - ranks if from_top else ranks)
        return {f"{name}/p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}

    precisions = [x.precision for x in leaves]
    # σ falls as the precision rises: its percentiles are those from the other end.
    sigma = percentiles("sigma", precisions, from_top=True)
    gains = [_largest_gain(x, hess_init) for x in leaves]
    gain = jnp.max(jnp.stack(gains)) if gains else jnp.ones([], jnp.float32)
    broken = _total(~jnp.isfinite(x.mean) | ~jnp.isfinite(x.hess) for x in leaves)
    numbers = {
        "step": jnp.max(jnp.stack([part.count for part in parts])),
        "num_parameters": number,
        "ess": ess,
        "fixed": 1 - num_free / max(number, 1),
        "nonfinite": broken / max(number, 1),
        **percentiles("hess", [x.hess for x in leaves]),
        **{name: jax.lax.rsqrt(x) for name, x in sigma.items()},
        **percentiles("signal_to_noise", ratio_leaves([x.mean for x in leaves], precisions)),
        "hess/negative": share(lambda x: x.hess < 0),
        "hess/moved": share(lambda x: _differs(x.hess, hess_init)),
        "hess/inflated": share(lambda x: _inflated(x, ess, b2)),
        "update/clipped": share(
            lambda x: jnp.abs(x.step) >= jnp.asarray(clip_radius, x.step.dtype)
        ),
        "update/idle": share(lambda x: x.grad == 0),
        "update/gain": gain,
        "kl": kl,
        "kl/flat": share(lambda x: jnp.broadcast_to(x.delta == 0, x.hess.shape)),
    }
    if "learning_rate" in given:
        deltas = [jnp.min(x.delta, initial=jnp.inf).astype(jnp.float32) for x in leaves]
        delta = jnp.min(jnp.stack(deltas)) if leaves else 0.0
        delta = jnp.where(jnp.isinf(delta), 0.0, delta)  # of no free element
        steepest = jnp.max(jnp.stack([x.rate_delta for x in leaves])) if leaves else 0.0
        rate = given["learning_rate"] * (hess_init + steepest if rescale_lr else 1.0)
        radius = jnp.asarray(clip_radius, jnp.float32)
        curvature = jnp.maximum(numbers["hess/p50"], hess_init) + delta
        risk = MARGIN * rate * gain / (hess_init + delta) * curvature * (1 - b1) / (2 * (1 + b1))
        numbers["update/risk"] = jnp.where(jnp.isinf(radius), risk, 0.0)
        bounded = jnp.where(jnp.isinf(radius), 0, radius) * rate
        numbers["update/longest"] = jnp.where(jnp.isinf(radius), jnp.inf, bounded)
    if "distance" in given:
        numbers["sample/distance"] = given["distance"]
    if "agreement" in given:
        numbers["sample/agreement"] = given["agreement"]
    if "num_examples" in given:
        numbers["temperature"] = given["num_examples"] / ess
    if "loss" in given:
        numbers["elbo"] = -ess * jnp.asarray(given["loss"], jnp.float32) - kl
        numbers["elbo/per_example"] = numbers["elbo"] / ess
    return {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}


_compiled_numbers = jax.jit(_numbers, static_argnums=0)


def arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and for the others the defaults of `ivon`."""
    if not isinstance(settings, Mapping):
        raise TypeError(
            "settings must be a dict of the keyword arguments that ivon() was given; got "
            f"{type(settings).__name__}."
        )
    unknown = set(settings) - set(_DEFAULTS) - {"learning_rate", "ess"}
    if unknown:
        raise TypeError(
            f"settings must be the keyword arguments of ivon(); unknown: {', '.join(unknown)}."
        )
    return {**_DEFAULTS, **settings}


def _check_one_ess(parts: list[IVONState]) -> None:
    ess = jnp.stack([part.ess for part in parts])
    if len(parts) > 1 and is_concrete(ess) and bool(jnp.any(ess != ess[0])):
        raise ValueError(
            f"the state holds several IVON states with different ess ({', '.join(map(str, ess))}), "
            "which one set of numbers would mix: call diagnostics for each."
        )


class _Leaf(NamedTuple):
    """One leaf of the posterior, in the coordinates of its basis.

    `grad` is ḡ, `step` (ḡ+δm)/(h+δ), `free` what no prior fixes.
    """

    mean: jax.Array
    hess: jax.Array
    precision: jax.Array
    delta: jax.Array
    rate_delta: jax.Array
    grad: jax.Array
    step: jax.Array
    free: jax.Array


def _leaves(state: IVONState, b1: Number, debias: bool) -> list[_Leaf]:
    count = jnp.maximum(state.count, 1)

    def leaf(
        m: jax.Array,
        pull: jax.Array,
        h: jax.Array,
        g: jax.Array,
        p: jax.Array,
        prior: LeafPrior,
    ) -> _Leaf:
        g = g.astype(m.dtype)
        g = g * bias_correction(b1, count, g.dtype) if debias else g
        step = direction(pull, h, g, prior.delta)
        step = jnp.where(state.count == 0, 0, prior.where_fixed(0, step))
        return _Leaf(m, h, p, prior.delta, prior.rate_delta, g, step, ~jnp.isinf(p))

    mean, hess, momentum = map(jax.tree.leaves, (state.mean, state.hess, state.momentum))
    mean = in_coordinates(vectors_of(state), mean)
    of_q, of_prior = precision_leaves(state), leaf_priors(state)
    return list(map(leaf, mean, prior_pulls(state, of_prior), hess, momentum, of_q, of_prior))


def _largest_gain(leaf: _Leaf, hess_init: Number) -> jax.Array:
    """max (h₀+δ)/(h+δ) over elements with a finite δ."""
    delta = leaf.delta.astype(leaf.hess.dtype)
    start = jnp.asarray(hess_init, delta.dtype) + delta
    gains = jnp.where(jnp.isinf(delta), 1, start / (leaf.hess + delta))
    return jnp.max(gains, initial=1).astype(jnp.float32)


def _inflated(leaf: _Leaf, ess: jax.Array, b2: Number) -> jax.Array:
    """Where (1−β₂)λḡ²/2 is more than half of h+δ."""
    factor = jnp.asarray((1 - b2) * ess, leaf.grad.dtype)
    return factor * jnp.square(leaf.grad) > leaf.hess + leaf.delta.astype(leaf.grad.dtype)


def _differs(h: jax.Array, hess_init: Number) -> jax.Array:
    start = jnp.asarray(hess_init, h.dtype)
    return jnp.abs(h - start) > MOVED * start


def _total(flags: Iterable[jax.Array]) -> jax.Array:
    return sum((jnp.sum(x).astype(jnp.float32) for x in flags), jnp.zeros([], jnp.float32))
