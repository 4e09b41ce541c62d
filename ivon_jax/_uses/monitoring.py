"""What a posterior looks like in numbers, and whether it is learning."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.checks import Number, check_number, check_scalar, is_concrete
from ivon_jax._core.optimizer import ivon
from ivon_jax._core.posteriors import kl_divergence, prior_of
from ivon_jax._core.rule import LeafPrior, bias_correction, direction
from ivon_jax._core.state import (
    GaussianPrior,
    IVONState,
    Posterior,
    find_states,
    gaussian,
    is_auto_sample_state,
    leaf_priors,
    precision_leaves,
    with_means,
)
from ivon_jax._core.trees import Owned, PyTree
from ivon_jax._uses.pruning import lower_quantiles, ratio_leaves

PERCENTILES = (1, 25, 50, 75, 99)
MOVED = 0.1
"""An element of h has moved if it differs from h₀ by more than this share of h₀."""

EXPLODED = 1e3
"""A median of h above this multiple of h₀ counts as divergence."""

TAMPERED = 6.0
"""A loop's parameters that are farther from the mean, in σ, are no sample: a draw is within 5.3."""

GUARD = 0.1
"""The `precision_floor` that `learning_status` recommends."""

MARGIN = 10.0
"""How far noisy gradients must stay below the stability bound of exact ones."""

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
        `debias` and, for the risk, `learning_rate` are read; the others are in the state.
      num_examples: N, the size of the training set, for the temperature N/λ.
      loss: the training loss, a mean per example averaged over posterior samples, for the ELBO.
      params: the loop's parameters; needed where the mean is not stored (`store_mean=False`).

    Returns:
      A dictionary of float32 scalars. Elements that a general prior fixes count in `fixed` only:

      * `step`, `num_parameters`, `ess`;
      * `fixed`, `nonfinite`: share of elements that are fixed, or whose mean or h is not finite;
      * `hess/p1` … `hess/p99`, `sigma/p1` …, `signal_to_noise/p1` …: percentiles of h, of σ and
        of |m|/σ (the element of rank ⌊(n−1)p/100⌋);
      * `hess/negative`: share of elements with h < 0 (their posterior is wider than the prior);
      * `hess/moved`: share of elements with |h−h₀| > 0.1 h₀;
      * `update/clipped`: share of elements whose step (ḡ+δm)/(h+δ) is at the clip radius;
      * `update/gain`: the largest (h₀+δ)/(h+δ), the factor by which the weight that has lost the
        most curvature takes longer steps than at the start;
      * `update/risk`, with `learning_rate`: ten times α·gain·c/(h₀+δ) over 2(1+β₁)/(1−β₁), the
        bound above which a quadratic of curvature c diverges, with c the larger of h₀+δ and the
        99th percentile of h+δ; above one, a quiet weight that wakes up may set off a divergence.
        Zero where a clip radius bounds the steps;
      * `kl`: KL(q‖prior) in nats, without the elements with a flat prior, of share `kl/flat`;
      * `sample/distance`, with `params` and a state of `auto_sample`: the largest |θ−m|/σ, beyond
        what rounding to a dtype below float32 explains. A draw is within 5.3; more means that
        something changes the updates or the parameters behind the optimizer's back;
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
    constants = _settings(settings)
    parts = find_states(with_means(state, params))
    _check_one_ess(parts)
    given: dict[str, Any] = {}
    if params is not None and any(map(is_auto_sample_state, _nodes(state))):
        given["distance"] = _sample_distance(gaussian(state, params), params)
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


class _Constants(NamedTuple):
    """The arguments of `ivon` that the numbers depend on."""

    hess_init: Number
    clip_radius: Number
    b1: Number
    debias: bool


def _numbers(
    constants: _Constants, parts: list[IVONState], given: dict[str, Any]
) -> dict[str, jax.Array]:
    """What `diagnostics` returns, from the states and the numbers that it was given."""
    hess_init, clip_radius, b1, debias = constants
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
    kl = kl_divergence(parts, prior_of(parts)).astype(jnp.float32)
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
        "update/clipped": share(
            lambda x: jnp.abs(x.step) >= jnp.asarray(clip_radius, x.step.dtype)
        ),
        "update/gain": gain,
        "kl": kl,
        "kl/flat": share(lambda x: jnp.broadcast_to(x.delta == 0, x.hess.shape)),
    }
    if "learning_rate" in given:
        delta = jnp.min(jnp.stack([jnp.min(x.delta) for x in leaves])) if leaves else 0.0
        busy = jnp.maximum((numbers["hess/p99"] + delta) / (hess_init + delta), 1)
        risk = MARGIN * given["learning_rate"] * gain * busy * (1 - b1) / (2 * (1 + b1))
        numbers["update/risk"] = jnp.where(jnp.isinf(jnp.asarray(clip_radius)), risk, 0.0)
    if "distance" in given:
        numbers["sample/distance"] = given["distance"]
    if "num_examples" in given:
        numbers["temperature"] = given["num_examples"] / ess
    if "loss" in given:
        numbers["elbo"] = -ess * jnp.asarray(given["loss"], jnp.float32) - kl
        numbers["elbo/per_example"] = numbers["elbo"] / ess
    return {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}


