"""The learned posterior as plain data, and moving its mean."""

from typing import Any

import jax
import jax.numpy as jnp

from ivon_jax._core.basis import Sides, diagonal_in, in_coordinates, mixes
from ivon_jax._core.checks import Number, check_floating, check_number, is_concrete
from ivon_jax._core.gaussians import (
    gaussian,
    gaussian_mean,
    prior_gaussian,
    with_means,
)
from ivon_jax._core.state import (
    GaussianPrior,
    Posterior,
    check_single,
    find_states,
    is_auto_sample_state,
    is_ivon_state,
    is_lean,
    leaf_priors,
    map_states,
)
from ivon_jax._core.trees import (
    Owned,
    PyTree,
    as_numbers,
    copy_array,
    get_field,
    place,
    set_fields,
    unflatten_like,
    wide_zeros,
)


def posterior(state: PyTree, params: PyTree | None = None, temperature: Number = 1.0) -> Posterior:
    """The posterior N(m, diag 1/(λ(h+δ))) that a state stands for.

    Args:
      state: an `IVONState`, or any nested optax or `flax.nnx` state that contains one or several.
      params: the parameters; if given, leaves that IVON does not own are taken from it with
        precision +inf, which means *fixed*. Otherwise they are `optax.MaskedNode`.
      temperature: τ > 0; the precision is divided by it, so τ < 1 sharpens.

    Returns:
      A `Posterior` of copies, which stays valid when the state is donated. If `ivon` has a basis,
      the precision is in its coordinates.

    Raises:
      ValueError: if there is no `IVONState`, `params` does not fit, or τ is not positive.

    Example:
      >>> from ivon_jax import ivon, posterior
      >>> state = ivon(0.1, ess=100, hess_init=0.5, weight_decay=0.5).init(jnp.zeros(2))
      >>> posterior(state, temperature=2.0).precision
      Array([50., 50.], dtype=float32)
    """
    temperature = check_number("temperature", temperature, low=0.0, open_low=True)
    q = gaussian(state, params)
    mean = jax.tree.map(copy_array, q.mean)
    precision = jax.tree.map(lambda p: p / jnp.asarray(temperature, p.dtype), q.precision)
    return _completed(Posterior(mean, precision, jax.tree.map(copy_array, q.basis)), params)


def _completed(q: Posterior, params: PyTree | None) -> Posterior:
    """With the leaves that IVON does not own, fixed at their values, if `params` are given."""
    if params is None:
        return q
    own = Owned(q.mean)
    precision, _ = own.split("the precision", q.precision)
    precision = own.fill(precision, params, lambda x: wide_zeros(x) + jnp.inf)
    numbers = own.fill(list(range(len(own.leaves))), params, lambda _: -1)
    basis = [q.basis[i] if i >= 0 else Sides() for i in jax.tree.leaves(numbers)] if q.basis else ()
    return Posterior(own.fill(own.leaves, params, copy_array), precision, tuple(basis))


def posterior_mean(state: PyTree, params: PyTree | None = None) -> PyTree:
    """The posterior mean m: the weights to evaluate and to deploy.

    Args:
      state: as in `posterior`.
      params: the parameters; if given, leaves that IVON does not own are taken from it. Otherwise
        they are `optax.MaskedNode`.

    Returns:
      A copy of the mean, at least float32; `optax.tree.cast_like(mean, params)` has the dtypes of a
      bfloat16 model.

    Raises:
      ValueError: if `state` contains no `IVONState`, or `params` does not fit it.

    Example:
      >>> from ivon_jax import ivon, posterior_mean
      >>> posterior_mean(ivon(0.1, ess=100).init({"w": jnp.ones(2)}))
      {'w': Array([1., 1.], dtype=float32)}
    """
    own = Owned(gaussian_mean(with_means(state, params)))
    mean = list(map(copy_array, own.leaves))
    return own.join(mean) if params is None else own.fill(mean, params, copy_array)


def marginals(state: PyTree, params: PyTree | None = None) -> Posterior:
    """The Gaussian with the same mean and variances, but without correlations.

    For uses that need one precision per parameter, such as pruning. Of a posterior without a basis
    a copy is returned.

    Args:
      state: a `Posterior`, or as in `posterior`.
      params: as in `posterior`.

    Returns:
      A `Posterior` without a basis; its precisions are 1/σ² with σ² the diagonal of the covariance.

    Example:
      >>> from ivon_jax import Posterior, Sides, marginals
      >>> turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
      >>> q = Posterior(jnp.zeros((2, 1)), jnp.array([[1.0], [0.1]]), (Sides(rows=turn),))
      >>> variances = 1 / marginals(q).precision[:, 0]  # 0.36·1 + 0.64·10 and 0.64·1 + 0.36·10
      >>> print(f"{variances[0]:.2f} {variances[1]:.2f}")
      6.76 4.24
    """
    q = posterior(state, params)
    if not q.basis:
        return q
    own = Owned(q.mean)
    variances = [1 / p for p in own.checked("precision", q.precision)]
    precisions = [1 / v for v in diagonal_in((), q.basis, variances)]
    return Posterior(q.mean, own.join(precisions))


