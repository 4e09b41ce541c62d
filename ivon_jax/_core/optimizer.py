"""The IVON update rule as an optax gradient transformation."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ivon_jax._core import rule
from ivon_jax._core.basis import in_coordinates, in_parameters
from ivon_jax._core.checks import (
    Number,
    check_axis_name,
    check_exactly_one,
    check_floating,
    check_momentum_dtype,
    check_number,
    check_varying,
    checked_rate,
)
from ivon_jax._core.compiler import materialized
from ivon_jax._core.eigenbasis import Eigenbasis
from ivon_jax._core.priors import check_prior_fits, prior_source
from ivon_jax._core.state import (
    KEPT,
    NO_BASIS,
    TURNING,
    IVONState,
    Posterior,
    check_single,
    kind_of_basis,
    leaf_priors,
    precision_leaves,
    prior_pulls,
    vectors_of,
)
from ivon_jax._core.tampering import with_loaded
from ivon_jax._core.trees import (
    Owned,
    PyTree,
    also_abstract,
    copy_array,
    difference,
    place,
    unflatten_like,
    wide_dtype,
)
from ivon_jax._core.windows import Draw, lined_up, step_or_wait

PRECISION_FLOOR = 2.0**-20
"""Smallest `precision_floor`: eight units of float32 rounding, a σ 1000 times σ₀."""

TURNED_FLOOR = 2.0**-16
"""The same where δ is a sum of products, as under a prior in other coordinates."""


def ivon(
    learning_rate: optax.ScalarOrSchedule,
    ess: Number,
    *,
    hess_init: Number = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.99999,
    weight_decay: Number | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    clip_radius: Number = math.inf,
    precision_floor: Number = PRECISION_FLOOR,
    rescale_lr: bool = True,
    debias: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    momentum_dtype: Any = None,
    prior: Posterior | None = None,
    basis: Eigenbasis | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Improved Variational Online Newton.

    Learns q = N(m, diag σ²) with σ² = 1/(λ(h+δ)), or the same in other coordinates (`basis`), which
    minimises λ E_q[ℓ̄(θ)] + KL(q ‖ N(0, I/(λδ))) for the mean loss per example ℓ̄. One step,
    with gradients ĝ_s of ℓ̄ at samples θ_s = m + n_s from `sample_params`:

    .. code-block:: text

      ĝ ← mean_s ĝ_s
      ĥ ← λ(h+δ) ⊙ mean_s(n_s ⊙ ĝ_s)
      g ← β₁g + (1−β₁)ĝ
      h ← h + (1−β₂)(ĥ−h) + ½(1−β₂)²(ĥ−h)²/(h+δ)
      ḡ ← g/(1−β₁ᵗ)
      u ← clip((ḡ + δm)/(h+δ), ±ξ)
      m ← m − α_t(h₀+δ)u

    The old precision and ĥ use the λ and δ of the state, under which the noise was drawn; the rest
    of the step uses, and the new state stores, those given here. The state owns the mean:
    `updates` is the new mean minus `params`, whatever these were. Nothing after `ivon` in a chain
    may change the updates. After editing parameters call `with_mean`; only before the first step
    `params` that are neither mean nor sample were loaded after `init`, and become the mean.

    Args:
      learning_rate: α, a number or a schedule of the step count.
      ess: λ, the effective sample size: the number of terms of ℓ̄ in the whole training set
        (examples; tokens for a language model).
      hess_init: h₀, initial value of h.
      b1: β₁, decay of the gradient's moving average.
      b2: β₂, decay of the Hessian's moving average.
      weight_decay: δ, precision of the Gaussian prior per example; 0 is a flat prior. 1e-4 by
        default, or what `prior` says. Under `optax.inject_hyperparams` name it to change it later.
      mask: leaves that get weight decay, as in `optax.adamw`: a tree of bools (or a prefix of it),
        or a function of the parameters (of the mean, where `update` is not given them) that
        returns one. The others have δ = 0.
      clip_radius: ξ, bound on each element of u; a step moves a parameter by at most α(h₀+δ)ξ.
      precision_floor: smallest new h+δ as a share of h₀+δ. The default only keeps the precision
        positive; 0.1 guards against divergence: σ stays below 3.2 times its initial value, and
        the factor 1/(h+δ) of a step below ten times. (At least 2⁻¹⁶ with `prior` and `basis`.)
      rescale_lr: whether α is multiplied by h₀+δ.
      debias: whether g is debiased by 1−β₁ᵗ.
      axis_name: mapped axis (or axes) over which ĝ and n⊙ĝ are averaged; devices draw on their own.
      momentum_dtype: dtype of g; the mean's by default.
      prior: a general Gaussian prior N(m₀, 1/s₀) in place of `weight_decay` and `mask`, such as
        yesterday's `posterior(state)`: δ becomes s₀/λ element by element, δm becomes δ(m−m₀), and
        the factor of α is h₀ plus the smallest δ of each leaf (large where s₀ ≫ λh₀ throughout:
        use `rescale_lr=False` then). An infinite s₀ fixes the parameter at m₀, a zero one is flat.
        `init` copies it into the state, where `update` reads it. A prior with a basis hands it on
        to the posterior, which keeps it. With `basis=Eigenbasis()` the posterior turns: then the
        pull is Λ₀(m−m₀)/λ with all of the prior's precision Λ₀, and δ the diagonal of Λ₀/λ in the
        coordinates of the posterior; where Λ₀ is far from diagonal there, take a smaller rate.
      basis: in which coordinates of each matrix σ² is diagonal: `Eigenbasis()` for those of the
        eigenvectors of its gradients' second moments, in place of the parameters themselves. The
        update above then applies to M' = Q_Lᵀ M Q_R: `state.hess`, `state.momentum` and `hess=` of
        `update` are of these coordinates, and ξ bounds each of them.

    Returns:
      A transformation whose `update(grads, state, params=None, *, noise=None, hess=None)`
      takes exactly one of `noise` (of `sample_params`) and `hess` (ĥ of `mc_value_and_grad`).
      Gradients and either of them may have a leading axis of Monte Carlo samples, which is
      averaged after the product is formed (not for leaves outside `optax.partition` or `masked`).

    Raises:
      TypeError: if an argument is not a number, or traced below float32; or for another `basis`.
      ValueError: if a number is out of range, or `prior` is combined with `weight_decay` or `mask`.

    References:
      Shen et al., Variational Learning is Effective for Large Deep Networks, ICML 2024,
      `arXiv:2402.17641 <https://arxiv.org/abs/2402.17641>`_.

    Example:
      >>> from ivon_jax import ivon, sample_params
      >>> loss = lambda w: 0.5 * jnp.sum((w - 3.0) ** 2)
      >>> params = jnp.zeros(2)
      >>> tx = ivon(0.2, ess=1000, weight_decay=0.0)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(key, params, state):
      ...     sample, noise = sample_params(key, state)
      ...     updates, state = tx.update(jax.grad(loss)(sample), state, params, noise=noise)
      ...     return optax.apply_updates(params, updates), state
      >>> for key in jax.random.split(jax.random.key(0), 100):
      ...     params, state = step(key, params, state)
      >>> bool(jnp.all(jnp.abs(params - 3.0) < 0.1))
      True
    """
    if not callable(learning_rate):
        learning_rate = check_number("learning_rate", learning_rate, low=0.0)
    ess = check_number("ess", ess, low=0.0, open_low=True)
    b1 = check_number("b1", b1, low=0.0, high=1.0)
    b2 = check_number("b2", b2, low=0.0, high=1.0)
    constants = rule.Rule(
        hess_init=check_number("hess_init", hess_init, low=0.0, open_low=True),
        b1=b1,
        one_minus_b1=1 - b1,
        one_minus_b2=1 - b2,
        clip_radius=check_number(
            "clip_radius", clip_radius, low=0.0, open_low=True, allow_inf=True
        ),
        floor=check_number("precision_floor", precision_floor, low=PRECISION_FLOOR, high=1.0),
        rescale_lr=rescale_lr,
        debias=debias,
    )
    if prior is not None and basis is not None:
        larger = max if isinstance(constants.floor, float) else jnp.maximum
        constants = constants._replace(floor=larger(constants.floor, TURNED_FLOOR))
    source = prior_source(weight_decay, mask, prior, turns=basis is not None)
    momentum_dtype = check_momentum_dtype(momentum_dtype)
    check_axis_name("axis_name", axis_name)
    if basis is not None and not isinstance(basis, Eigenbasis):
        raise TypeError(f"basis must be an Eigenbasis(), or None; got {basis!r}.")
    kind = KEPT if prior is not None and prior.basis else NO_BASIS
    kind = kind if basis is None else TURNING

    @also_abstract
    def init(params: PyTree) -> IVONState:
        mean = jax.tree_util.tree_map_with_path(_owned_mean, params)
        mean, prior_fields = source.init(mean, params)
        state = IVONState(
            count=jnp.zeros([], jnp.int32),
            mean=mean,
            hess=jax.tree.map(lambda m: jnp.full_like(m, constants.hess_init), mean),
            momentum=jax.tree.map(lambda m: jnp.zeros_like(m, momentum_dtype), mean),
            ess=jnp.array(ess, jnp.float32),
            **{"basis": () if basis is None else basis.init(mean, params), **prior_fields},
        )
        if prior is not None and jax.tree.leaves(mean):
            check_prior_fits(prior, state)
        return state

    # Traced once for leaves of one shape.
    statistics = jax.jit(functools.partial(rule.statistics, constants))
    mean_step = jax.jit(functools.partial(rule.mean_step, constants))
    moved = jax.jit(rule.moved)

    def step(
        prior_fields: dict[str, Any], state: IVONState, grads: list[Any], hess: list[Any]
    ) -> IVONState:
        """Lines 3 to 7 of the algorithm, for averaged ĝ and ĥ."""
        if axis_name is not None:
            grads, hess = jax.lax.pmean((grads, hess), axis_name)
        rate = learning_rate
        if callable(rate):
            rate = checked_rate(rate(state.count))
        count = optax.safe_increment(state.count)
        new = state._replace(count=count, ess=jnp.array(ess, jnp.float32), **prior_fields)
        m, h, g = (jax.tree.leaves(tree) for tree in (state.mean, state.hess, state.momentum))
        old_deltas = [prior.delta for prior in leaf_priors(state)]
        priors = leaf_priors(new)
        vectors = vectors_of(state)
        if basis is not None:
            scales = [p / state.ess.astype(p.dtype) for p in precision_leaves(state)]
            hess = list(map(basis.clipped, hess, h, scales))
        turned = in_coordinates(vectors, grads)
        h_and_g = list(map(statistics, h, g, turned, hess, old_deltas, priors))
        h, momentum = materialized([h for h, _ in h_and_g]), [g for _, g in h_and_g]
        corrections: dict[Any, jax.Array | None] = {x.dtype: None for x in m}
        if debias:
            corrections = {t: rule.bias_correction(b1, count, t) for t in corrections}
        leaves = zip(prior_pulls(new, priors), h, momentum, priors, strict=True)
        steps = [mean_step(rate, corrections[x[0].dtype], *x) for x in leaves]
        m = materialized(list(map(moved, m, in_parameters(vectors, steps), priors)))
        momentum = [x.astype(old.dtype) for x, old in zip(momentum, g, strict=True)]
        new = new._replace(
            mean=unflatten_like(state.mean, m),
            hess=unflatten_like(state.hess, h),
            momentum=unflatten_like(state.momentum, momentum),
        )
        if basis is None:
            return new
        eigen, (momentum, hess) = basis.turned(new.basis, count, grads, new.momentum, new.hess)
        new = new._replace(basis=eigen, momentum=momentum, hess=hess)
        if prior is None:
            return new
        # In other coordinates a general δ is another, and h may be too small for it.
        pairs = zip(jax.tree.leaves(hess), leaf_priors(new), strict=True)
        h = [p.where_fixed(h, rule.floored(constants, h, p.delta)) for h, p in pairs]
        return new._replace(hess=unflatten_like(hess, h))

    def update(
        grads: PyTree,
        state: IVONState,
        params: PyTree | None = None,
        *,
        noise: PyTree | Draw | None = None,
        hess: PyTree | None = None,
        **ignored: Any,
    ) -> tuple[PyTree, IVONState]:
        del ignored
        check_exactly_one(noise, hess)
        check_single(state)
        _check_basis(kind, state)
        own = Owned(state.mean)
        g, others = own.split("grads", grads)
        check_floating(own, "grads", g)
        check_varying(g, axis_name)
        base, dtypes = own.leaves, [x.dtype for x in g]
        if params is not None:
            base, others = own.split("params", params)
            check_floating(own, "params", base)
            own.check_shapes("params", base)
            dtypes = [p.dtype for p in base]
            if not isinstance(noise, Draw):
                own_noise = None if noise is None else own.split("noise", noise)[0]
                state = with_loaded(state, base, state.count == 0, own_noise)
        take_step = functools.partial(step, source.update(state, params))
        if hess is not None:
            g, h, mean = lined_up(own, g, "hess", hess)
            new_state = take_step(state, mean(g), mean(h))
        else:
            vectors = vectors_of(state)
            draw = noise if isinstance(noise, Draw) else Draw(noise)
            g, n, mean = lined_up(own, g, "noise", draw.noise)
            if draw is not noise:  # which would hold coordinates
                n = in_coordinates(vectors, n)
            # The mean of products n_s ⊙ ĝ_s, not the product of means.
            products = list(map(jnp.multiply, n, in_coordinates(vectors, g)))
            new_state = step_or_wait(take_step, state, mean(g), mean(products), draw)
        moves = list(map(difference, jax.tree.leaves(new_state.mean), base, dtypes))
        updates = own.join(moves, jax.tree.map(_no_update, others))
        like = grads if params is None else params
        return unflatten_like(like, jax.tree.leaves(updates)), new_state

    # optax types a state as any tree of arrays.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _check_basis(expected: str, state: IVONState) -> None:
    if (found := kind_of_basis(state)) != expected:
        raise ValueError(
            f"this state has {found}, where this ivon() has {expected}: keep its arguments basis "
            "and prior, or start anew from the state's mean: tx.init(posterior_mean(state))."
        )


def _no_update(leaf: Any) -> Any:
    """A zero update; gradients of integer leaves have the dtype float0 and stay as they are."""
    return leaf if jnp.result_type(leaf) == jax.dtypes.float0 else jnp.zeros_like(leaf)


def _owned_mean(path: Any, param: Any) -> jax.Array | optax.MaskedNode:
    try:
        dtype = jnp.result_type(param)
    except TypeError as error:
        raise TypeError(
            f"params hold {type(param).__name__} at {place(path)}, which is not an "
            "array: filter the tree first, e.g. equinox.filter(model, equinox.is_inexact_array)."
        ) from error
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"params are complex ({dtype}) at {place(path)}: IVON's posterior is a "
            "real Gaussian. Use optax.contrib.split_real_and_imaginary, or optax.masked."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        return optax.MaskedNode()
    return copy_array(jnp.asarray(param, wide_dtype(dtype)))
