"""Settings to start from: what follows from the size of the network, of the data and of the run."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ivon_jax._core.checks import check_number, check_positive, is_concrete
from ivon_jax._core.state import check_parameters
from ivon_jax._core.trees import PyTree

GUARD = 0.1
"""The `precision_floor` that keeps quiet weights from diverging."""

INVERSE_SQUARE_ROOT = "inverse square root"
DECAYS = "cosine", "linear", INVERSE_SQUARE_ROOT


def warmup_schedule(peak: float, num_steps: int, warmup: float, decay: str) -> optax.Schedule:
    """Linear warmup over a share of the run, or over a number of steps above 1, then decay."""
    num_steps = check_positive("num_steps", num_steps)
    steps = round(warmup * num_steps) if warmup < 1 else round(warmup)
    if steps >= num_steps:
        raise ValueError(
            f"the warmup takes {steps} steps of num_steps={num_steps}, so that the rate never gets "
            "to its peak: give ivon a schedule of your own."
        )
    if not steps and decay == INVERSE_SQUARE_ROOT:
        raise ValueError(f"the {decay} needs a warmup of a step or more; num_steps={num_steps}.")
    rest = num_steps - steps

    def inverse_square_root(count: Any) -> jax.Array:
        # join_schedules asks for counts before the boundary too.
        return peak * jnp.sqrt(steps / (steps + jnp.maximum(count, 0)))

    cosine, linear = optax.cosine_decay_schedule(peak, rest), optax.linear_schedule(peak, 0.0, rest)
    after: dict[str, optax.Schedule] = dict(
        zip(DECAYS, (cosine, linear, inverse_square_root), strict=True)
    )
    if not steps:
        return after[decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, steps), after[decay]], [steps])


def start(
    params: PyTree,
    *,
    num_examples: float,
    num_steps: int,
    learning_rate: float = 0.1,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Settings of `ivon` to start from on a problem without a recipe.

    The rate rises over a twentieth of the run and falls to 0 along a cosine; ess is N/τ. Tune the
    rate first (0.1, 0.3, 1), then the temperature (1, 0.1). Steps are updates of the mean: under
    gradient accumulation one for each window of calls. After T the rate is 0, and σ of weights that
    get no gradient grows on, up to 3.2 times its initial value.

    Args:
      params: initial parameters, drawn at random.
      num_examples: N, the number of terms that the mean loss averages over in the training set.
      num_steps: T, the length of the whole run in steps.
      learning_rate: peak of α.
      temperature: τ; below 1 the posterior is narrower than Bayes' ("cold").

    Returns:
      Keyword arguments of `ivon`: `learning_rate` (a schedule), `ess`, `hess_init`, `b2`, and
      `precision_floor` (0.1) against divergence.

    Raises:
      ValueError: if a number is out of its range, or the parameters are all zero or not finite.
      TypeError: if the parameters are traced.

    Example:
      >>> from ivon_jax import ivon, recipes
      >>> params = {"kernel": jnp.full((3, 2), 0.1)}
      >>> settings = recipes.start(params, num_examples=10_000, num_steps=2_000)
      >>> settings["ess"], settings["hess_init"], settings["b2"]
      (10000.0, 0.16, 0.999)
      >>> state = ivon(**settings).init(params)
    """
    rate, number, tau = _positive(
        learning_rate=learning_rate, num_examples=num_examples, temperature=temperature
    )
    ess = number / tau
    return {
        "learning_rate": warmup_schedule(rate, num_steps, 0.05, "cosine"),
        "ess": ess,
        "hess_init": hess_init_for(params, ess),
        "b2": b2_for(num_steps),
        "precision_floor": GUARD,
    }


def start_fine_tuning(
    params: PyTree,
    *,
    num_steps: int,
    learning_rate: float,
    noise: float = 0.08,
) -> dict[str, Any]:
    """Settings of `ivon` to start from when pretrained weights are fine-tuned.

    As when Shen et al. train transformers, steps are bounded, and ess is not N but sets the noise:
    σ₀ = 1/√(λh₀) is a small share of the root mean square r of the pretrained matrices. (With β₂
    for the length of the run, σ of weights that get no gradient grows by up to e.) Clip gradients
    to norm 1 before, as with AdamW. Tune `learning_rate` first, around AdamW's best and a little
    below, then `noise` (0.05, 0.08, 0.13).

    For low-rank adapters, one of which starts at zero, r says nothing: give `ivon` an ess of your
    own.

    Args:
      params: the pretrained weights that are trained, as they are before.
      num_steps: T, the length of the whole run in steps.
      learning_rate: AdamW's peak rate, which becomes the longest step: α(h₀+δ)ξ.
      noise: initial σ over r.

    Returns:
      Keyword arguments of `ivon`: `learning_rate` (a schedule with 5 % of warmup and a cosine),
      `ess`, `hess_init` (0.01), `clip_radius` (0.01), `weight_decay` (1e-5) and `b2`.

    Raises:
      ValueError: if a number is out of its range, or the parameters are all zero or not finite.
      TypeError: if the parameters are traced.

    Example:
      >>> from ivon_jax import ivon, recipes
      >>> params = {"kernel": jnp.full((3, 2), 0.06)}
      >>> settings = recipes.start_fine_tuning(params, num_steps=200, learning_rate=2e-5)
      >>> print(f"{settings['ess']:.2g}, {settings['learning_rate'](10):.2g}, {settings['b2']}")
      4.3e+06, 0.2, 0.99
      >>> state = ivon(**settings).init(params)
    """
    (noise,) = _positive(noise=noise)
    h0, radius, decay = 1e-2, 1e-2, 1e-5
    rate = rate_from_adamw(learning_rate, h0, radius, decay)
    return {
        "learning_rate": warmup_schedule(rate, num_steps, 0.05, "cosine"),
        "ess": float(f"{1 / (h0 * (noise * _size_of_matrices(params)) ** 2):.3g}"),
        "hess_init": h0,
        "clip_radius": radius,
        "weight_decay": decay,
        "b2": b2_for(num_steps),
    }