def prior_of(state: PyTree, params: PyTree | None = None) -> Posterior:
    """The prior under which the state was trained: N(0, 1/(λδ)), or the one that `ivon` was given.

    Args:
      state: as in `posterior`.
      params: as in `posterior`.

    Returns:
      By default mean zero and precision λδ; zero where the prior is flat, δ = 0.

    Raises:
      ValueError: if `state` contains no `IVONState`.

    Example:
      >>> from ivon_jax import ivon, prior_of
      >>> prior_of(ivon(0.1, ess=100, weight_decay=0.5).init(jnp.ones(2))).precision
      Array([50., 50.], dtype=float32)
    """
    return _completed(jax.tree.map(copy_array, prior_gaussian(state)), params)


def with_mean(state: PyTree, params: PyTree) -> PyTree:
    """The state with its posterior mean moved to `params`.

    Call it after editing or loading parameters: the state owns the mean, and the next update would
    otherwise undo the edit. Curvature, momentum and step count are kept. In a state of
    `auto_sample` the next gradient counts as taken at the mean: continue with these `params`.

    Args:
      state: any nested state that contains one or several `IVONState`.
      params: the new parameters, of the structure that `init` was given.

    Returns:
      The state with copies of `params` as its mean; elements that a general prior fixes stay.

    Raises:
      ValueError: if `state` contains no `IVONState`, or `params` does not fit it.

    Example:
      >>> from ivon_jax import ivon, posterior_mean, with_mean
      >>> state = ivon(0.1, ess=100).init(jnp.ones(2))
      >>> posterior_mean(with_mean(state, jnp.zeros(2)))
      Array([0., 0.], dtype=float32)
    """
    prior_gaussian(state)  # refuses a state of no model, or of several

    def move(node: Any) -> Any:
        if is_ivon_state(node):
            return _moved(node, params)
        if is_auto_sample_state(node):
            return set_fields(
                node,
                calls=jax.tree.map(jnp.zeros_like, get_field(node, "calls")),
                at_mean=jax.tree.map(jnp.ones_like, get_field(node, "at_mean")),
                inner_state=with_mean(get_field(node, "inner_state"), params),
            )
        return node

    return jax.tree.map(move, state, is_leaf=lambda x: is_ivon_state(x) or is_auto_sample_state(x))


def _moved(state: PyTree, params: PyTree) -> PyTree:
    (part,) = find_states(state)
    own = Owned(part.hess)
    owned = own.checked("params", params)
    # Gradients summed at the old mean say nothing about the new one.
    window = jax.tree.map(jnp.zeros_like, get_field(state, "window"))
    if is_lean(part):  # the loop's parameters will be the mean
        return set_fields(state, window=window)
    check_floating(own, "params", owned)
    leaves = [copy_array(jnp.asarray(p, h.dtype)) for p, h in zip(owned, own.leaves, strict=True)]
    if isinstance(part.prior, GaussianPrior):  # what it fixes cannot be moved
        centers, precisions = map(jax.tree.leaves, part.prior[:2])
        fixed = zip(precisions, centers, leaves, strict=True)
        leaves = [jnp.where(jnp.isinf(s0), m0, m) for s0, m0, m in fixed]
    mean = unflatten_like(get_field(state, "mean"), leaves)
    return set_fields(state, mean=mean, window=window)


def with_ess(state: PyTree, ess: Number) -> PyTree:
    """The state under another effective sample size, with its posterior unchanged.

    λ(h+δ) is kept by h ← (λ/λ')(h+δ) − δ', where δ' = δ, or s₀/λ' under a general prior. (The
    prior precision λδ becomes λ'δ.) Continue with an optimizer that has the new `ess`; under
    `optax.inject_hyperparams` set it in `hyperparams` as well. Steps become λ'/λ times as long,
    since h₀ in the rate α(h₀+δ) stays: multiply the learning rate by λ/λ', and `precision_floor`
    as well, or the next step may lift h+δ to it. In floating point h+δ loses digits where λ' is
    larger than λ by many orders of magnitude.

    Args:
      state: any nested state that contains one or several `IVONState`.
      ess: the new effective sample size λ'.

    Returns:
      The state with new `hess` and `ess`.

    Raises:
      ValueError: if `state` contains no `IVONState`, or `ess` is not positive.

    Example:
      >>> from ivon_jax import ivon, posterior, with_ess
      >>> state = ivon(0.1, ess=100, hess_init=0.5, weight_decay=0.5).init(jnp.ones(2))
      >>> posterior(with_ess(state, 50)).precision  # as before
      Array([100., 100.], dtype=float32)
    """
    ess = check_number("ess", ess, low=0.0, open_low=True)
    find_states(state)

    def rescale(node: Any) -> Any:
        (part,) = find_states(node)
        check_single(part)
        new_ess = jnp.full_like(part.ess, ess)

        def rescale_leaf(h: jax.Array, delta: jax.Array) -> jax.Array:
            ratio = part.ess.astype(h.dtype) / new_ess.astype(h.dtype)
            if isinstance(part.prior, GaussianPrior):  # (λ/λ')δ − δ' is zero
                return h * ratio
            return h * ratio + delta.astype(h.dtype) * (ratio - 1)

        deltas = [prior.delta for prior in leaf_priors(part)]
        hess = list(map(rescale_leaf, jax.tree.leaves(part.hess), deltas))
        return set_fields(
            node,
            hess=unflatten_like(get_field(node, "hess"), hess),
            # The leaf may sit in a flax.nnx Variable, which is kept.
            ess=unflatten_like(get_field(node, "ess"), [new_ess]),
        )

    return map_states(rescale, state)


