"""Monte Carlo estimates of the loss, its gradient and its diagonal Hessian under q."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivon_jax._core.axes import split_over
from ivon_jax._core.checks import Number, check_axis_name, check_number, check_positive
from ivon_jax._core.gaussians import gaussian
from ivon_jax._core.rule import hess_estimate
from ivon_jax._core.sampling import ParameterGaussian, fold_in_groups, one_or_many, threefry_key
from ivon_jax._core.trees import PyTree, wide_dtype

# Value, gradients and the statistic that ĥ is made of, the last two for floating leaves.
_Estimates = tuple[jax.Array, list[jax.Array], list[jax.Array]]

_ESTIMATORS = ("reparam", "gradsq", "hutchinson")


def mc_value_and_grad(
    fun: Callable[..., Any],
    num_samples: int = 1,
    *,
    has_aux: bool = False,
    antithetic: bool = False,
    split_batch: bool = False,
    batch_argnums: int | Sequence[int] | None = None,
    rng_argnums: int | Sequence[int] = (),
    sample_batch_size: int | None = None,
    grad_transform: Callable[[PyTree], PyTree] | None = None,
    estimator: str = "reparam",
    estimator_scale: Number = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
    spmd_axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    r"""Averages value, gradient and an estimate ĥ of the Hessian diagonal over the posterior.

    With samples θ_s = m + n_s and ĝ_s = ∇fun(θ_s), the estimators of ĥ are

    .. code-block:: text

      "reparam"     λ(h+δ) ⊙ mean_s(n_s ⊙ ĝ_s)
      "gradsq"      c · mean_s(ĝ_s²)
      "hutchinson"  mean_s(u_s ⊙ ∇²fun(m)u_s), u_s Rademacher

    "reparam" is unbiased for E_q of the Hessian diagonal and costs no more than the gradient;
    "hutchinson" costs a Hessian-vector product more per sample. For "gradsq", c = B is unbiased
    for the diagonal Fisher information per example where ĝ is the mean of B per-example gradients
    of zero mean; c = λ, which is in use elsewhere, is about N/B times larger. Memory does not grow
    with the number of samples. Where the posterior has a basis, n, ĝ, u and ĥ in these lines are of
    its coordinates.

    Args:
      fun: the mean loss `fun(params, *args)`, a scalar; with `has_aux` a pair (loss, aux).
      num_samples: number of posterior samples S.
      has_aux: whether `fun` returns a pair.
      antithetic: draw the samples in pairs m ± n; S must be even.
      split_batch: give each sample 1/S of the leading axis of the batch arguments: fresh noise
        for every micro-batch at the price of one pass.
      batch_argnums: the arguments of `fun` that are sliced (as in `jax.grad`, the parameters are
        argument 0); all but `rng_argnums` by default.
      rng_argnums: the arguments of `fun` that are PRNG keys, folded for each sample (dropout).
      sample_batch_size: number of samples evaluated at a time by `jax.vmap`; one by default.
      grad_transform: applied to each sample's gradient before the product, such as a clip.
      estimator: "reparam", "gradsq" or "hutchinson".
      estimator_scale: c of "gradsq".
      axis_name: mapped axis (or axes) whose index is folded into the keys, and over which the
        results (not aux) are averaged.
      spmd_axis_name: under `jit` over a mesh, the axis (or axes) over which the samples evaluated
        at a time are split. With `sample_batch_size` the size of that axis, each group of devices
        evaluates a sample of its own, at the price of one.

    Returns:
      `f(key, state, *args, params=None) -> (value, grads, hess)`, with `state` and `params` as in
      `sample_params`, for `tx.update(grads, state, params, hess=hess)`. With `has_aux`, value is
      (value, aux), aux stacked on axis 0. Leaves that IVON does not own get a zero `hess`.

    Raises:
      ValueError: if options are out of range or exclude each other, or a batch cannot be split.
      TypeError: if `fun` is not callable, an axis has no name, or `rng_argnums` names no key.

    Example:
      >>> from ivon_jax import ivon, mc_value_and_grad
      >>> tx = ivon(0.1, ess=100)
      >>> state = tx.init(jnp.ones(3))
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> f = mc_value_and_grad(loss, num_samples=8, antithetic=True)
      >>> value, grads, hess = f(jax.random.key(0), state, jnp.eye(3))
      >>> updates, state = tx.update(grads, state, hess=hess)
      >>> grads.shape, hess.shape
      ((3,), (3,))
    """
    if not callable(fun):
        raise TypeError(f"fun must be a function of (params, *args); got {fun!r}.")
    num_samples = check_positive("num_samples", num_samples)
    if sample_batch_size is not None:
        sample_batch_size = check_positive("sample_batch_size", sample_batch_size)
    if spmd_axis_name and (sample_batch_size is None or num_samples % sample_batch_size):
        raise ValueError(
            "spmd_axis_name splits the samples that are evaluated at a time: give their number as "
            f"sample_batch_size, a divisor of num_samples={num_samples}; got {sample_batch_size}."
        )
    if antithetic and num_samples % 2:
        raise ValueError(f"antithetic samples come in pairs: num_samples={num_samples} is odd.")
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator must be one of {_ESTIMATORS}; got {estimator!r}.")
    scale = check_number("estimator_scale", estimator_scale, low=0.0, open_low=True)
    if estimator != "gradsq" and not (isinstance(scale, float) and scale == 1.0):
        raise ValueError(f"estimator_scale is used by 'gradsq' only, not by {estimator!r}.")
    if batch_argnums is not None and not split_batch:
        raise ValueError("batch_argnums is used with split_batch=True only.")
    check_axis_name("axis_name", axis_name)
    check_axis_name("spmd_axis_name", spmd_axis_name)
    rngs = _argnums("rng_argnums", rng_argnums)
    batches = None if batch_argnums is None else _argnums("batch_argnums", batch_argnums)
    if set(rngs) & set(batches or ()):
        raise ValueError("an argument cannot be in both rng_argnums and batch_argnums.")

    def value_and_grad(
        key: jax.Array, state: PyTree, *args: Any, params: PyTree | None = None
    ) -> tuple[Any, PyTree, PyTree]:
        _check_args(args, rngs, batches or ())
        q = ParameterGaussian(gaussian(state, params), params)
        mean = q.mean()
        key, first = threefry_key(key), jnp.int32(0)
        if axis_name is not None:
            index = jax.lax.axis_index(axis_name)
            key, first = jax.random.fold_in(key, index), index * num_samples
        with jax.threefry_partitionable(True):
            keys = jax.random.split(key, num_samples // 2 if antithetic else num_samples)
        keys = jnp.repeat(keys, 2) if antithetic else keys
        sliced_args = batches
        if batches is None and split_batch:
            sliced_args = tuple(i for i in range(1, len(args) + 1) if i not in rngs)
        slices = {i: _split(i, args[i - 1], num_samples) for i in sliced_args or ()}

        def at_sample(s: Any, sample_key: Any, sliced: dict[int, Any]) -> tuple[_Estimates, Any]:
            sign = jnp.where(s % 2 == 0, 1.0, -1.0) if antithetic else 1.0
            sample, displacement = q.sample_with_noise(sample_key, sign)
            here = _arguments(args, sliced, rngs, first + s)
            value, aux, grads = _value_and_grad(fun, has_aux, sample, here)
            if grad_transform is not None:
                grads = _transformed(grad_transform, mean, grads)
            grads = [g.astype(wide_dtype(g.dtype)) for g in grads]

            def coordinates(leaves: list[jax.Array]) -> list[jax.Array]:
                return _pick(mean, q.tree_in_coordinates(_place(mean, leaves, lambda x: x)))

            if estimator == "reparam":
                noise = _pick(mean, q.tree(displacement()))
                pairs = zip(noise, coordinates(grads), strict=True)
                statistic = [n * g.astype(n.dtype) for n, g in pairs]
            elif estimator == "gradsq":
                statistic = [jnp.asarray(scale, g.dtype) * g * g for g in coordinates(grads)]
            else:
                # The keys of the samples are fold_in(key, s) with s < S: this is another stream.
                probe_key = jax.random.fold_in(jax.random.fold_in(key, num_samples), s)
                statistic = _hutchinson(fun, has_aux, q, probe_key, here)
            return (value.astype(wide_dtype(value.dtype)), grads, statistic), aux

        samples = (jnp.arange(num_samples, dtype=jnp.int32), keys, slices)
        estimates, aux = _mean_over_samples(at_sample, samples, sample_batch_size, spmd_axis_name)
        if axis_name is not None:
            estimates = jax.lax.pmean(estimates, axis_name)
        value, grads, hess = estimates
        if estimator == "reparam":
            precision = _pick(mean, q.tree(q.precision))
            hess = list(map(hess_estimate, precision, hess))
        # No curvature for leaves that IVON does not own, or that are fixed by infinite precision.
        free = _pick(mean, q.tree([jnp.isfinite(p).astype(p.dtype) for p in q.precision]))
        hess = [jnp.where(f != 0, x, 0) for f, x in zip(free, hess, strict=True)]
        grads = _place(mean, grads, lambda x: np.zeros(x.shape, jax.dtypes.float0))
        hess = _place(mean, hess, lambda x: jnp.zeros(x.shape, jnp.float32))
        return ((value, aux) if has_aux else value), grads, hess

    return value_and_grad


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _pick(like: PyTree, tree: PyTree) -> list[jax.Array]:
    """The leaves of `tree` at the differentiable leaves of `like`."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    return [x for x, template in pairs if _is_floating(template)]


