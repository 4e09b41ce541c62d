"""Whether a posterior is learning, and what to change if it is not."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.checks import RATE_ROUNDING
from ivon_jax._core.state import GaussianPrior, find_states
from ivon_jax._core.tampering import CHANGED, auto_sample_states
from ivon_jax._core.trees import PyTree
from ivon_jax._uses.monitoring import MOVED, arguments, diagnostics
from ivon_jax._uses.starting import GUARD

EXPLODED = 1e3
"""A median of h above this multiple of h₀ counts as divergence."""

LARGE = 100.0
"""A median of h above this multiple of h₀ is what a summed loss makes."""

INFLATED = 10.0
"""A median of h above this multiple of h₀ is worth asking where it comes from."""

SMALL_RATE, LARGE_DECAY = 5e-3, 1e-2
"""What AdamW is often given, and IVON is not: published rates without a clip radius are 0.02 to
2.5, weight decays 5e-5 to 5e-3."""

SHORT = 1e-6
"""Steps that are never longer train no network."""

TAMPERED = 6.0
"""A loop's parameters that are farther from the mean, in σ, are no sample: a draw is within 5.3."""


class Status(NamedTuple):
    """An answer to "is my posterior learning?"; `str(status)` is one line of both.

    Attributes:
      kind: "not started", "yes", "no", "at risk" (of diverging, or of learning something else than
        is meant), "broken" (not finite) or "tampered" (the loop's parameters are not the sample
        that was drawn).
      message: what was found, and what to change.
    """

    kind: Literal["not started", "yes", "no", "at risk", "broken", "tampered"]
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def learning_status(
    state: PyTree, settings: Mapping[str, Any], *, params: PyTree | None = None
) -> Status:
    """Answers "is my posterior learning?", on the host.

    Args:
      state: as in `diagnostics`.
      settings: as in `diagnostics`, the `learning_rate` among them, without which a divergence
        cannot be seen; with `ess` and `weight_decay` a state that was trained under others is.
      params: the loop's parameters: with them it is noticed if something changes them behind the
        optimizer's back. Needed where the mean is not stored.

    Returns:
      A `Status(kind, message)`.

    Raises:
      TypeError: if `settings` lacks the `learning_rate`, or has a key that is no argument of
        `ivon`.
      ValueError: as `diagnostics`.

    Example:
      >>> from ivon_jax import ivon, learning_status
      >>> settings = dict(learning_rate=0.1, ess=100, hess_init=0.5)
      >>> print(learning_status(ivon(**settings).init(jnp.ones(3)), settings))
      not started: no step has been taken; median |m|/σ is 7.07.
    """
    if "learning_rate" not in settings:
        raise TypeError(
            "settings lack the learning_rate (a number, or the schedule that ivon() was given), "
            "without which no divergence can be seen: pass all arguments of ivon()."
        )
    found = jax.device_get(diagnostics(state, settings, params=params))
    numbers = {name: float(x) for name, x in found.items()}
    return (
        _wrong_rate(state, settings)
        or _changed(state, numbers)
        or _broken(state, numbers)
        or _disagreement(state, settings)
        or _not_begun(numbers, arguments(settings))
        or _curvature(numbers, arguments(settings))
    )


def _wrong_rate(state: PyTree, settings: Mapping[str, Any]) -> Status | None:
    """A learning rate, now or by the schedule for the next step, that cannot be meant."""
    given: Any = settings["learning_rate"]
    step = find_states(state)[0].count
    value: Any = given(step) if callable(given) else given
    rate = float(value)
    if -RATE_ROUNDING <= rate < math.inf:
        return None
    kind = "at risk" if math.isfinite(rate) else "broken"
    return Status(kind, f"the learning rate at step {step} is {rate:g}: mend the schedule.")


def _changed(state: PyTree, numbers: dict[str, float]) -> Status | None:
    """Parameters that are no sample, or not the one that was drawn."""
    distance = numbers.get("sample/distance", 0.0)
    at_start = not numbers["step"] and all(bool(x.at_mean) for x in auto_sample_states(state))
    if distance > TAMPERED and at_start:
        return Status(
            "not started",
            "no step has been taken, and the parameters are not those that init was given: at the "
            "first step they become the mean. To evaluate before, call with_mean(state, params).",
        )
    if distance > TAMPERED:
        return Status(
            "tampered",
            f"the loop's parameters are up to {distance:.3g} σ from the mean, and a draw is within "
            f"5.3: {CHANGED}",
        )
    agreement = numbers.get("sample/agreement", 1.0)
    if abs(agreement - 1) > 0.1:
        return Status(
            "tampered",
            "the loop's parameters are not the sample that auto_sample has drawn (their noise is "
            f"{agreement:.2g} times that one; 0 is the mean, or another sample): {CHANGED}",
        )
    return None


