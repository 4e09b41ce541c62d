"""Metrics of predicted probabilities: accuracy, calibration, uncertainty, detection.

All but `detection` are pure and run under jit. Class probabilities come as log-probabilities
of shape (..., K), labels as integers of shape (...); scores are means over all examples.
Log-probabilities that are not normalised are refused; under jit, where values are unknown,
the metric is then NaN, as it is for predictions that are NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import gathered
from ivon_jax._core.checks import check_positive, is_concrete
from ivon_jax._core.trees import wide_dtype
from ivon_jax._uses.detection import Detection, detection
from ivon_jax._uses.log_probs import checked_labels, checked_log_probs, logsumexp

__all__ = ["CalibrationBins", "accuracy", "brier", "calibration_bins", "ece"]
__all__ += ["gaussian_nll", "nll", "risk_coverage", "top_k_accuracy"]
__all__ += ["Detection", "detection", "mutual_information", "predictive_entropy"]


def nll(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood −mean log p(y), in nats.

    Args:
      log_probs: (..., K) log-probabilities.
      labels: (...) integer labels.

    Returns:
      A scalar, +inf if a true class has probability zero.

    Raises:
      TypeError, ValueError: as for every metric, if shapes or dtypes do not fit, a label is no
        class, or the log-probabilities are not normalised.

    Example:
      >>> from ivon_jax import metrics
      >>> log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
      >>> print(f"{metrics.nll(log_probs, jnp.array([0, 1])):.4f}")
      0.4904
    """
    log_probs, labels = checked_labels(log_probs, labels)
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[..., None], axis=-1))


