"""Prediction with the posterior: averages and draws over samples, or the mean alone.

Every function here takes `apply_fn(params, *inputs)`, which maps a batch (examples on the leading
axis of every input) to outputs with the same leading axis, and returns a pure function of a
posterior and inputs. For a test temperature τ pass `posterior(state, temperature=τ)`; for several
runs a `mixture` of their posteriors, among whose components the samples are divided.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import varying_axes, zeros_of
from ivon_jax._core.checks import check_positive
from ivon_jax._core.gaussians import gaussian
from ivon_jax._core.sampling import ParameterGaussian, fold_in_groups, one_or_many, threefry_key
from ivon_jax._core.state import Posterior
from ivon_jax._core.trees import PyTree
from ivon_jax._uses.log_probs import logsumexp
from ivon_jax._uses.mixtures import as_mixture, check_of_one, component, num_components
from ivon_jax._uses.networks import applied, apply_in_batches, class_log_probs, gaussian_head


def predict_at_mean(
    apply_fn: Callable[..., PyTree], *, data_batch_size: int | None = None
) -> Callable[..., PyTree]:
    """Outputs of the network at the posterior mean.

    Args:
      apply_fn: `apply_fn(params, *inputs)`.
      data_batch_size: number of examples evaluated at a time; all by default.

    Returns:
      `f(state, *inputs, params=None) -> outputs`; `state` and `params` as in `sample_params`.

    Example:
      >>> from ivon_jax import ivon, predict_at_mean
      >>> state = ivon(0.1, ess=100).init(jnp.ones(2))
      >>> predict_at_mean(lambda w, x: x @ w)(state, jnp.eye(2))
      Array([1., 1.], dtype=float32)
    """
    apply = apply_in_batches(apply_fn, data_batch_size)

    def at_mean(state: PyTree, *inputs: PyTree, params: PyTree | None = None) -> PyTree:
        if as_mixture(state) is not None:
            raise ValueError(
                "a mixture has one mean for each component, and no network at their average: "
                "take predict_samples or predict_log_probs, or predict_at_mean of each component."
            )
        return applied(apply, ParameterGaussian(gaussian(state, params), params).mean(), inputs)

    return at_mean


def predict_samples(
    apply_fn: Callable[..., PyTree],
    num_samples: int = 64,
    *,
    sample_batch_size: int | None = None,
    data_batch_size: int | None = None,
) -> Callable[..., PyTree]:
    """Outputs at S posterior samples, for whatever is not a plain average of them.

    Args:
      apply_fn: `apply_fn(params, *inputs)`.
      num_samples: number of posterior samples S.
      sample_batch_size: number of samples evaluated at a time by `jax.vmap`; one by default.
      data_batch_size: number of examples evaluated at a time; all by default.

    Returns:
      `f(key, state, *inputs, params=None) -> outputs`, with the samples on a new axis 0;
      `key`, `state` and `params` as in `sample_params`. `state` may also be a `mixture`, a list of
      posteriors or states, or a stack of states from `jax.vmap`: then sample s is drawn from
      component s mod K of K. The s-th sample is the same for every batch size, and for every
      function in this module.

    Example:
      >>> from ivon_jax import ivon, predict_samples
      >>> state = ivon(0.1, ess=100).init(jnp.ones(2))
      >>> f = jax.jit(predict_samples(lambda w, x: x @ w, num_samples=8))
      >>> f(jax.random.key(0), state, jnp.eye(2)).shape
      (8, 2)
    """
    prepare = _sampled(apply_fn, num_samples, sample_batch_size, data_batch_size)

    def at_samples(
        key: jax.Array, state: PyTree, *inputs: PyTree, params: PyTree | None = None
    ) -> PyTree:
        members, at_member = prepare(key, state, inputs, params)
        return jax.lax.map(lambda x: at_member(*x), members, batch_size=sample_batch_size)

    return at_samples


def predict_log_probs(
    apply_fn: Callable[..., jax.Array],
    num_samples: int = 64,
    *,
    sample_batch_size: int | None = None,
    data_batch_size: int | None = None,
) -> Callable[..., jax.Array]:
    """Class probabilities averaged over the posterior, as logarithms.

    log p(y|x) = logsumexp_s log_softmax f(x; θ_s) − log S: probabilities are averaged, not
    logits. Memory does not grow with S.

    Args:
      apply_fn: `apply_fn(params, *inputs)` returns logits (..., K).
      num_samples: as in `predict_samples`.
      sample_batch_size: as in `predict_samples`.
      data_batch_size: as in `predict_samples`.

    Returns:
      `f(key, state, *inputs, params=None) -> log_probs` of shape (..., K), at least float32;
      arguments as in `predict_samples`.

    Example:
      >>> from ivon_jax import ivon, predict_log_probs
      >>> state = ivon(0.1, ess=100).init(jnp.ones((2, 3)))
      >>> f = jax.jit(predict_log_probs(lambda w, x: x @ w, num_samples=8))
      >>> log_probs = f(jax.random.key(0), state, jnp.eye(2))
      >>> bool(jnp.allclose(jnp.exp(log_probs).sum(-1), 1.0))
      True
    """
    prepare = _sampled(class_log_probs(apply_fn), num_samples, sample_batch_size, data_batch_size)

    def averaged(
        key: jax.Array, state: PyTree, *inputs: PyTree, params: PyTree | None = None
    ) -> jax.Array:
        members, at_member = prepare(key, state, inputs, params)
        at_members = one_or_many(at_member)
        total, _ = fold_in_groups(
            lambda members: (logsumexp(at_members(*members), axis=0), None),
            lambda a, b: logsumexp(jnp.stack([a, b]), axis=0),
            members,
            sample_batch_size,
            start=lambda x: zeros_of(x) - jnp.inf,
        )
        return total - jnp.log(jnp.asarray(num_samples, total.dtype))

    return averaged


class Moments(NamedTuple):
    """Mean and variance of a prediction under the posterior.

    Attributes:
      mean: μ̄ = mean_s μ_s.
      variance: mean_s(σ_s² + μ_s²) − μ̄², the variance of a new observation.
      model_variance: mean_s μ_s² − μ̄², the part of it that comes from the weights.
    """

    mean: jax.Array
    variance: jax.Array
    model_variance: jax.Array


def predict_moments(
    apply_fn: Callable[..., Any],
    num_samples: int = 64,
    *,
    noise_variance: float | jax.Array | None = None,
    sample_batch_size: int | None = None,
    data_batch_size: int | None = None,
) -> Callable[..., Moments]:
    """Mean and variance of a network with a Gaussian head, in memory that does not grow with S.

    Args:
      apply_fn: `apply_fn(params, *inputs)` returns the means μ, or a pair (μ, σ²).
      num_samples: number of posterior samples S.
      noise_variance: σ² of the observations, which broadcasts to μ, if `apply_fn` returns μ only.
      sample_batch_size: as in `predict_samples`.
      data_batch_size: as in `predict_samples`.

    Returns:
      `f(key, state, *inputs, params=None) -> Moments`; arguments as in `predict_samples`.
      The variance is NaN where a σ² is negative.

    Example:
      >>> from ivon_jax import ivon, predict_moments
      >>> state = ivon(0.1, ess=100, weight_decay=0.0).init(jnp.ones(2))  # σ = 0.1
      >>> f = predict_moments(lambda w, x: x @ w, num_samples=1000, noise_variance=1.0)
      >>> print(f(jax.random.key(0), state, jnp.eye(2)).variance.round(2))
      [1.01 1.01]
    """
    head = gaussian_head(apply_fn, noise_variance)
    prepare = _sampled(head, num_samples, sample_batch_size, data_batch_size)

    def moments(
        key: jax.Array, state: PyTree, *inputs: PyTree, params: PyTree | None = None
    ) -> Moments:
        members, at_member = prepare(key, state, inputs, params)
        at_members = one_or_many(at_member)

        def group(members: tuple[jax.Array, ...]) -> Any:
            means, variances = at_members(*members)
            mean = jnp.mean(means, axis=0)
            # Deviations, not squares: mean μ² − μ̄² would cancel for μ far from zero.
            squares = jnp.sum((means - mean[None]) ** 2, axis=0)
            count = jnp.full_like(mean, len(means))
            return (count, mean, squares, jnp.sum(variances, axis=0)), None

        (count, mean, squares, noise), _ = fold_in_groups(group, _pool, members, sample_batch_size)
        return Moments(mean, (noise + squares) / count, squares / count)

    return moments


def predict_draws(
    apply_fn: Callable[..., Any],
    num_samples: int = 64,
    *,
    noise_variance: float | jax.Array | None = None,
    sample_batch_size: int | None = None,
    data_batch_size: int | None = None,
) -> Callable[..., jax.Array]:
    """Draws of new observations y = μ_s + σ_s ε from a network with a Gaussian head.

    Args:
      apply_fn: as in `predict_moments`.
      num_samples: number of posterior samples S, with one draw of y from each.
      noise_variance: as in `predict_moments`.
      sample_batch_size: as in `predict_samples`.
      data_batch_size: as in `predict_samples`.

    Returns:
      `f(key, state, *inputs, params=None) -> y` with the draws on a new axis 0; arguments as
      in `predict_samples`.

    Example:
      >>> from ivon_jax import ivon, predict_draws
      >>> state = ivon(0.1, ess=100).init(jnp.ones(2))
      >>> f = predict_draws(lambda w, x: x @ w, num_samples=8, noise_variance=1.0)
      >>> f(jax.random.key(0), state, jnp.eye(2)).shape
      (8, 2)
    """
    sizes = {"sample_batch_size": sample_batch_size, "data_batch_size": data_batch_size}
    heads = predict_samples(gaussian_head(apply_fn, noise_variance), num_samples, **sizes)

    def drawn(
        key: jax.Array, state: PyTree, *inputs: PyTree, params: PyTree | None = None
    ) -> jax.Array:
        means, variances = heads(key, state, *inputs, params=params)
        # Samples use the keys split from this one; the fold leads to another stream.
        noise_key = jax.random.fold_in(threefry_key(key), num_samples)
        # Under shard_map each device has examples of its own, which need noise of their own.
        for axis in sorted(varying_axes(jax.typeof(means))):
            noise_key = jax.random.fold_in(noise_key, jax.lax.axis_index(axis))
        with jax.threefry_partitionable(True):
            noise = jax.random.normal(noise_key, means.shape, means.dtype)
        return means + jnp.sqrt(variances) * noise

    return drawn


def _sampled(
    apply_fn: Callable[..., PyTree],
    num_samples: int,
    sample_batch_size: int | None,
    data_batch_size: int | None,
) -> Callable[..., tuple[tuple[jax.Array, ...], Callable[..., PyTree]]]:
    """Of a posterior and inputs: S samples as keys, and the outputs at the sample of a key.

    Of a mixture a sample is a key and a component, which take turns.
    """
    check_positive("num_samples", num_samples)
    if sample_batch_size is not None:
        check_positive("sample_batch_size", sample_batch_size)
    apply = apply_in_batches(apply_fn, data_batch_size)

    def prepare(key: jax.Array, state: PyTree, inputs: tuple[PyTree, ...], params: PyTree) -> Any:
        with jax.threefry_partitionable(True):
            keys = jax.random.split(threefry_key(key), num_samples)

        def at_sample(q: Posterior, key: jax.Array) -> PyTree:
            return applied(apply, ParameterGaussian(q, params).draw_sample(key), inputs)

        several = as_mixture(state)
        if several is None:
            q = gaussian(state, params)
            return (keys,), lambda key: at_sample(q, key)
        number = num_components(several)
        if num_samples % number:
            raise ValueError(
                f"num_samples={num_samples} cannot be divided equally among the {number} "
                f"components of the mixture: take a multiple of {number}."
            )
        turns = jnp.arange(num_samples) % number
        check_of_one(several, params)
        return (keys, turns), lambda key, i: at_sample(component(several, i), key)

    return prepare


def _pool(a: Any, b: Any) -> Any:
    """Count, mean, sum of squared deviations and sum of variances of two groups together."""
    (n_a, mean_a, squares_a, noise_a), (n_b, mean_b, squares_b, noise_b) = a, b
    count, shift = n_a + n_b, mean_b - mean_a
    return (
        count,
        mean_a + shift * (n_b / count),
        squares_a + squares_b + shift**2 * (n_a * n_b / count),
        noise_a + noise_b,
    )
