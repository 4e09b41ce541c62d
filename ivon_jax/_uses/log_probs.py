"""Validation of class probabilities and labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.checks import is_concrete
from ivon_jax._core.trees import wide_dtype


def logsumexp(log_probs: jax.Array, axis: int) -> jax.Array:
    """`jax.nn.logsumexp`, whose gradient is 0 and not NaN where every term is −∞."""
    impossible = jnp.all(log_probs == -jnp.inf, axis=axis, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(impossible, 0, log_probs), axis=axis)
    return jnp.where(jnp.squeeze(impossible, axis), -jnp.inf, total)


def checked_log_probs(log_probs: Any) -> jax.Array:
    """At least float32; under jit, rows that turn out not to be normalised become NaN."""
    dtype = jnp.result_type(log_probs)
    if not jnp.issubdtype(dtype, jnp.floating) or not jnp.ndim(log_probs):
        raise TypeError(
            "log_probs must be floating log-probabilities with the classes on the last axis; got "
            f"{dtype} of shape {jnp.shape(log_probs)}."
        )
    tolerance = 1e-3 if dtype.itemsize >= 4 else 5e-2
    log_probs = jnp.asarray(log_probs, wide_dtype(dtype))
    # NaN, as from a run that has diverged, is no mistake of the caller's and stays NaN.
    total = jax.nn.logsumexp(log_probs, axis=-1, keepdims=True)
    normalised = ~(jnp.abs(total) > tolerance)
    if is_concrete(normalised) and not bool(jnp.all(normalised)):
        sums = np.asarray(jnp.exp(total)).ravel()
        worst = sums[np.argmax(~np.asarray(normalised).ravel())]
        raise ValueError(
            "log_probs must be log-probabilities, whose exponentials sum to 1 over the last axis; "
            f"here a sum is {worst:.6g}. Pass jax.nn.log_softmax(logits), or jnp.log(probabilities)"
            "; for samples average with jax.nn.logsumexp(·, axis=0) - log S."
        )
    return jnp.where(normalised & ~jnp.isnan(total), log_probs, jnp.nan)


def checked_labels(log_probs: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities as in `checked_log_probs`, with NaN where the label is no class."""
    dtype = jnp.result_type(labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers 0 … K−1; got {dtype} of shape {jnp.shape(labels)}. For "
            "one-hot labels pass labels.argmax(-1)."
        )
    if jnp.shape(log_probs)[:-1] != jnp.shape(labels) or not jnp.ndim(log_probs):
        raise ValueError(
            f"log_probs has shape {jnp.shape(log_probs)}, whose last axis is the classes; labels "
            f"must have shape {jnp.shape(log_probs)[:-1]}, but have {jnp.shape(labels)}."
        )
    if not jnp.size(labels):
        raise ValueError("there are no examples to average over.")
    # int32 holds every class, and compares with what argmax returns under strict promotion.
    log_probs, labels = checked_log_probs(log_probs), jnp.asarray(labels).astype(jnp.int32)
    num_classes = log_probs.shape[-1]
    valid = (labels >= 0) & (labels < num_classes)
    if is_concrete(valid) and not bool(jnp.all(valid)):
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels must be in 0 … {num_classes - 1}; got {found}.")
    return jnp.where(valid[..., None], log_probs, jnp.nan), jnp.where(valid, labels, 0)