_compiled_numbers = jax.jit(_numbers, static_argnums=0)


class Status(NamedTuple):
    """An answer to "is my posterior learning?"; `str(status)` is one line of both.

    Attributes:
      kind: "yes", "no", "at risk" (of diverging), "broken" (not finite) or "tampered" (the loop's
        parameters are no sample of the posterior).
      message: what was found, and what to change.
    """

    kind: Literal["yes", "no", "at risk", "broken", "tampered"]
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def learning_status(
    state: PyTree, settings: Mapping[str, Any], *, params: PyTree | None = None
) -> Status:
    """Answers "is my posterior learning?", on the host.

    Args:
      state: as in `diagnostics`.
      settings: as in `diagnostics`; with the `learning_rate` divergence is warned of, and with
        `ess` and `weight_decay` a state that was trained under others.
      params: as in `diagnostics`; after `auto_sample`, with them it is noticed if something changes
        the loop's parameters.

    Returns:
      A `Status(kind, message)`.

    Example:
      >>> from ivon_jax import ivon, learning_status
      >>> settings = dict(ess=100, hess_init=0.5)
      >>> print(learning_status(ivon(0.1, **settings).init(jnp.ones(3)), settings))
      no: no step has been taken.
    """
    found = jax.device_get(diagnostics(state, settings, params=params))
    numbers = {name: float(x) for name, x in found.items()}
    mistake = _wrong_rate(state, settings)
    if mistake:
        return mistake
    distance = numbers.get("sample/distance", 0.0)
    if distance > TAMPERED:
        return Status(
            "tampered",
            f"the loop's parameters are up to {distance:.3g} σ from the mean, and a draw is within "
            "5.3: something changes the updates or the parameters after auto_sample, such as "
            "optax.transforms.freeze, reduce_on_plateau, a clip or loaded weights. Put it inside "
            "the optimizer (optax.partition, inject_hyperparams), or call "
            "with_mean(state, params).",
        )
    if numbers["nonfinite"]:
        return Status(
            "broken",
            f"{numbers['nonfinite'] * numbers['num_parameters']:.0f} elements of mean or hess are "
            "not finite. Start again with a smaller learning rate, a larger hess_init or a "
            "clip_radius; and see that nothing changes the parameters after auto_sample.",
        )
    mistake = _disagreement(state, settings)
    if mistake:
        return mistake
    signal = numbers["signal_to_noise/p50"]
    if not numbers["step"] and signal < 0.5:
        return Status(
            "at risk",
            f"the samples are mostly noise before the first step (median |m|/σ {signal:.2g}): "
            "raise hess_init or ess.",
        )
    if not numbers["step"]:
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
        return Status("no", f"h has exploded: {found}. Raise hess_init, or lower the rate.")
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
        f"{found}; median |m|/σ is {signal:.3g}, and "
        f"{100 * numbers['update/clipped']:.0f} % of the steps are clipped.",
    )


def _nodes(state: PyTree) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=is_auto_sample_state)


@jax.jit
def _sample_distance(q: Posterior, params: PyTree) -> jax.Array:
    """The largest |θ−m|/σ, of elements that are free."""
    own = Owned(q.mean)
    precisions = own.checked("the precision", q.precision)
    largest = jnp.zeros([], jnp.float32)
    for m, s, p in zip(own.leaves, precisions, own.checked("params", params), strict=True):
        # The sample is rounded once, and the sum that lands on it once more.
        slack = 2 * jnp.asarray(jnp.finfo(p.dtype).eps, m.dtype) * (jnp.abs(m) + jax.lax.rsqrt(s))
        beyond = jnp.maximum(jnp.abs(p.astype(m.dtype) - m) - slack, 0) * jnp.sqrt(s)
        beyond = jnp.where(jnp.isfinite(beyond), beyond, 0)  # fixed, or broken
        largest = jnp.maximum(largest, jnp.max(beyond, initial=0).astype(jnp.float32))
    return largest


