"""The true effect of leaving an example out, for `sensitivity.py`: the model is trained again."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.evidence.uses.small_digits import (
    Apply,
    Array,
    PyTree,
    Recipe,
    Weighted,
    cross_entropy,
    run_epochs,
)
from ivon_jax import Posterior, leave_one_out, posterior_mean, sensitivity

REFIT_SHARE = 0.15  # of the steps to the stationary point, without an example
TOLERANCE = 1e-7  # of the gradient's norm; removing one example makes it up to 1e-2


class Truth(NamedTuple):
    """What retraining without each of M examples did.

    Attributes:
      base: the model retrained with all examples, in which nothing else differs.
      deviation: change of the output for the example against `base`, shape (M, K).
      floor: change of the same outputs that has nothing to do with the removal, shape (M, K).
    """

    base: PyTree
    deviation: Array
    floor: Array


def leave_out(
    retrain: Callable[[Array], PyTree], apply: Apply, data: Weighted, examples: Array, base: PyTree
) -> Array:
    """Change of the output for each example when it is given no weight.

    Args:
      retrain: maps the weights of all examples to parameters.
      apply: outputs for a batch.
      data: all examples.
      examples: the rows to leave out, one at a time.
      base: the parameters to compare with.
    """
    outputs = jax.jit(apply)
    without = [
        outputs(retrain(data.weights.at[row].set(0.0)), data.images[row][None]) for row in examples
    ]
    return jnp.concatenate(without) - outputs(base, data.images[examples])


def with_ivon(
    apply: Apply,
    recipe: Recipe,
    data: Weighted,
    state: PyTree,
    examples: Array,
    keys: tuple[Array, Array],
) -> tuple[PyTree, Truth]:
    """Continues IVON with and without each example, all with the same batches and noise.

    Args:
      apply: outputs for a batch.
      recipe: of the continuation.
      data: all examples.
      state: the end of the first training.
      examples: the rows to leave out.
      keys: seeds of the continuation, and of another one that serves as the floor.

    Returns:
      The state of the continuation with all examples, and the truth; `base` is its mean.
    """
    # The schedule starts anew, and with it the debiasing of the momentum.
    state = state._replace(
        count=jnp.zeros_like(state.count),
        momentum=jax.tree.map(jnp.zeros_like, state.momentum),
    )

    def continued(weights: Array, key: Array) -> PyTree:
        epoch_keys = jax.random.split(key, recipe.epochs)
        return _run_epochs(apply, recipe, data._replace(weights=weights), state, epoch_keys)

    with_all = continued(data.weights, keys[0])
    base = posterior_mean(with_all)
    deviation = leave_out(
        lambda weights: posterior_mean(continued(weights, keys[0])), apply, data, examples, base
    )
    other = posterior_mean(continued(data.weights, keys[1]))
    images = data.images[examples]
    return with_all, Truth(base, deviation, apply(other, images) - apply(base, images))


_run_epochs = jax.jit(run_epochs, static_argnames=("apply", "recipe"))


def objective(apply: Apply, data: Weighted, decay: float | Array, params: PyTree) -> Array:
    """Loss of all examples plus prior, per example: (Σ w_i ℓ_i)/N + δ‖θ‖²/2."""
    losses = cross_entropy(apply(params, data.images), data.labels)
    return jnp.mean(data.weights * losses) + 0.5 * decay * optax.tree.norm(params, squared=True)


@partial(jax.jit, static_argnames="apply")
def fit(apply: Apply, data: Weighted, decay: float, params: PyTree, steps: int) -> PyTree:
    """Minimises `objective` by L-BFGS on the whole set, in at most so many steps."""

    def loss(params: PyTree) -> Array:
        return objective(apply, data, decay, params)

    tx = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry: tuple[int, PyTree, PyTree]) -> Array:
        count, _, state = carry
        size = optax.tree.norm(optax.tree.get(state, "grad"))
        return (count < steps) & ((count == 0) | (size > TOLERANCE))

    def step(carry: tuple[int, PyTree, PyTree]) -> tuple[int, PyTree, PyTree]:
        count, params, state = carry
        value, grads = value_and_grad(params, state=state)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return count + 1, optax.apply_updates(params, updates), state

    return jax.lax.while_loop(unfinished, step, (0, params, tx.init(params)))[1]


def without_noise(
    apply: Apply, data: Weighted, decay: float, params: PyTree, examples: Array, steps: int
) -> Truth:
    """Moves to a stationary point of the whole set, and from there to those without an example.

    At most `steps` steps of L-BFGS lead to the first, `REFIT_SHARE` of them to each of the others.
    The floor is the way that the outputs still go when nothing is removed.
    """
    fitted = fit(apply, data, decay, params, steps)

    def refit(weights: Array) -> PyTree:
        refit_steps = max(1, round(REFIT_SHARE * steps))
        return fit(apply, data._replace(weights=weights), decay, fitted, refit_steps)

    base = refit(data.weights)
    images = data.images[examples]
    return Truth(
        base,
        leave_out(refit, apply, data, examples, base),
        apply(base, images) - apply(fitted, images),
    )


def whitened(
    apply: Apply, data: Weighted, decay: float | Array, params: PyTree
) -> tuple[Callable[[Array, Array], Array], Posterior]:
    """The model in coordinates z, θ = m + L z, in which its full Laplace covariance is I.

    With LLᵀ the inverse of the objective's Hessian (times N), `sensitivity` of the result is that
    of the full covariance, although a `Posterior` is diagonal.
    """
    mean, unravel = ravel_pytree(params)
    hessian = jax.hessian(lambda v: objective(apply, data, decay, unravel(v)))(mean)
    factor = jnp.linalg.cholesky(len(data.labels) * hessian)
    root = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(mean)), lower=True).T

    def apply_z(z: Array, images: Array) -> Array:
        return apply(unravel(mean + root @ z), images)

    return apply_z, Posterior(jnp.zeros_like(mean), jnp.ones_like(mean))


@partial(jax.jit, static_argnames="apply")
def full_covariance_changes(
    apply: Apply, data: Weighted, decay: float, params: PyTree, examples: Array
) -> tuple[Array, Array]:
    """Changes of the outputs that the full covariance predicts, to first and second order."""
    apply_z, q = whitened(apply, data, decay, params)
    images, labels = data.images[examples], data.labels[examples]
    first = sensitivity(apply_z, cross_entropy)(q, images, targets=labels).deviation
    second = leave_one_out(apply_z, cross_entropy, second_order=True)(q, images, targets=labels)
    return first, second.output - apply(params, images)