def _place(like: PyTree, leaves: list[jax.Array], other: Callable[[jax.Array], Any]) -> PyTree:
    """The inverse: a tree like `like` with `other(leaf)` in place of the remaining leaves."""
    rest = iter(leaves)
    return jax.tree.map(lambda x: next(rest) if _is_floating(x) else other(x), like)


def _value_and_grad(
    fun: Callable[..., Any], has_aux: bool, sample: PyTree, args: list[Any]
) -> tuple[jax.Array, Any, list[jax.Array]]:
    """Value, aux (or None) and the gradient of the differentiable leaves."""

    def of_floating(leaves: list[jax.Array]) -> Any:
        return fun(_place(sample, leaves, lambda x: x), *args)

    out, grads = jax.value_and_grad(of_floating, has_aux=has_aux)(_pick(sample, sample))
    value, aux = out if has_aux else (out, None)
    return value, aux, grads


def _transformed(
    grad_transform: Callable[[PyTree], PyTree], like: PyTree, grads: list[jax.Array]
) -> list[jax.Array]:
    """The user's transform of a gradient in which integer leaves are `MaskedNode`."""
    tree = _place(like, grads, lambda _: optax.MaskedNode())
    new = grad_transform(tree)
    same = jax.tree.structure(new) == jax.tree.structure(tree)
    if not same or [x.shape for x in jax.tree.leaves(new)] != [g.shape for g in grads]:
        raise ValueError(
            "grad_transform must return a tree of the structure and shapes of its argument; for an "
            "optax transformation that is lambda g: clip.update(g, clip.init(g))[0]."
        )
    return jax.tree.leaves(new)