def ess_for_squared_error(num_terms: float, noise: float) -> float:
    """The λ for a mean squared error: N/(2s²) for observations with Gaussian noise s.

    IVON's loss is a negative log-likelihood. That of one observation is (y−f)²/(2s²) plus a
    constant; the mean of (y−f)² is 2s² times as large, and λ has to make up for it. With λ = N the
    error bars are those of s² = ½, whatever the data.

    Args:
      num_terms: N, the number of squares that the loss averages over in the whole training set:
        examples times outputs.
      noise: s, the standard deviation of the observations, in the units of y. Where it is not
        known: the error on held-out data of a first run. (`predict_moments` takes s².)

    Returns:
      A value for `ess`; for `recipes.start` one for `num_examples`.

    Raises:
      ValueError: if a number is not positive.

    Example:
      >>> from ivon_jax import recipes
      >>> recipes.ess_for_squared_error(1_000, noise=0.1)
      50000.0
    """
    number, s = _positive(num_terms=num_terms, noise=noise)
    return float(f"{number / (2 * s**2):.12g}")


def rate_from_adamw(
    learning_rate: float, hess_init: float, clip_radius: float, weight_decay: float = 0.0
) -> float:
    """The α under which a clipped step of IVON is as long as one of AdamW: lr/((h₀+δ)ξ).

    A parameter moves at most α(h₀+δ)ξ in a step; AdamW's steps are about as long as its rate.

    Args:
      learning_rate: AdamW's (peak) rate.
      hess_init: h₀.
      clip_radius: ξ, finite.
      weight_decay: δ.

    Returns:
      A value for `learning_rate`.

    Raises:
      ValueError: if a number is out of its range.

    Example:
      >>> from ivon_jax import recipes
      >>> print(f"{recipes.rate_from_adamw(3e-4, hess_init=1e-3, clip_radius=1e-3):.0f}")
      300
    """
    lr, h0, xi = _positive(
        learning_rate=learning_rate, hess_init=hess_init, clip_radius=clip_radius
    )
    return lr / ((h0 + float(check_number("weight_decay", weight_decay, low=0.0))) * xi)


def matrices(params: PyTree) -> PyTree:
    """A mask of the leaves with two or more axes: decay matrices, not vectors.

    (Where layers are stacked for a scan, vectors have two axes too: write a mask by name then.)

    Example:
      >>> from ivon_jax import recipes
      >>> recipes.matrices({"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))})
      {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)


def hess_init_for(params: PyTree, ess: float, *, noise: float = 0.25) -> float:
    """An h₀ under which a posterior starts a quarter as wide as the weights are large.

    h₀ = 1/(λ (noise · r)²), where r is the root mean square of the matrices (leaves with two or
    more axes; all leaves if there are none). With usual initial weights, σ/r is about 0.05 to 0.15
    in published runs on images, and 0.015 for GPT-2.

    Args:
      params: initial parameters, drawn at random.
      ess: λ, as `ivon` is given it.
      noise: initial σ over r, without weight decay.

    Returns:
      A value for `hess_init`.

    Raises:
      ValueError: if the parameters are all zero or not finite, or a number is not positive.
      TypeError: if the parameters are traced.

    Example:
      >>> from ivon_jax import recipes
      >>> recipes.hess_init_for({"kernel": jnp.full((3, 2), 0.1)}, ess=10_000)
      0.16
    """
    ess, noise = _positive(ess=ess, noise=noise)
    return float(f"{1 / (ess * (noise * _size_of_matrices(params)) ** 2):.3g}")


def b2_for(num_steps: int) -> float:
    """β₂ = 1 − 2/T for T steps, at least 0.9: e⁻² of the initial curvature is left at the end.

    Published runs on images and text have (1−β₂)T of 1 to 2. Where it is much larger the curvature
    of weights that get no gradient is forgotten, their posterior widens, and training diverges.

    Args:
      num_steps: T, the length of the whole run.

    Returns:
      A value for `b2`.

    Raises:
      ValueError: if the number is not a positive integer.

    Example:
      >>> from ivon_jax import recipes
      >>> recipes.b2_for(2_000), recipes.b2_for(200_000)
      (0.999, 0.99999)
    """
    return 1.0 - 2.0 / max(check_positive("num_steps", num_steps), 20)


def _size_of_matrices(params: PyTree) -> float:
    """The root mean square of the leaves with two or more axes; of all leaves if there are none."""
    check_parameters(params)
    leaves = jax.tree.leaves(params)
    if not is_concrete(*leaves) or any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise TypeError("params are traced or abstract: the initial values are needed, before jit.")
    leaves = [x for x in map(jnp.asarray, leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    leaves = [x for x in leaves if x.ndim >= 2] or leaves
    size = sum(x.size for x in leaves)
    square = float(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)) / max(size, 1)
    if not 0 < square < math.inf:
        raise ValueError("params must hold finite weights other than zero, drawn at random.")
    return math.sqrt(square)


def _positive(**numbers: float) -> list[float]:
    return [float(check_number(k, x, low=0.0, open_low=True)) for k, x in numbers.items()]
