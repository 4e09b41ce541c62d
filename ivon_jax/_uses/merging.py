"""Merging models through their posteriors: sums of Gaussians' natural parameters.

References: Daheim et al., Model Merging by Uncertainty-Based Gradient Matching, `arXiv:2310.12808
<https://arxiv.org/abs/2310.12808>`_.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.basis import in_coordinates, in_parameters
from ivon_jax._core.checks import Number, check_number, is_concrete
from ivon_jax._core.gaussians import gaussian, wide_precisions
from ivon_jax._core.state import Posterior, check_parameters
from ivon_jax._core.trees import Owned, PyTree, cast, place, unflatten_like, wide_dtype


def merge(
    posteriors: Sequence[Posterior],
    *,
    weights: Sequence[Number] | None = None,
    base: Posterior | None = None,
) -> Posterior:
    r"""Merges the posteriors of models that were trained from one base on different data.

    With the base N(θ₀, 1/H₀), which is the prior of every task, posteriors N(θ_t, 1/P_t) and
    weights α_t, the merged Gaussian has

    .. code-block:: text

      H̄ = H₀ + Σ_t α_t (P_t − H₀)
      θ = θ₀ + Σ_t α_t H̄⁻¹ P_t (θ_t − θ₀)

    so that the base is counted once. For linear-Gaussian models with diagonal Gram matrices and
    α = 1 this is training on all data at once. Special cases:

    * Without `base` (H₀ = 0): the precision-weighted mean Σ_t P_t θ_t / Σ_k P_k, which counts the
      prior once per model; with Fisher informations as precisions, Fisher averaging.
    * Removing a task from a merged model: `merge([merged, task], weights=[1, -1], base=base)`.
    * Federated averaging: `base` is the server's posterior, with which as their prior
      (`ivon(prior=server)`) the clients were trained; weights count a client's data α times.

    Args:
      posteriors: the models' posteriors (or optax states), also under different λ.
      weights: α_t, one number per model (1 by default); negative ones remove.
      base: the prior of every task, N(θ₀, 1/H₀). For models fine-tuned with plain weight decay,
        whose prior has mean 0, the paper takes the base model's weights with H₀ = λδ.

    Returns:
      The merged `Posterior`, its means in the dtypes of the first's, its precisions in the widest
      dtype and at least float32. Elements whose precision is infinite (fixed) must be fixed in all,
      at equal values, and stay so.

    Raises:
      ValueError: if the trees do not fit, a precision is negative, fixed elements or bases differ,
        or removing leaves no positive precision (under jit such elements become NaN).

    Example:
      >>> from ivon_jax import Posterior, merge
      >>> a = Posterior(jnp.array([0.0]), jnp.array([1.0]))
      >>> b = Posterior(jnp.array([4.0]), jnp.array([3.0]))
      >>> merged = merge([a, b])
      >>> print(merged.mean, merged.precision)
      [3.] [4.]
    """
    # A named tuple, such as a Posterior or a state, is one model.
    posteriors = [] if hasattr(posteriors, "_fields") else list(posteriors)
    if not posteriors:
        raise TypeError("posteriors must be a non-empty sequence, with one entry per model.")
    posteriors = [q if isinstance(q, Posterior) else gaussian(q) for q in posteriors]
    alphas = _checked_weights(weights, len(posteriors))
    if any(q.basis for q in [*posteriors, *([base] if isinstance(base, Posterior) else [])]):
        return _merge_in_basis(posteriors, base, alphas)
    own = Owned(posteriors[0].mean)
    models = [_leaves(own, f"posteriors[{i}]", q) for i, q in enumerate(posteriors)]
    bases = [None] * len(own.leaves) if base is None else _leaves(own, "base", base)
    merged = [
        _merge_leaf(path, like, base_leaf, leaf, alphas)
        for path, like, base_leaf, *leaf in zip(own.paths, own.leaves, bases, *models, strict=True)
    ]
    means, precisions = zip(*merged, strict=True) if merged else ((), ())
    return Posterior(own.join(list(means)), own.join(list(precisions)))


def _merge_in_basis(
    posteriors: list[Posterior], base: Posterior | None, weights: list[Number]
) -> Posterior:
    """The merge in coordinates that all have in common."""
    own, basis = Owned(posteriors[0].mean), posteriors[0].basis
    isotropic = jnp.array(True)
    if base is not None:
        _leaves(own, "base", base)
        if not base.basis:  # diagonal in all coordinates, if its precisions are equal
            base, isotropic = base._replace(basis=basis), _is_isotropic(base)
    everything = posteriors if base is None else [*posteriors, base]
    same = jnp.array(False)
    if len({jax.tree.structure(q.basis) for q in everything}) == 1:
        trees = [jax.tree.leaves(q.basis) for q in everything]
        pairs = [pair for tree in trees for pair in zip(tree, trees[0], strict=True)]
        same = jnp.all(jnp.stack([isotropic, *(jnp.array_equal(a, b) for a, b in pairs)]))
    if is_concrete(same) and not bool(same):
        raise ValueError(
            "posteriors (and base) with different bases have no coordinates in which all are "
            "diagonal, so that they cannot be merged exactly: merge marginals(q) of each, which "
            "leaves the correlations out."
        )

    def moved(turn: Callable[..., list[jax.Array]], q: Posterior) -> PyTree:
        own = Owned(q.mean)
        return own.join(turn(basis, own.leaves))

    turned = [Posterior(moved(in_coordinates, q), q.precision) for q in everything]
    found = merge(
        turned[: len(posteriors)],
        base=None if base is None else turned[-1],
        weights=weights,
    )

    def spoiled(m: jax.Array) -> jax.Array:
        return jnp.where(same, m, jnp.nan) if jnp.issubdtype(m.dtype, jnp.floating) else m

    return Posterior(jax.tree.map(spoiled, moved(in_parameters, found)), found.precision, basis)


def _is_isotropic(q: Posterior) -> jax.Array:
    """Whether every leaf has one precision."""
    leaves = jax.tree.leaves(q.precision)
    ends = [(jnp.max(x, initial=-jnp.inf), jnp.min(x, initial=jnp.inf)) for x in leaves]
    return jnp.all(jnp.stack([largest <= smallest for largest, smallest in ends]))


def task_arithmetic(
    params: Sequence[PyTree], base: PyTree, *, weights: Sequence[Number] | None = None
) -> PyTree:
    """θ₀ + Σ_t α_t (θ_t − θ₀): merging that takes all precisions, the base's too, as equal.

    Args:
      params: weights θ_t of the fine-tuned models.
      base: weights θ₀ of the model that they started from.
      weights: α_t, 1 by default.

    Returns:
      The merged weights, in the dtypes of the first model.

    Raises:
      ValueError: if there is no model, or the trees do not fit.
      TypeError: if `params` is one model, or holds states.

    Example:
      >>> from ivon_jax import task_arithmetic
      >>> task_arithmetic([jnp.array([2.0]), jnp.array([3.0])], jnp.array([1.0]))
      Array([4.], dtype=float32)
    """
    if isinstance(params, Mapping | jax.Array | np.ndarray) or hasattr(params, "_fields"):
        raise TypeError("params must be a sequence, with the weights of one model per entry.")
    params = list(params)
    if not params:
        raise ValueError("params is empty: give the weights of one model or more.")
    for tree in (*params, base):
        check_parameters(tree)
    own, alphas = Owned(base), _checked_weights(weights, len(params))
    models = [own.checked(f"params[{i}]", p) for i, p in enumerate(params)]

    def moved(path: str, start: jax.Array, *ends: jax.Array) -> jax.Array:
        dtype = ends[0].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            same = jnp.all(jnp.stack([jnp.all(x == start) for x in ends]))
            if is_concrete(same) and not bool(same):
                raise ValueError(f"the models differ at {place(path)}, where they hold {dtype}.")
            return ends[0]
        origin = start.astype(wide_dtype(dtype))
        pairs = zip(alphas, [x.astype(origin.dtype) - origin for x in ends], strict=True)
        total = sum(jnp.asarray(a, origin.dtype) * way for a, way in pairs)
        return (origin + total).astype(dtype)

    return unflatten_like(base, list(map(moved, own.paths, own.leaves, *models)))


def _leaves(own: Owned, name: str, q: Posterior) -> list[tuple[jax.Array, jax.Array]]:
    if not isinstance(q, Posterior):
        raise TypeError(f"{name} must be a Posterior(mean, precision); got {type(q).__name__}.")
    means = own.exactly(f"{name}.mean", q.mean)
    precisions = wide_precisions(own, f"{name}.precision", q.precision)
    return list(zip(means, precisions, strict=True))


def _checked_weights(weights: Sequence[Number] | None, num_models: int) -> list[Number]:
    if weights is None:
        return [1.0] * num_models
    weights = list(weights)
    if len(weights) != num_models:
        raise ValueError(
            f"weights must hold one number per model: {num_models} models, {len(weights)} weights."
        )
    return [check_number("each of weights", w) for w in weights]


def _merge_leaf(
    path: str,
    like: jax.Array,
    base: tuple[jax.Array, jax.Array] | None,
    models: Sequence[tuple[jax.Array, jax.Array]],
    weights: Sequence[Number],
) -> tuple[jax.Array, jax.Array]:
    """Mean and precision of one leaf; where precisions are infinite, the common value."""
    everything = list(models) if base is None else [*models, base]
    dtype = max((precision.dtype for _, precision in everything), key=lambda x: x.itemsize)
    floating = jnp.issubdtype(like.dtype, jnp.floating)  # other leaves can only be fixed
    fixed = jnp.stack([jnp.isinf(precision) | (not floating) for _, precision in everything])
    # In the mean's own dtype: a base in bfloat16 may be compared with a float32 mean.
    same = jnp.stack([cast(mean, like.dtype) == like for mean, _ in everything])
    all_fixed = jnp.all(fixed, axis=0)
    agree = ~jnp.any(fixed, axis=0) | (all_fixed & jnp.all(same, axis=0))
    if is_concrete(agree) and not bool(jnp.all(agree)):
        raise ValueError(
            f"elements with infinite precision are fixed, but at {place(path)} the models "
            "(or the base) differ in their values or in whether they are fixed. Give them a finite "
            "precision, or leave them out of the merge."
        )
    if not floating:
        return like, jnp.where(agree, models[0][1], jnp.nan)

    def real(x: Any) -> jax.Array:
        return jnp.asarray(x, dtype)

    def finite(precision: Any) -> jax.Array:
        return jnp.where(jnp.isinf(real(precision)), 0, real(precision))

    zero = jnp.zeros(like.shape, dtype)
    base_mean, base_precision = (zero, zero) if base is None else (real(base[0]), finite(base[1]))
    terms = [(real(a), real(m), finite(p)) for a, (m, p) in zip(weights, models, strict=True)]
    total = base_precision + sum(a * (p - base_precision) for a, _, p in terms)
    pull = sum(a * p * (m - base_mean) for a, m, p in terms)
    proper = all_fixed | (total > 0)
    if is_concrete(proper) and not bool(jnp.all(proper)):
        raise ValueError(
            f"the merged precision is not positive at {place(path)}: smallest "
            f"{float(jnp.min(total)):g}. Where it is zero no model knows anything (add a small "
            "constant, or give base=); where it is negative more is removed than the models "
            "contain (use weights nearer to zero, or a base with a smaller precision; a precision "
            "below that of the base, which was its prior, is noise: take the larger of the two)."
        )
    valid = agree & proper
    mean = jnp.where(all_fixed, real(like), base_mean + pull / jnp.where(proper, total, 1))
    precision = jnp.where(all_fixed, jnp.inf, total)
    return jnp.where(valid, mean, jnp.nan).astype(like.dtype), jnp.where(valid, precision, jnp.nan)