def kl_divergence(q: PyTree, prior: Posterior) -> jax.Array:
    """KL(q‖prior) = ½Σ[s₀σ² + s₀(m−m₀)² − 1 − log(s₀σ²)] of two Gaussians, in nats.

    The sums are over the coordinates in which the prior is diagonal. Elements with a flat prior
    (s₀ = 0) and those that are fixed in q (σ = 0) are left out. What a basis mixes has to be flat,
    or fixed, as a whole.

    Args:
      q: a posterior, or a state.
      prior: a Gaussian over the same tree, such as `prior_of(state)`.

    Returns:
      A scalar; +inf where the prior fixes an element at another value, or one that is free in q,
      or is proper where q is flat.

    Raises:
      ValueError: if the trees do not fit, or a basis mixes flat or fixed elements with others
        (under jit the result is then NaN).

    Example:
      >>> from ivon_jax import Posterior, kl_divergence
      >>> q = Posterior(jnp.array([1.0]), jnp.array([1.0]))
      >>> print(kl_divergence(q, Posterior(jnp.zeros(1), jnp.ones(1))))
      0.5
    """
    q, prior = gaussian(q), gaussian(prior)
    own = Owned(q.mean)
    precisions = own.checked("q.precision", q.precision)
    centers = own.checked("prior.mean", prior.mean)
    prior_precisions = own.checked("prior.precision", prior.precision)
    pairs = zip(own.leaves, centers, precisions, strict=True)
    shifts = [as_numbers(m, p.dtype) - as_numbers(m0, p.dtype) for m, m0, p in pairs]
    shifts = in_coordinates(prior.basis, shifts)
    variances = diagonal_in(prior.basis, q.basis, [1 / p for p in precisions])
    total = jnp.zeros([])
    if q.basis or prior.basis:
        total = jnp.where(_mixes_improper(own, q, prior), jnp.nan, total)
    leaves = zip(shifts, variances, precisions, prior_precisions, strict=True)
    for shift, variance, p, p0 in leaves:
        p0 = p0.astype(p.dtype)
        fixed, only_prior = jnp.isinf(p), jnp.isinf(p0) & ~jnp.isinf(p)
        # Not p0 > 0, so that a NaN is counted and seen.
        counted = (p0 != 0) & ~fixed & ~only_prior
        ratio, square = jnp.where(counted, p0 / p, 1), jnp.where(counted, p0, 0) * shift**2
        # Of each, because p0/p may underflow.
        log_ratio = jnp.log(jnp.where(counted, p0, 1)) - jnp.log(jnp.where(counted, p, 1))
        spread = ratio if not (q.basis or prior.basis) else jnp.where(counted, p0 * variance, 1)
        terms = spread - 1 - log_ratio + jnp.where(counted, square, 0)
        impossible = only_prior | (counted & (p == 0)) | (fixed & jnp.isinf(p0) & (shift != 0))
        total = total + 0.5 * jnp.sum(jnp.where(impossible, jnp.inf, terms)).astype(total.dtype)
    return total


def _mixes_improper(own: Owned, q: Posterior, prior: Posterior) -> jax.Array:
    """Whether a basis turns flat or fixed elements together with others; refused where known."""
    none, found = (Sides(),) * len(own.leaves), jnp.array(False)
    precisions = own.checked("q.precision", q.precision), own.checked("", prior.precision)
    bases = q.basis or none, prior.basis or none
    for path, p, p0, *sides in zip(own.paths, *precisions, *bases, strict=True):
        flags = jnp.isinf(p), jnp.isinf(p0), p0 == 0
        mixed = jnp.stack([mixes(side, x) for side in sides for x in flags]).any()
        if is_concrete(mixed) and bool(mixed):
            raise ValueError(
                f"a basis mixes flat or fixed elements of {place(path)} with others, which leaves "
                "no coordinates in which both Gaussians are proper: take marginals(q)."
            )
        found |= mixed
    return found
