"""What a posterior looks like in numbers, and whether it is learning."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ivon_jax._checks import Number, check_number
from ivon_jax._order import lower_quantiles
from ivon_jax._trees import Slots
from ivon_jax.optimizer import ivon
from ivon_jax.posterior import posterior, prior_of
from ivon_jax.pruning import signal_to_noise
from ivon_jax.state import IVONState, Posterior, decay_leaves, find_states

PyTree = Any

PERCENTILES = (1, 25, 50, 75, 99)
MOVED = 0.1
"""An element of h has moved when it differs from h₀ by more than this share of h₀."""

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
) -> dict[str, jax.Array]:
    """Numbers for a logger that describe the posterior; pure, so that it runs under jit.

    Nothing is sorted or gathered: memory and communication do not grow with the network.

    Args:
      state: an `IVONState`, or any nested optax or `flax.nnx` state that contains one or
        several, whose leaves are then counted together.
      settings: the keyword arguments that `ivon` was given. `hess_init`, `clip_radius`, `b1`
        and `debias` are read from it, the others are in the state.
      num_examples: N, the size of the training set, for the temperature N/λ.
      loss: the training loss, a mean per example averaged over posterior samples, for the ELBO.

    Returns:
      A dictionary of float32 scalars:

      * `step`, `num_parameters`, `ess`;
      * `hess/p1` … `hess/p99`, `sigma/p1` …, `signal_to_noise/p1` …: percentiles of h, of σ and
        of |m|/σ (the element of rank ⌊(n−1)p/100⌋);
      * `hess/negative`: share of elements with h < 0 (their posterior is wider than the prior);
      * `hess/moved`: share of elements with |h−h₀| > 0.1 h₀;
      * `update/clipped`: share of elements whose preconditioned step (ḡ+δm)/(h+δ), at the
        current momentum and mean, is at the clip radius;
      * `kl`: KL(q‖prior) in nats over the elements with a proper prior, and `kl/flat`, the
        share of elements without one (δ = 0), which are left out of it;
      * `temperature`: N/λ, with `num_examples`;
      * `elbo`: −λ·loss − KL in nats, and `elbo/per_example`, that over λ, with `loss`.

    Raises:
      TypeError: if `settings` has a key that is no argument of `ivon`.
      ValueError: if `state` contains no `IVONState`.

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
    parts = find_states(state)
    hess = [h for part in parts for h in jax.tree.leaves(part.hess)]
    steps = [u for part in parts for u in _preconditioned(part, b1, debias)]
    q, prior = posterior(state), prior_of(state)
    precision, ratios = jax.tree.leaves(q.precision), jax.tree.leaves(signal_to_noise(q))
    numbers = {
        "step": jnp.max(jnp.stack([part.count for part in parts])),
        "num_parameters": sum(x.size for x in hess),
        "ess": parts[0].ess,
        **_percentiles("hess", hess),
        # σ falls as the precision rises: its percentiles are those from the other end.
        **{
            name: jax.lax.rsqrt(x)
            for name, x in _percentiles("sigma", precision, from_top=True).items()
        },
        **_percentiles("signal_to_noise", ratios),
        "hess/negative": _share([h < 0 for h in hess]),
        "hess/moved": _share([jnp.abs(h - hess_init) > MOVED * hess_init for h in hess]),
        "update/clipped": _share([jnp.abs(u) >= clip_radius for u in steps]),
        "kl": kl_divergence(q, prior),
        "kl/flat": _share([p == 0 for p in jax.tree.leaves(prior.precision)]),
    }
    if num_examples is not None:
        count = check_number("num_examples", num_examples, low=0.0, open_low=True)
        numbers["temperature"] = count / parts[0].ess
    if loss is not None:
        numbers["elbo"] = -parts[0].ess * jnp.asarray(loss, jnp.float32) - numbers["kl"]
        numbers["elbo/per_example"] = numbers["elbo"] / parts[0].ess
    return {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}


def kl_divergence(q: Posterior, prior: Posterior) -> jax.Array:
    """KL(q‖prior) = ½Σ[s₀σ² + s₀(m−m₀)² − 1 − log(s₀σ²)] of two diagonal Gaussians, in nats.

    Elements with a flat prior (s₀ = 0), which have no divergence, and those that are fixed in q
    (σ = 0) are left out.

    Args:
      q: a posterior.
      prior: a Gaussian over the same tree, such as `prior_of(state)`.

    Returns:
      A scalar; +inf where the prior fixes an element that q does not.

    Raises:
      ValueError: if the trees do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import Posterior, kl_divergence
      >>> q = Posterior(jnp.array([1.0]), jnp.array([1.0]))
      >>> print(kl_divergence(q, Posterior(jnp.zeros(1), jnp.ones(1))))
      0.5
    """
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
        counted = (p0 > 0) & jnp.isfinite(p)
        ratio = jnp.where(counted, p0 / p, 1)
        shift = jnp.where(counted, m.astype(p.dtype) - m0.astype(p.dtype), 0)
        terms = ratio - 1 - jnp.log(ratio) + jnp.where(counted, p0, 0) * shift**2
        # inf − inf where only the prior is fixed
        terms = jnp.where(counted & jnp.isinf(p0), jnp.inf, terms)
        total = total + 0.5 * jnp.sum(terms).astype(total.dtype)
    return total


