"""What each training example does to the model, without retraining.

By the memory-perturbation equation, removing example i moves its output by about v_i e_i, where
v_i = J_i V J_iᵀ is the variance of the output under the posterior and e_i = ∂ℓ_i/∂f the prediction
error (p − y for cross-entropy, (f − y)/s² for a Gaussian likelihood). V must be Bayes' posterior,
λ = N: after training with another λ pass `posterior(state, temperature=λ/N)`.

References: Nickl et al., The Memory-Perturbation Equation, `arXiv:2310.19273
<https://arxiv.org/abs/2310.19273>`_.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import whole_first_axis
from ivon_jax._core.checks import check_positive
from ivon_jax._core.trees import PyTree
from ivon_jax._uses.linearization import linear_outputs
from ivon_jax._uses.networks import num_examples


class Sensitivity(NamedTuple):
    """What removing each of N training examples would do to the model's output for it.

    Attributes:
      score: ‖v_i e_i‖, shape (N,).
      deviation: v_i e_i, the change of the output if the example is removed, shape (N, *out).
      error: e_i = ∂ℓ_i/∂f, shape (N, *out).
      variance: diagonal of v_i = J_i V J_iᵀ, shape (N, *out).
    """

    score: jax.Array
    deviation: jax.Array
    error: jax.Array
    variance: jax.Array


def sensitivity(
    apply_fn: Callable[..., jax.Array],
    loss_fn: Callable[[jax.Array, Any], jax.Array],
    *,
    diagonal: bool = False,
    data_batch_size: int | None = None,
) -> Callable[..., Sensitivity]:
    """Sensitivity of the model to each training example.

    Args:
      apply_fn: `apply_fn(params, *inputs)` maps a batch (examples on the leading axis) to
        outputs of shape (N, *out). It is called with one example at a time.
      loss_fn: `loss_fn(output, target)`, the negative log-likelihood ℓ of one example, such as
        `optax.softmax_cross_entropy_with_integer_labels`.
      diagonal: whether covariances between the outputs of an example are left out of v_i.
      data_batch_size: number of examples worked on at a time; one by default.

    Returns:
      `f(state, *inputs, targets, params=None) -> Sensitivity`, with `state` and `params` as in
      `sample_params`.

    Raises:
      ValueError: when called, if inputs and targets differ in length, or the loss is no scalar.

    Example:
      >>> from ivon_jax import ivon, posterior, sensitivity
      >>> state = ivon(0.1, ess=10, weight_decay=0.0).init(jnp.ones(2))
      >>> squared_error = lambda f, y: 0.5 * (f - y) ** 2
      >>> f = sensitivity(lambda w, x: x @ w, squared_error)
      >>> q = posterior(state, temperature=10 / 2)  # λ = 10, but there are N = 2 examples
      >>> print(f(q, jnp.eye(2), targets=jnp.array([1.0, 3.0])).score)
      [0. 1.]
    """

    def perturbed(loss: _Loss, output: jax.Array, covariance: jax.Array) -> Sensitivity:
        error = jax.grad(loss)(output)
        deviation = _spread(covariance, error)
        variance = covariance if diagonal else jnp.diagonal(covariance)
        score = jnp.sqrt(jnp.sum(deviation**2))
        return Sensitivity(score, deviation, error, variance.reshape(output.shape))

    return _map_examples(apply_fn, loss_fn, perturbed, diagonal, data_batch_size)


class LeaveOneOut(NamedTuple):
    """Estimates for each of N training examples of a model trained without it.

    Attributes:
      loss: ℓ_i at the output below, shape (N,); its mean is the leave-one-out NLL.
      output: what the model would say without the example, shape (N, *out).
    """

    loss: jax.Array
    output: jax.Array


def leave_one_out(
    apply_fn: Callable[..., jax.Array],
    loss_fn: Callable[[jax.Array, Any], jax.Array],
    *,
    second_order: bool = False,
    diagonal: bool = False,
    data_batch_size: int | None = None,
) -> Callable[..., LeaveOneOut]:
    """Leave-one-out outputs and losses, from the training set alone.

    The output without example i is estimated by f_i + v_i e_i, or, with `second_order`, by
    f_i + (I − v_i H_i)⁻¹ v_i e_i with the curvature H_i = ∂²ℓ_i/∂f². The latter is exact for
    linear-Gaussian models whose posterior covariance is V (the familiar factor 1/(1 − v/s²)).

    Args:
      apply_fn: as in `sensitivity`.
      loss_fn: as in `sensitivity`.
      second_order: whether the curvature of the loss is taken into account.
      diagonal: as in `sensitivity`.
      data_batch_size: as in `sensitivity`.

    Returns:
      `f(state, *inputs, targets, params=None) -> LeaveOneOut`. With `second_order` the
      result is NaN for an example whose removal would leave no proper posterior (the leverage of
      v_i H_i is 1 or more). IVON's V can be that wide for single examples: the first order is then
      the safer choice.

    Example:
      >>> from ivon_jax import Posterior, leave_one_out
      >>> squared_error = lambda f, y: 0.5 * (f - y) ** 2
      >>> f = leave_one_out(lambda w, x: x @ w, squared_error, second_order=True)
      >>> x, y = jnp.ones((3, 1)), jnp.array([0.0, 1.0, 5.0])
      >>> mean_of_three = Posterior(jnp.array([2.0]), jnp.array([3.0]))
      >>> output = f(mean_of_three, x, targets=y).output
      >>> bool(jnp.allclose(output, jnp.array([3.0, 2.5, 0.5])))  # the means of the other two
      True
    """

    def without(loss: _Loss, output: jax.Array, covariance: jax.Array) -> LeaveOneOut:
        error = jax.grad(loss)(output)
        if second_order:
            shift = _newton_shift(jax.hessian(loss)(output), covariance, error)
        else:
            shift = _spread(covariance, error)
        return LeaveOneOut(loss(output + shift), output + shift)

    return _map_examples(apply_fn, loss_fn, without, diagonal, data_batch_size)


_Loss = Callable[[jax.Array], jax.Array]


def _map_examples(
    apply_fn: Callable[..., jax.Array],
    loss_fn: Callable[[jax.Array, Any], jax.Array],
    finish: Callable[[_Loss, jax.Array, jax.Array], Any],
    diagonal: bool,
    data_batch_size: int | None,
) -> Callable[..., Any]:
    """`finish(loss, output, covariance)` of each example."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (output, target); got {loss_fn!r}.")
    if data_batch_size is not None:
        check_positive("data_batch_size", data_batch_size)

    def mapped(
        state: PyTree, *inputs: PyTree, targets: PyTree, params: PyTree | None = None
    ) -> Any:
        num_examples((inputs, targets))
        inputs, targets = jax.tree.map(whole_first_axis, (inputs, targets))
        outputs = linear_outputs(apply_fn, state, params, diagonal=diagonal)

        def at_example(example: tuple[tuple[PyTree, ...], PyTree]) -> Any:
            inputs, target = example

            def loss(output: jax.Array) -> jax.Array:
                value = loss_fn(output, target)
                if jnp.shape(value):
                    shapes = f"shape {jnp.shape(value)} for an output of shape {output.shape}"
                    raise ValueError(f"loss_fn must return a scalar, of one example; got {shapes}.")
                return value

            return finish(loss, *outputs(*inputs))

        return jax.lax.map(at_example, (inputs, targets), batch_size=data_batch_size)

    return mapped


def _spread(covariance: jax.Array, error: jax.Array) -> jax.Array:
    """v e, for a covariance of shape (K, K), or variances of shape (K,)."""
    flat = error.ravel()
    if covariance.ndim == 1:
        return (covariance * flat).reshape(error.shape)
    return jnp.matmul(covariance, flat, precision="highest").reshape(error.shape)


def _newton_shift(hessian: jax.Array, covariance: jax.Array, error: jax.Array) -> jax.Array:
    """(I − vH)⁻¹ v e = L (I − LᵀHL)⁻¹ Lᵀ e with v = L Lᵀ; NaN unless I − LᵀHL is positive."""
    size = error.size
    if covariance.ndim == 1:
        root = jnp.diag(jnp.sqrt(covariance))
    else:
        values, vectors = jnp.linalg.eigh(covariance)
        root = vectors * jnp.sqrt(jnp.maximum(values, 0))[None]
    with jax.default_matmul_precision("highest"):
        left = jnp.eye(size, dtype=root.dtype) - root.T @ hessian.reshape(size, size) @ root
        factor = jax.scipy.linalg.cholesky(left, lower=True)
        shift = root @ jax.scipy.linalg.cho_solve((factor, True), root.T @ error.ravel())
    return shift.reshape(error.shape)