def _hutchinson(
    fun: Callable[..., Any], has_aux: bool, q: ParameterGaussian, key: jax.Array, args: list[Any]
) -> list[jax.Array]:
    """u ⊙ ∇²fun(m)u, with u = ±1 at random where IVON owns the leaf and zero elsewhere."""
    signs = [
        jax.random.rademacher(jax.random.fold_in(key, i), p.shape, p.dtype)
        for i, p in enumerate(q.precision)
    ]
    tree = q.mean()
    mean = _pick(tree, tree)
    turned = _pick(tree, q.tree(q.in_parameters(signs)))
    probe = [u.astype(m.dtype) for u, m in zip(turned, mean, strict=True)]

    def gradient(leaves: list[jax.Array]) -> list[jax.Array]:
        return _value_and_grad(fun, has_aux, _place(tree, leaves, lambda x: x), args)[2]

    _, products = jax.jvp(gradient, (mean,), (probe,))
    products = [x.astype(wide_dtype(x.dtype)) for x in products]
    products = _pick(tree, q.tree_in_coordinates(_place(tree, products, lambda x: x)))
    signs = _pick(tree, q.tree(signs))
    return [u.astype(x.dtype) * x for u, x in zip(signs, products, strict=True)]


def _mean_over_samples(
    at_sample: Callable[..., tuple[_Estimates, Any]],
    samples: tuple[Any, ...],
    sample_batch_size: int | None,
    spmd_axis_name: str | tuple[str, ...] | None,
) -> tuple[_Estimates, Any]:
    """The mean of the estimates over the samples, and aux stacked on axis 0."""
    axes = (spmd_axis_name,) if isinstance(spmd_axis_name, str) else spmd_axis_name
    at_samples = jax.vmap(at_sample, spmd_axis_name=axes) if axes else one_or_many(at_sample)

    def group(members: tuple[Any, ...]) -> tuple[_Estimates, Any]:
        if axes is not None:
            members = jax.tree.map(functools.partial(split_over, names=axes), members)
        estimates, aux = at_samples(*members)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), estimates), aux

    add = functools.partial(jax.tree.map, jnp.add)
    total, aux = fold_in_groups(group, add, samples, sample_batch_size)
    return jax.tree.map(lambda x: x / len(samples[0]), total), aux