def _broken(state: PyTree, numbers: dict[str, float]) -> Status | None:
    """A state that is not finite, and where it may come from."""
    for part in find_states(state):
        decays = np.asarray(part.weight_decay, np.float32)  # empty with a general prior
        for name, value, proper in (
            ("ess", float(part.ess), float(part.ess) > 0),
            ("weight_decay", float(np.min(decays, initial=0)), bool(np.all(decays >= 0))),
        ):
            if not proper:
                return Status(
                    "broken",
                    f"{name} in the state is {value:g}, which is what a value out of its range "
                    "becomes: mend what sets it, and start again from a state before that.",
                )
    if not numbers["nonfinite"]:
        return None
    found = (
        f"{numbers['nonfinite'] * numbers['num_parameters']:.0f} elements of mean or hess are not "
        "finite. "
    )
    checks = any(jax.tree.leaves(x.expected) for x in auto_sample_states(state))
    changed = (
        "With check=True a change of the parameters or their updates becomes that under jit, and "
        f"two steps from a new state without jit say so: {CHANGED} If these say nothing: "
    )
    return Status(
        "broken",
        f"{found}{changed * checks}Start again with a smaller learning rate, a larger hess_init or "
        "a clip_radius. Or a batch or the loss is not finite; the loss is a sum and not a mean; an "
        "injected hyperparameter has left its range; or something changes the parameters after "
        "ivon, such as a transformation outside auto_sample, which auto_sample(..., check=True) "
        "says in two steps without jit.",
    )


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
            f"steps {ratio:.3g} times as long: divide the learning rate by that, and a "
            "precision_floor.",
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


def _not_begun(numbers: dict[str, float], given: Mapping[str, Any]) -> Status | None:
    """No step, or nothing that a step could change."""
    if numbers["fixed"] == 1 or not numbers["num_parameters"]:
        return Status("no", "there is no free element to learn.")
    signal = numbers["signal_to_noise/p50"]
    start = float(given["hess_init"])
    if not numbers["step"] and abs(numbers["hess/p50"] - start) > MOVED * start:
        return Status(
            "at risk",
            f"no step has been taken, and the median of h is {numbers['hess/p50']:g}, where the "
            f"settings have hess_init={start:g}: pass all arguments of ivon(). (After with_ess, "
            "which rescales h, that is meant.)",
        )
    if not numbers["step"] and 0 < signal < 0.5:
        return Status(
            "at risk",
            f"the samples are mostly noise before the first step (median |m|/σ {signal:.2g}): "
            "raise hess_init or ess.",
        )
    if not numbers["step"]:
        found = f"no step has been taken; median |m|/σ is {signal:.3g}."
        found += " (Most weights start at zero, as in adapters.)" * (not signal)
        return Status("not started", found + _as_for_adamw(given))
    return None


def _as_for_adamw(given: Mapping[str, Any]) -> str:
    """A hint at numbers that may have been copied from AdamW."""
    rate: Any = given["learning_rate"]
    decay: Any = given["weight_decay"]
    if callable(rate):
        schedule: Any = rate
        steps = {*range(0, 100, 5), *(round(1.5**k) for k in range(35))}  # to a million
        rate = max(float(schedule(jnp.int32(step))) for step in steps)
    said = ""
    if 0 < float(rate) < SMALL_RATE and math.isinf(float(given["clip_radius"])):
        said += (
            f" A learning rate of {float(rate):.3g} is small without a clip radius, unless the "
            "loss is steep: begin with 0.1 to 1."
        )
    if decay is not None and not callable(decay) and float(decay) >= LARGE_DECAY:
        said += (
            f" weight_decay={float(decay):.3g} is the coefficient of an L2 penalty, as SGD's, and "
            "large for one; AdamW's numbers are a hundred times as large."
        )
    return said