def accuracy(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of examples whose most probable class (the first of equals) is the true one.

    Args:
      log_probs: (..., K) log-probabilities.
      labels: (...) integer labels.

    Example:
      >>> from ivon_jax import metrics
      >>> log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
      >>> print(metrics.accuracy(log_probs, jnp.array([0, 0])))
      0.5
    """
    log_probs, labels = checked_labels(log_probs, labels)
    return _valid_mean(_predicted(log_probs) == labels, log_probs)


def top_k_accuracy(log_probs: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Share of examples whose true class is among the k most probable (lower index wins ties).

    Args:
      log_probs: (..., K) log-probabilities.
      labels: (...) integer labels.
      k: number of classes, 1 ≤ k ≤ K.

    Example:
      >>> from ivon_jax import metrics
      >>> log_probs = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
      >>> print(metrics.top_k_accuracy(log_probs, jnp.array([1]), k=2))
      1.0
    """
    log_probs, labels = checked_labels(log_probs, labels)
    if check_positive("k", k) > log_probs.shape[-1]:
        raise ValueError(f"k={k} is above the number of classes, {log_probs.shape[-1]}.")
    _, classes = jax.lax.top_k(log_probs, k)
    return _valid_mean(jnp.any(classes.astype(jnp.int32) == labels[..., None], axis=-1), log_probs)


def brier(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """Brier score: mean of Σ_k (p_k − 1[k = y])², between 0 and 2.

    Args:
      log_probs: (..., K) log-probabilities.
      labels: (...) integer labels.

    Example:
      >>> from ivon_jax import metrics
      >>> print(metrics.brier(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([0])))
      0.5
    """
    log_probs, labels = checked_labels(log_probs, labels)
    one_hot = jax.nn.one_hot(labels, log_probs.shape[-1], dtype=log_probs.dtype)
    return jnp.mean(jnp.sum((jnp.exp(log_probs) - one_hot) ** 2, axis=-1))


class CalibrationBins(NamedTuple):
    """The data of a reliability diagram, one entry per bin.

    Attributes:
      count: number of predictions, int32.
      confidence: mean probability of the predicted class; NaN in an empty bin.
      accuracy: share of correct predictions; NaN in an empty bin.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] the usual name
    confidence: jax.Array
    accuracy: jax.Array


def calibration_bins(
    log_probs: jax.Array, labels: jax.Array, num_bins: int = 15, *, equal_mass: bool = False
) -> CalibrationBins:
    """Groups predictions by their confidence, the probability of the predicted class.

    Args:
      log_probs: (..., K) log-probabilities.
      labels: (...) integer labels.
      num_bins: number of bins B.
      equal_mass: by default bin b = 1 … B holds the confidences in ((b−1)/B, b/B]. With True the
        prediction of rank r = 0 … n−1 by confidence goes to bin ⌊rB/n⌋; equal confidences share
        the lowest rank among them, so that the order of examples plays no part.

    Returns:
      `CalibrationBins` of shape (num_bins,).

    Example:
      >>> from ivon_jax import metrics
      >>> log_probs = jnp.log(jnp.array([[0.6, 0.4], [0.1, 0.9]]))
      >>> metrics.calibration_bins(log_probs, jnp.array([0, 0]), num_bins=2).count
      Array([0, 2], dtype=int32)
    """
    log_probs, labels = checked_labels(log_probs, labels)
    num_bins = check_positive("num_bins", num_bins)
    confidence = gathered(jnp.exp(jnp.max(log_probs, axis=-1)).ravel())
    correct = gathered((_predicted(log_probs) == labels).ravel())
    if equal_mass:
        rank = jnp.searchsorted(jnp.sort(confidence), confidence, side="left")
        # ⌊rB/n⌋ ≥ b where r ≥ ⌈bn/B⌉: in integers, because rB may overflow and B/n rounds.
        edges = [-(-b * confidence.size // num_bins) for b in range(1, num_bins)]
        index = jnp.searchsorted(jnp.array(edges, rank.dtype), rank, side="right")
    else:
        index = jnp.ceil(confidence * num_bins) - 1
    index = jnp.clip(index, 0, num_bins - 1).astype(jnp.int32)

    def total(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x, index, num_bins)

    count = total(jnp.ones_like(index))
    size = jnp.where(count > 0, count.astype(confidence.dtype), jnp.nan)
    accuracy = total(correct.astype(confidence.dtype)) / size
    return CalibrationBins(count, total(confidence) / size, accuracy)


def ece(
    log_probs: jax.Array, labels: jax.Array, num_bins: int = 15, *, equal_mass: bool = False
) -> jax.Array:
    """Expected calibration error Σ_b (n_b/n) |accuracy_b − confidence_b|.

    Args:
      log_probs: (..., K) log-probabilities.
      labels: (...) integer labels.
      num_bins: number of bins.
      equal_mass: the rule of the bins, as in `calibration_bins`.

    References:
      Naeini et al. 2015; Guo et al. 2017, `arXiv:1706.04599 <https://arxiv.org/abs/1706.04599>`_.

    Example:
      >>> from ivon_jax import metrics
      >>> log_probs = jnp.log(jnp.array([[0.75, 0.25], [0.25, 0.75]]))
      >>> print(metrics.ece(log_probs, jnp.array([0, 0])))
      0.25
    """
    bins = calibration_bins(log_probs, labels, num_bins, equal_mass=equal_mass)
    gap = jnp.where(bins.count > 0, jnp.abs(bins.accuracy - bins.confidence), 0)
    weight = bins.count.astype(gap.dtype)
    return jnp.sum(weight * gap) / jnp.sum(weight)


def predictive_entropy(log_probs: jax.Array) -> jax.Array:
    """Entropy −Σ_k p_k log p_k of each prediction in nats: total uncertainty.

    Args:
      log_probs: (..., K) log-probabilities.

    Returns:
      Shape (...), between 0 and log K.

    Example:
      >>> from ivon_jax import metrics
      >>> print(metrics.predictive_entropy(jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0]]))).round(3))
      [0.693 0.   ]
    """
    log_probs = checked_log_probs(log_probs)
    probs = jnp.exp(log_probs)
    possible = log_probs != -jnp.inf  # twice, for the gradient where a class is not
    terms = -probs * jnp.where(possible, log_probs, 0)
    return jnp.sum(jnp.where(possible, terms, 0), axis=-1)


def mutual_information(sample_log_probs: jax.Array) -> jax.Array:
    """H[mean_s p_s] − mean_s H[p_s] in nats: what the posterior's samples disagree about.

    Args:
      sample_log_probs: (S, ..., K) log-probabilities of S samples, as from `predict_samples`
        followed by `jax.nn.log_softmax`.

    Returns:
      Shape (...), at least 0: the uncertainty that more data could remove.

    Raises:
      ValueError: if there is no sample axis.

    Example:
      >>> from ivon_jax import metrics
      >>> disagreeing = jnp.log(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))  # S = 2, one example
      >>> print(metrics.mutual_information(disagreeing).round(3))
      [0.693]
    """
    if jnp.ndim(sample_log_probs) < 2:
        shape = jnp.shape(sample_log_probs)
        raise ValueError(f"sample_log_probs needs samples on axis 0, classes last; got {shape}.")
    sample_log_probs = checked_log_probs(sample_log_probs)
    samples = sample_log_probs.shape[0]
    log_s = jnp.log(samples).astype(sample_log_probs.dtype)
    mean = logsumexp(sample_log_probs, axis=0) - log_s
    within = jnp.mean(predictive_entropy(sample_log_probs), axis=0)
    return jnp.maximum(predictive_entropy(mean) - within, 0)


def risk_coverage(log_probs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The error rate among the most confident predictions, for every number of them.

    What a model gains by abstaining: it answers the share `coverage` of which it is surest, by its
    largest probability, and is wrong on the share `risk` of these. The mean of `risk` is the area
    under the risk-coverage curve (Geifman & El-Yaniv 2017).

    Args:
      log_probs: log-probabilities (..., K), of n examples.
      labels: integer labels (...).

    Returns:
      `coverage` 1/n, 2/n … 1 and `risk`, both of shape (n,). Predictions of equal confidence stay
      in the order in which they are given.

    Raises:
      ValueError: as in `nll`.

    Example:
      >>> from ivon_jax import metrics
      >>> log_probs = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]]))
      >>> coverage, risk = metrics.risk_coverage(log_probs, jnp.array([0, 1]))
      >>> print(coverage, risk)
      [0.5 1. ] [0.  0.5]
    """
    log_probs, labels = checked_labels(log_probs, labels)
    log_probs, labels = log_probs.reshape(-1, log_probs.shape[-1]), labels.ravel()
    log_probs, labels = gathered(log_probs), gathered(labels)
    order = jnp.argsort(-jnp.max(log_probs, axis=-1), stable=True)
    wrong = (_predicted(log_probs) != labels)[order].astype(log_probs.dtype)
    wrong = jnp.where(jnp.any(jnp.isnan(log_probs)), jnp.nan, wrong)
    answered = jnp.arange(1, len(wrong) + 1, dtype=wrong.dtype)
    return answered / len(wrong), jnp.cumsum(wrong) / answered


