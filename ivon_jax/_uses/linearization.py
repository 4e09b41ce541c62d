"""The network linearised at the posterior mean: a Gaussian over its outputs."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import varying_axes, varying_over, whole_first_axis
from ivon_jax._core.checks import check_positive
from ivon_jax._core.gaussians import gaussian
from ivon_jax._core.sampling import ParameterGaussian
from ivon_jax._core.trees import PyTree, wide_dtype
from ivon_jax._uses.networks import applied, check_callable, check_floating_output, num_examples


class Linearized(NamedTuple):
    """The Gaussian of the outputs f of each of N examples.

    Attributes:
      mean: f at the posterior mean, shape (N, *out).
      covariance: J V Jᵀ of each example, shape (N, *out, *out), or its diagonal (N, *out).
    """

    mean: jax.Array
    covariance: jax.Array


def linearize(
    apply_fn: Callable[..., jax.Array],
    *,
    diagonal: bool = False,
    data_batch_size: int | None = None,
) -> Callable[..., Linearized]:
    """Mean and covariance of the outputs under f(θ) ≈ f(m) + J(θ − m), with J = ∂f/∂m.

    The covariance is J V Jᵀ with V = diag(1/precision), in the coordinates of a basis where there
    is one; exact as σ → 0. It takes one reverse pass per output.

    Args:
      apply_fn: `apply_fn(params, *inputs)` maps a batch (examples on the leading axis) to
        outputs of shape (N, *out). It is called with one example at a time.
      diagonal: whether only the variance of each output is returned.
      data_batch_size: number of examples worked on at a time; one by default. Memory grows with
        its product with the numbers of outputs and weights.

    Returns:
      `f(state, *inputs, params=None) -> Linearized`, at least float32; `state` and `params` as
      in `sample_params`.

    Raises:
      ValueError: when called, if the inputs have no common leading axis.

    Example:
      >>> from ivon_jax import ivon, linearize
      >>> state = ivon(0.1, ess=100, weight_decay=0.0).init(jnp.ones(2))  # σ = 0.1
      >>> f = linearize(lambda w, x: x @ w)
      >>> print(f(state, jnp.array([[1.0, 2.0]])).covariance.round(3))
      [0.05]
    """
    if data_batch_size is not None:
        check_positive("data_batch_size", data_batch_size)

    def linearized(state: PyTree, *inputs: PyTree, params: PyTree | None = None) -> Linearized:
        num_examples(inputs)
        inputs = jax.tree.map(whole_first_axis, inputs)
        at_example = linear_outputs(apply_fn, state, params, diagonal=diagonal)
        mean, covariance = jax.lax.map(lambda x: at_example(*x), inputs, batch_size=data_batch_size)
        shape = mean.shape if diagonal else mean.shape + mean.shape[1:]
        return Linearized(mean, covariance.reshape(shape))

    return linearized


def probit_log_probs(mean: jax.Array, covariance: jax.Array) -> jax.Array:
    """Class probabilities of Gaussian logits by the probit approximation, as logarithms.

    log_softmax(f_k / √(1 + (π/8) v_kk)) with the variance v_kk of each logit.

    Args:
      mean: (..., K) mean of the logits.
      covariance: (..., K, K) covariance, or (..., K) variances, as from `linearize`.

    Returns:
      (..., K) log-probabilities.

    Raises:
      ValueError: if the shapes do not fit.
      TypeError: if the mean is not floating.

    References:
      MacKay, The evidence framework applied to classification networks, 1992.

    Example:
      >>> from ivon_jax import probit_log_probs
      >>> log_probs = probit_log_probs(jnp.array([2.0, 0.0]), jnp.array([9.0, 9.0]))
      >>> print(f"{jnp.exp(log_probs)[0]:.2f}")
      0.72
    """
    shape = jnp.shape(mean)
    if not shape or shape[-1] < 2 or jnp.shape(covariance) not in (shape, (*shape, shape[-1])):
        raise ValueError(
            "mean must have K >= 2 classes on its last axis, and covariance its shape (variances) "
            f"or its last axis twice; got shapes {shape} and {jnp.shape(covariance)}."
        )
    if not jnp.issubdtype(jnp.result_type(mean), jnp.floating):
        raise TypeError(f"mean must be floating; got {jnp.result_type(mean)}.")
    dtype = wide_dtype(jnp.result_type(mean))
    mean, covariance = jnp.asarray(mean, dtype), jnp.asarray(covariance, dtype)
    if jnp.ndim(covariance) > len(shape):
        covariance = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    return jax.nn.log_softmax(mean / jnp.sqrt(1 + (jnp.pi / 8) * covariance), axis=-1)


def linear_outputs(
    apply_fn: Callable[..., jax.Array], state: PyTree, params: PyTree | None, *, diagonal: bool
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function of one example: its K outputs f, and J V Jᵀ (K, K) or the diagonal of it (K,)."""
    check_callable(apply_fn)
    q = ParameterGaussian(gaussian(state, params), params)
    variance = [1 / p for p in q.precision]

    def at_example(*example: PyTree) -> tuple[jax.Array, jax.Array]:
        batch = jax.tree.map(lambda x: x[None], example)
        # Under shard_map the derivative by a replicated array would be summed over the devices.
        axes = frozenset().union(*(varying_axes(jax.typeof(x)) for x in jax.tree.leaves(example)))
        origin = [varying_over(jnp.zeros_like(p), axes) for p in q.precision]

        def outputs(displacement: list[jax.Array]) -> jax.Array:
            out = applied(apply_fn, q.displaced(displacement), batch)
            check_floating_output("linearisation", out)
            if out.shape[:1] != (1,):
                raise ValueError(
                    "apply_fn must keep the examples on the leading axis: for one example its "
                    f"output has shape {out.shape}, expected (1, ...)."
                )
            return out[0].astype(wide_dtype(out.dtype))

        out, pull_back = jax.vjp(outputs, origin)
        size = out.size
        basis = jnp.eye(size, dtype=out.dtype).reshape(size, *out.shape)
        basis = varying_over(basis, varying_axes(jax.typeof(out)))

        (rows,) = jax.vmap(pull_back)(basis)
        jacobian = [j.reshape(size, -1) for j in q.in_coordinates(rows)]
        pairs = [(j, v.ravel()) for j, v in zip(jacobian, variance, strict=True)]
        if diagonal:
            parts = [jnp.sum(j * j * v[None], axis=1) for j, v in pairs]
        else:
            # By default a TPU or GPU would multiply with fewer bits than float32 has.
            parts = [jnp.matmul(j * v[None], j.T, precision="highest") for j, v in pairs]
        zero = jnp.zeros(size if diagonal else (size, size), out.dtype)
        return out, sum((part.astype(out.dtype) for part in parts), zero)

    return at_example