def _curvature(numbers: dict[str, float], given: Mapping[str, Any]) -> Status:
    """What has become of h, and of the steps that it scales."""
    b2, hess_init = float(given["b2"]), float(given["hess_init"])
    median = numbers["hess/p50"] / hess_init
    found = (
        f"after {numbers['step']:.0f} steps {100 * numbers['hess/moved']:.0f} % of h has moved by "
        f"more than {100 * MOVED:.0f} % of h₀ (median h/h₀ {median:.3g}; forgetting alone leaves "
        f"{b2 ** numbers['step']:.3g})"
    )
    if median > INFLATED and numbers["hess/inflated"] > 0.5:
        return Status(
            "no",
            f"h is inflated by large gradients, and the steps are as much shorter: {found}; for "
            f"{100 * numbers['hess/inflated']:.0f} % of the elements (1-b2)·ess·g²/2 is most of h. "
            "Lower ess, or raise b2 towards 1. Where ess follows from the noise of the data, begin "
            "with a smaller one, and go on by with_ess(state, ess) once the gradients are small. "
            "And see that the loss is a mean, not a sum.",
        )
    if median > EXPLODED:
        return Status(
            "no",
            f"h has exploded: {found}. Raise hess_init, or lower the rate; and see that the loss "
            "is a mean over examples, not a sum.",
        )
    if median > LARGE:
        return Status(
            "at risk",
            f"h is large: {found}. Is the loss a mean? A sum over n examples makes h n times as "
            "large, and needs optax.chain(optax.scale(1 / n), ivon(...)). If it is, raise "
            "hess_init.",
        )
    clipped = _clipped(numbers)
    if clipped:
        return clipped
    guarded = float(given["precision_floor"]) >= GUARD
    if numbers["update/risk"] > 1 and not guarded:
        return Status(
            "at risk",
            "a step of the weight with the least curvature is "
            f"{numbers['update/gain']:.3g} times as long as under h₀, which diverges if it wakes "
            f"up: set precision_floor={GUARD:g}, or lower hess_init, or the learning rate by a "
            f"factor of {numbers['update/risk']:.2g}."
            + " And see that the loss is a mean, not a sum."
            * (numbers["update/risk"] > LARGE),
        )
    if numbers["hess/moved"] < 0.05:
        memory = 1 - b2 ** numbers["step"]
        return Status(
            "no",
            f"h stays near its start: {found}; with b2={b2:g} it can have gone "
            f"{100 * memory:.2g} % of the way. Lower b2 or hess_init, raise the learning rate, or "
            "train longer.",
        )
    if numbers["update/idle"] > 0.99:
        return Status(
            "no",
            f"h has only been forgotten: {found}, and no gradient has reached "
            f"{100 * numbers['update/idle']:.3g} % of the weights.",
        )
    signal = numbers["signal_to_noise/p50"]
    share = f"{100 * numbers['update/clipped']:.0f} % of the steps are clipped"
    ended = not numbers["update/risk"] and math.isinf(float(given["clip_radius"]))
    over = " (The rate is 0, at which nothing diverges: ask during the run as well.)" * ended
    noisy = " More than half of the weights are mostly noise: compare the samples' loss with "
    noisy += "the mean's on held-out data."
    noisy *= signal < 0.5
    return Status("yes", f"{found}; median |m|/σ is {signal:.3g}, and {share}.{noisy}{over}")


def _clipped(numbers: dict[str, float]) -> Status | None:
    """Steps whose length is the clip radius's, and not the gradient's."""
    longest = numbers["update/longest"]
    if numbers["update/clipped"] <= 0.5 or not longest:
        return None
    found = (
        f"{100 * numbers['update/clipped']:.0f} % of the steps are clipped, so that each is "
        f"{longest:.2g} long whatever the gradient"
    )
    if longest < SHORT:
        advice = "which trains no network: raise the learning rate"
    else:
        advice = "which may be meant, as after recipes.rate_from_adamw: go by the training loss"
    return Status(
        "at risk",
        f"{found}, {advice}. A rate belongs to its hess_init and clip_radius: "
        "recipes.rate_from_adamw(lr, hess_init, clip_radius) converts one of AdamW's.",
    )


def _differ(setting: Any, found: list[float]) -> bool:
    """Whether a number that was given is none of those found; a schedule is not compared."""
    if setting is None or callable(setting):
        return False
    return not any(math.isclose(float(setting), x, rel_tol=1e-6) for x in found)