def _wrong_rate(state: PyTree, settings: Mapping[str, Any]) -> Status | None:
    """A learning rate, now or by the schedule for the next step, that cannot be meant."""
    given: Any = settings.get("learning_rate", 0.0)
    step = find_states(state)[0].count
    value: Any = given(step) if callable(given) else given
    rate = float(value)
    if 0 <= rate < math.inf:
        return None
    kind = "at risk" if math.isfinite(rate) else "broken"
    return Status(kind, f"the learning rate at step {step} is {rate:g}: mend the schedule.")


def _disagreement(state: PyTree, settings: Mapping[str, Any]) -> Status | None:
    """Numbers that the state and the settings both have, and that differ."""
    parts = find_states(state)
    ess: Any = settings.get("ess")
    old_ess = float(parts[0].ess)
    if _differ(ess, [old_ess]):
        ratio = ess / old_ess
        return Status(
            "at risk",
            f"the state was trained with ess={old_ess:g} and the settings say {ess:g}: at the next "
            f"step σ jumps by a factor of {ratio**-0.5 if ratio > 0 else math.inf:.3g}. If "
            "that is meant, take the step and ask again. with_ess(state, ess) keeps σ, and makes "
            f"steps {ratio:.3g} times as long: divide the learning rate by that.",
        )
    decays = [part.weight_decay for part in parts if not isinstance(part.prior, GaussianPrior)]
    # A mask leaves some at zero; and of several parts each has its own.
    old = [float(jnp.max(decay)) for decay in decays if decay.size]
    if old and _differ(settings.get("weight_decay"), old):
        return Status(
            "at risk",
            f"the state was trained with weight_decay={old[0]:g} and the settings say "
            f"{settings['weight_decay']:g}: from the next step on the prior is another. If that is "
            "meant, take the step and ask again.",
        )
    return None


def _differ(setting: Any, found: list[float]) -> bool:
    """Whether a number that was given is none of those found; a schedule is not compared."""
    if setting is None or callable(setting):
        return False
    return not any(math.isclose(float(setting), x, rel_tol=1e-6) for x in found)


def _settings(settings: Mapping[str, Any]) -> _Constants:
    unknown = set(settings) - set(_DEFAULTS) - {"learning_rate", "ess"}
    if unknown:
        raise TypeError(
            f"settings must be the keyword arguments of ivon(); unknown: {', '.join(unknown)}."
        )
    known = {**_DEFAULTS, **settings}
    return _Constants(*(known[name] for name in _Constants._fields))


def _check_one_ess(parts: list[IVONState]) -> None:
    ess = jnp.stack([part.ess for part in parts])
    if is_concrete(ess) and bool(jnp.any(ess != ess[0])):
        raise ValueError(
            f"the state holds several IVON states with different ess ({', '.join(map(str, ess))}), "
            "which one set of numbers would mix: call diagnostics for each."
        )


class _Leaf(NamedTuple):
    """One leaf of the posterior: `step` is (ḡ+δm)/(h+δ), `free` what no prior fixes."""

    mean: jax.Array
    hess: jax.Array
    precision: jax.Array
    delta: jax.Array
    step: jax.Array
    free: jax.Array


def _leaves(state: IVONState, b1: Number, debias: bool) -> list[_Leaf]:
    count = jnp.maximum(state.count, 1)

    def leaf(m: jax.Array, h: jax.Array, g: jax.Array, p: jax.Array, prior: LeafPrior) -> _Leaf:
        g = g.astype(m.dtype)
        step = direction(m, h, g * bias_correction(b1, count, g.dtype) if debias else g, prior)
        step = jnp.where(state.count == 0, 0, prior.where_fixed(0, step))
        return _Leaf(m, h, p, prior.delta, step, ~jnp.isinf(p))

    trees = map(jax.tree.leaves, (state.mean, state.hess, state.momentum))
    return list(map(leaf, *trees, precision_leaves(state), leaf_priors(state)))


def _largest_gain(leaf: _Leaf, hess_init: Number) -> jax.Array:
    """max (h₀+δ)/(h+δ) over elements with a finite δ."""
    delta = leaf.delta.astype(leaf.hess.dtype)
    start = jnp.asarray(hess_init, delta.dtype) + delta
    gains = jnp.where(jnp.isinf(delta), 1, start / (leaf.hess + delta))
    return jnp.max(gains, initial=1).astype(jnp.float32)


def _differs(h: jax.Array, hess_init: Number) -> jax.Array:
    start = jnp.asarray(hess_init, h.dtype)
    return jnp.abs(h - start) > MOVED * start


def _total(flags: Iterable[jax.Array]) -> jax.Array:
    return sum((jnp.sum(x).astype(jnp.float32) for x in flags), jnp.zeros([], jnp.float32))