def gaussian_nll(mean: jax.Array, variance: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-density mean ½[log 2πσ² + (y−μ)²/σ²] of a Gaussian prediction, in nats.

    Args:
      mean: μ, of any shape.
      variance: σ² > 0, of the same shape.
      targets: y, of the same shape.

    Returns:
      A scalar: the mean over all elements.

    Raises:
      ValueError: if the shapes differ or a variance is not positive.

    Example:
      >>> from ivon_jax import metrics
      >>> print(f"{metrics.gaussian_nll(jnp.zeros(2), jnp.ones(2), jnp.zeros(2)):.4f}")
      0.9189
    """
    shapes = jnp.shape(mean), jnp.shape(variance), jnp.shape(targets)
    if len(set(shapes)) > 1:
        raise ValueError(
            "mean, variance and targets must have one shape (a broadcast of (n,) against (n, 1) "
            f"would be n² errors); got {shapes[0]}, {shapes[1]} and {shapes[2]}."
        )
    if not jnp.size(mean):
        raise ValueError("there are no predictions to average over.")
    if not jnp.issubdtype(jnp.result_type(mean), jnp.floating):
        raise TypeError(f"mean must be floating; got {jnp.result_type(mean)}.")
    dtype = wide_dtype(jnp.result_type(mean))
    mean, variance, targets = (jnp.asarray(x, dtype) for x in (mean, variance, targets))
    positive = jnp.all(~(variance <= 0))  # NaN, as from a run that has diverged, stays NaN
    if is_concrete(positive) and not bool(positive):
        raise ValueError("variance must be positive.")
    variance = jnp.where(variance > 0, variance, jnp.nan)
    return 0.5 * jnp.mean(jnp.log(2 * jnp.pi * variance) + (targets - mean) ** 2 / variance)


def _predicted(log_probs: jax.Array) -> jax.Array:
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)


def _valid_mean(correct: jax.Array, log_probs: jax.Array) -> jax.Array:
    """The mean, NaN where log_probs is: an argmax would hide it."""
    valid = ~jnp.isnan(log_probs[..., 0])
    return jnp.mean(jnp.where(valid, correct.astype(log_probs.dtype), jnp.nan))