def learning_status(state: PyTree, settings: Mapping[str, Any]) -> str:
    """One line that answers "is my posterior learning?", computed on the host.

    Args:
      state: as in `diagnostics`.
      settings: as in `diagnostics`.

    Returns:
      A sentence that begins with "yes", "no" or "broken" and says what to change.

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import ivon, learning_status
      >>> settings = dict(ess=100, hess_init=0.5)
      >>> learning_status(ivon(0.1, **settings).init(jnp.ones(3)), settings)
      'no: no step has been taken.'
    """
    # The median does not see single values that are not finite.
    bad = sum(
        int(jnp.sum(~jnp.isfinite(x)))
        for part in find_states(state)
        for x in jax.tree.leaves((part.mean, part.hess))
    )
    if bad:
        return (
            f"broken: {bad} elements of mean and hess are not finite. Start again with a smaller "
            "learning rate, a larger hess_init or a clip_radius."
        )
    numbers = {name: float(x) for name, x in diagnostics(state, settings).items()}
    if not numbers["step"]:
        return "no: no step has been taken."
    b2 = float({**_DEFAULTS, **settings}["b2"])
    hess_init, *_ = _settings(settings)
    median = numbers["hess/p50"] / float(hess_init)
    found = (
        f"after {numbers['step']:.0f} steps {100 * numbers['hess/moved']:.0f} % of h has moved by "
        f"more than {100 * MOVED:.0f} % of h₀ (median h/h₀ {median:.3g})"
    )
    clipped = numbers["update/clipped"]
    if clipped > 0.5:
        return (
            f"no: {100 * clipped:.0f} % of the steps are clipped; {found}. Raise hess_init or "
            "clip_radius, or the curvature hardly matters."
        )
    if numbers["hess/moved"] < 0.05:
        memory = 1 - b2 ** numbers["step"]
        return (
            f"no: h stays near its start: {found}; with b2={b2:g} it can have gone "
            f"{100 * memory:.2g} % of the way. Lower b2 or hess_init, raise the learning rate, or "
            "train longer."
        )
    return f"yes: {found}; median |m|/σ is {numbers['signal_to_noise/p50']:.3g}."


def _settings(settings: Mapping[str, Any]) -> tuple[Number, Number, Number, bool]:
    unknown = set(settings) - set(_DEFAULTS) - {"learning_rate", "ess"}
    if unknown:
        raise TypeError(
            f"settings must be the keyword arguments of ivon(); unknown: {', '.join(unknown)}."
        )
    known = {**_DEFAULTS, **settings}
    return known["hess_init"], known["clip_radius"], known["b1"], known["debias"]


def _preconditioned(state: IVONState, b1: Number, debias: bool) -> list[jax.Array]:
    """(ḡ + δ(m−m₀))/(h+δ) of each leaf; zero before the first step, and where δ is infinite."""
    means, momenta = jax.tree.leaves(state.mean), jax.tree.leaves(state.momentum)
    centers = (
        jax.tree.leaves(state.prior.mean) if state.prior else [jnp.zeros_like(m) for m in means]
    )
    leaves = zip(
        means, jax.tree.leaves(state.hess), momenta, decay_leaves(state), centers, strict=True
    )

    def step(m: Any, h: Any, g: Any, delta: Any, m0: Any) -> jax.Array:
        delta, g = delta.astype(m.dtype), g.astype(m.dtype)
        if debias:
            g = g / (1 - jnp.asarray(b1, m.dtype) ** jnp.maximum(state.count, 1).astype(m.dtype))
        u = (g + delta * (m - m0)) / (h + delta)
        return jnp.where(jnp.isinf(delta) | (state.count == 0), 0, u)

    return [step(*leaf) for leaf in leaves]


def _percentiles(
    name: str, leaves: list[jax.Array], *, from_top: bool = False
) -> dict[str, jax.Array]:
    total = sum(x.size for x in leaves)
    if not total:
        return {}
    ranks = jnp.array([(total - 1) * p // 100 for p in PERCENTILES], jnp.float32)
    if from_top:
        ranks = total - 1 - ranks
    values = lower_quantiles(leaves, ranks)
    return {f"{name}/p{p}": value for p, value in zip(PERCENTILES, values, strict=True)}


def _share(flags: list[jax.Array]) -> jax.Array:
    total = sum(x.size for x in flags)
    counts = [jnp.sum(x).astype(jnp.float32) for x in flags]
    return jnp.sum(jnp.stack(counts)) / total if total else jnp.zeros([])
