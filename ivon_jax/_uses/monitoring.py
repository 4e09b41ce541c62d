"""What a posterior looks like in numbers, and whether it is learning."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.checks import Number, check_number, check_scalar, is_concrete
from ivon_jax._core.optimizer import ivon
from ivon_jax._core.posteriors import kl_divergence
from ivon_jax._core.rule import LeafPrior, debiased, direction
from ivon_jax._core.state import (
    IVONState,
    find_states,
    leaf_priors,
    precision_leaves,
    prior_gaussian,
    with_means,
)
from ivon_jax._core.trees import PyTree
from ivon_jax._uses.pruning import lower_quantiles, ratio_leaves

PERCENTILES = (1, 25, 50, 75, 99)
MOVED = 0.1
"""An element of h has moved when it differs from h₀ by more than this share of h₀."""

EXPLODED = 1e3
"""A median of h above this multiple of h₀ is taken for divergence."""

GUARD = 0.1
"""The `precision_floor` that `learning_status` recommends."""

MARGIN = 10.0
"""By how much noisy gradients have to stay below the bound of stability of exact ones."""

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
    """Numbers for a logger that describe the posterior; pure, so that it runs under jit.

    Nothing is sorted or gathered: memory and communication do not grow with the network.

    Args:
      state: an `IVONState`, or any nested optax or `flax.nnx` state that contains one or
        several, whose leaves are then counted together.
      settings: the arguments that `ivon` was given, by name. `hess_init`, `clip_radius`,
        `b1`, `debias` and, for the risk, `learning_rate` are read from it, the others are in the
        state.
      num_examples: N, the size of the training set, for the temperature N/λ.
      loss: the training loss, a mean per example averaged over posterior samples, for the ELBO.
      params: the loop's parameters, where the mean is not stored (`store_mean=False`).

    Returns:
      A dictionary of float32 scalars. Elements that a general prior fixes count in `fixed` only:

      * `step`, `num_parameters`, `ess`;
      * `fixed`, `nonfinite`: share of elements that are fixed, or whose mean or h is not finite;
      * `hess/p1` … `hess/p99`, `sigma/p1` …, `signal_to_noise/p1` …: percentiles of h, of σ and
        of |m|/σ (the element of rank ⌊(n−1)p/100⌋);
      * `hess/negative`: share of elements with h < 0 (their posterior is wider than the prior);
      * `hess/moved`: share of elements with |h−h₀| > 0.1 h₀;
      * `update/clipped`: share of elements whose preconditioned step (ḡ+δm)/(h+δ), at the
        current momentum and mean, is at the clip radius;
      * `update/gain`: the largest (h₀+δ)/(h+δ), by which a step of the weight that has lost most of
        its curvature is longer than at the start;
      * `update/risk`, with `learning_rate`: ten times α·gain·c/(h₀+δ) over 2(1+β₁)/(1−β₁), the
        bound above which a quadratic of curvature c diverges; above one, a quiet weight that
        wakes up may set off a divergence. c is h₀+δ, or the 99th percentile of h+δ if that is
        larger. Zero where a clip radius bounds the steps;
      * `kl`: KL(q‖prior) in nats over the elements with a proper prior, and `kl/flat`, the
        share of elements without one (δ = 0), which are left out of it;
      * `temperature`: N/λ, with `num_examples`;
      * `elbo`: −λ·loss − KL in nats, and `elbo/per_example`, that over λ, with `loss`.

    Raises:
      TypeError: if `settings` has a key that is no argument of `ivon`.
      ValueError: if `state` contains no `IVONState`, or several with different `ess`: look at
        each by itself then.

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import diagnostics, ivon
      >>> settings = dict(ess=100, hess_init=0.5, weight_decay=0.5)
      >>> state = ivon(0.1, **settings).init(jnp.ones(3))
      >>> numbers = diagnostics(state, settings)
      >>> print(f"{numbers['sigma/p50']:.2f} {numbers['hess/moved']:.2f}")
      0.10 0.00
    """
    hess_init, clip_radius, b1, debias = _settings(settings)
    state = with_means(state, params)
    parts = find_states(state)
    _check_one_ess(parts)
    means = [m for part in parts for m in jax.tree.leaves(part.mean)]
    hess = [h for part in parts for h in jax.tree.leaves(part.hess)]
    precisions = [p for part in parts for p in precision_leaves(part)]
    steps = [u for part in parts for u in _directions(part, b1, debias)]
    deltas = [prior.delta for part in parts for prior in leaf_priors(part)]
    free = [~jnp.isinf(p) for p in precisions]
    ess = parts[0].ess

    def share(flags: Iterable[jax.Array]) -> jax.Array:
        return _total([x & f for x, f in zip(flags, free, strict=True)]) / jnp.maximum(
            _total(free), 1
        )

    def percentiles(name: str, leaves: list[jax.Array], *, from_top: bool = False) -> dict:
        # At +inf, where the ranking of the free elements does not reach.
        leaves = [jnp.where(f, x, jnp.inf) for x, f in zip(leaves, free, strict=True)]
        return _percentiles(name, leaves, _total(free), from_top)

    sigma = percentiles("sigma", precisions, from_top=True)
    gain = _largest_gain(parts, hess_init)
    kl = kl_divergence(state, prior_gaussian(state)).astype(jnp.float32)
    number = sum(x.size for x in hess)
    broken = [~jnp.isfinite(m) | ~jnp.isfinite(h) for m, h in zip(means, hess, strict=True)]
    numbers = {
        "step": jnp.max(jnp.stack([part.count for part in parts])),
        "num_parameters": number,
        "ess": ess,
        "fixed": 1 - _total(free) / max(number, 1),
        "nonfinite": _total(broken) / max(number, 1),
        **percentiles("hess", hess),
        # σ falls as the precision rises: its percentiles are those from the other end.
        **{name: jax.lax.rsqrt(x) for name, x in sigma.items()},
        **percentiles("signal_to_noise", ratio_leaves(means, precisions)),
        "hess/negative": share(h < 0 for h in hess),
        "hess/moved": share(_differs(h, hess_init) for h in hess),
        "update/clipped": share(jnp.abs(u) >= jnp.asarray(clip_radius, u.dtype) for u in steps),
        "update/gain": gain,
        "kl": kl,
        "kl/flat": share(
            jnp.broadcast_to(d == 0, h.shape) for d, h in zip(deltas, hess, strict=True)
        ),
    }
    if "learning_rate" in settings:
        rate: Any = settings["learning_rate"]
        rate = rate(parts[0].count) if callable(rate) else rate
        delta = jnp.min(jnp.stack([jnp.min(d) for d in deltas])) if deltas else 0.0
        busy = jnp.maximum((numbers["hess/p99"] + delta) / (hess_init + delta), 1)
        risk = MARGIN * rate * gain * busy * (1 - b1) / (2 * (1 + b1))
        numbers["update/risk"] = jnp.where(jnp.isinf(jnp.asarray(clip_radius)), risk, 0.0)
    if num_examples is not None:
        count = check_number("num_examples", num_examples, low=0.0, open_low=True)
        numbers["temperature"] = count / ess
    if loss is not None:
        check_scalar("loss", loss)
        numbers["elbo"] = -ess * jnp.asarray(loss, jnp.float32) - kl
        numbers["elbo/per_example"] = numbers["elbo"] / ess
    return {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}


class Status(NamedTuple):
    """An answer to "is my posterior learning?"; `str(status)` is one line of both.

    Attributes:
      kind: "yes", "no", "at risk" (of diverging) or "broken" (not finite).
      message: what was found, and what to change.
    """

    kind: Literal["yes", "no", "at risk", "broken"]
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def learning_status(
    state: PyTree, settings: Mapping[str, Any], *, params: PyTree | None = None
) -> Status:
    """Answers "is my posterior learning?", on the host.

    Args:
      state: as in `diagnostics`.
      settings: as in `diagnostics`.
      params: as in `diagnostics`.

    Returns:
      A `Status(kind, message)`. It warns of divergence by `update/risk`, for which `settings` must
      name the `learning_rate`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import ivon, learning_status
      >>> settings = dict(ess=100, hess_init=0.5)
      >>> print(learning_status(ivon(0.1, **settings).init(jnp.ones(3)), settings))
      no: no step has been taken.
    """
    numbers = {name: float(x) for name, x in diagnostics(state, settings, params=params).items()}
    if numbers["nonfinite"]:
        return Status(
            "broken",
            f"{numbers['nonfinite'] * numbers['num_parameters']:.0f} elements of mean or hess are "
            "not finite. Start again with a smaller learning rate, a larger hess_init or a "
            "clip_radius.",
        )
    if not numbers["step"]:
        if numbers["signal_to_noise/p50"] < 0.5:
            return Status(
                "at risk",
                "the samples are mostly noise before the first step (median |m|/σ "
                f"{numbers['signal_to_noise/p50']:.2g}): raise hess_init or ess.",
            )
        return Status("no", "no step has been taken.")
    if numbers["fixed"] == 1 or not numbers["num_parameters"]:
        return Status("no", "there is no free element to learn.")
    b2, hess_init = float({**_DEFAULTS, **settings}["b2"]), float(_settings(settings)[0])
    median = numbers["hess/p50"] / hess_init
    found = (
        f"after {numbers['step']:.0f} steps {100 * numbers['hess/moved']:.0f} % of h has moved by "
        f"more than {100 * MOVED:.0f} % of h₀ (median h/h₀ {median:.3g})"
    )
    if median > EXPLODED:
        return Status(
            "no", f"h has exploded: {found}. Raise hess_init, or lower the learning rate."
        )
    if numbers.get("update/risk", 0.0) > 1:
        return Status(
            "at risk",
            "a step of the weight with the least curvature is "
            f"{numbers['update/gain']:.3g} times as long as under h₀, which diverges if it wakes "
            f"up: set precision_floor={GUARD:g}, or lower the learning rate or hess_init.",
        )
    if numbers["hess/moved"] < 0.05:
        memory = 1 - b2 ** numbers["step"]
        return Status(
            "no",
            f"h stays near its start: {found}; with b2={b2:g} it can have gone "
            f"{100 * memory:.2g} % of the way. Lower b2 or hess_init, raise the learning rate, or "
            "train longer.",
        )
    return Status(
        "yes",
        f"{found}; median |m|/σ is {numbers['signal_to_noise/p50']:.3g}, and "
        f"{100 * numbers['update/clipped']:.0f} % of the steps are clipped.",
    )


def _settings(settings: Mapping[str, Any]) -> tuple[Number, Number, Number, bool]:
    unknown = set(settings) - set(_DEFAULTS) - {"learning_rate", "ess"}
    if unknown:
        raise TypeError(
            f"settings must be the keyword arguments of ivon(); unknown: {', '.join(unknown)}."
        )
    known = {**_DEFAULTS, **settings}
    names = ("hess_init", "clip_radius", "b1", "debias")
    return tuple(known[name] for name in names)


def _check_one_ess(parts: list[IVONState]) -> None:
    ess = jnp.stack([part.ess for part in parts])
    if is_concrete(ess) and bool(jnp.any(ess != ess[0])):
        raise ValueError(
            f"the state holds several IVON states with different ess ({', '.join(map(str, ess))}), "
            "which one set of numbers would mix: call diagnostics for each."
        )


def _directions(state: IVONState, b1: Number, debias: bool) -> list[jax.Array]:
    """The preconditioned step of each leaf; zero before the first, and where δ is infinite."""
    count = jnp.maximum(state.count, 1)

    def leaf(m: jax.Array, h: jax.Array, g: jax.Array, prior: LeafPrior) -> jax.Array:
        g = g.astype(m.dtype)
        step = direction(m, h, debiased(b1, count, g) if debias else g, prior)
        return jnp.where(state.count == 0, 0, prior.where_fixed(0, step))

    trees = (state.mean, state.hess, state.momentum)
    return list(map(leaf, *map(jax.tree.leaves, trees), leaf_priors(state)))


def _largest_gain(parts: list[IVONState], hess_init: Number) -> jax.Array:
    """max (h₀+δ)/(h+δ) over elements with a finite δ."""

    def gain(h: Any, delta: Any) -> jax.Array:
        delta = delta.astype(h.dtype)
        start = jnp.asarray(hess_init, h.dtype) + delta
        return jnp.max(jnp.where(jnp.isinf(delta), 1, start / (h + delta)), initial=1).astype(
            jnp.float32
        )

    leaves = [
        gain(h, prior.delta)
        for part in parts
        for h, prior in zip(jax.tree.leaves(part.hess), leaf_priors(part), strict=True)
    ]
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.ones([], jnp.float32)


def _percentiles(
    name: str, leaves: list[jax.Array], count: jax.Array, from_top: bool
) -> dict[str, jax.Array]:
    """Elements of the ranks ⌊(n−1)p/100⌋ among the `count` smallest; those from the top of them."""
    ranks = jnp.floor((count - 1) * jnp.array(PERCENTILES, jnp.float32) / 100)
    values = lower_quantiles(leaves, count - 1 - ranks if from_top else ranks)
    return {f"{name}/p{p}": value for p, value in zip(PERCENTILES, values, strict=True)}


def _differs(h: jax.Array, hess_init: Number) -> jax.Array:
    start = jnp.asarray(hess_init, h.dtype)
    return jnp.abs(h - start) > MOVED * start


def _total(flags: list[jax.Array]) -> jax.Array:
    return sum((jnp.sum(x).astype(jnp.float32) for x in flags), jnp.zeros([], jnp.float32))