def _check_args(args: tuple[Any, ...], rngs: tuple[int, ...], batches: tuple[int, ...]) -> None:
    """Refuses numbers of arguments that were not given, and keys that are none."""
    for i in rngs + batches:
        if i > len(args):
            raise ValueError(
                f"rng_argnums or batch_argnums names argument {i}, but fun was called with the "
                f"parameters and {len(args)} further arguments."
            )
    for i in rngs:
        try:
            threefry_key(args[i - 1])
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"argument {i} of fun is named in rng_argnums but is not a single PRNG key "
                "(arguments are counted as in jax.grad: the parameters are argument 0)."
            ) from error


def _arguments(
    args: tuple[Any, ...], sliced: dict[int, Any], rng_argnums: tuple[int, ...], index: jax.Array
) -> list[Any]:
    """The positional arguments of `fun` for the sample of this index."""
    new = sliced | {i: jax.random.fold_in(args[i - 1], index) for i in rng_argnums}
    return [new.get(i, x) for i, x in enumerate(args, start=1)]


def _split(argnum: int, arg: PyTree, num_samples: int) -> PyTree:
    def split(path: Any, x: Any) -> jax.Array:
        shape = jnp.shape(x)
        if not shape or shape[0] % num_samples:
            raise ValueError(
                f"split_batch: argument {argnum} of fun has shape {shape}"
                f"{' at ' + jax.tree_util.keystr(path) if path else ''}, whose leading axis cannot "
                f"be split into {num_samples} equal slices. Name the arguments to split in "
                "batch_argnums."
            )
        return jnp.reshape(x, (num_samples, shape[0] // num_samples, *shape[1:]))

    return jax.tree_util.tree_map_with_path(split, arg)


def _argnums(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    proper = (isinstance(i, int | np.integer) and not isinstance(i, bool) for i in numbers)
    if not all(proper) or any(i < 1 for i in numbers):
        raise ValueError(
            f"{name} counts the arguments of fun as in jax.grad, where the parameters are "
            f"argument 0; expected integers >= 1, got {value!r}."
        )
    return tuple(map(int, numbers))
