"""What the outputs of a network mean: logits of classes, or moments of a Gaussian."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.checks import is_concrete
from ivon_jax._core.trees import PyTree, wide_dtype
from ivon_jax._uses.data import check_callable, check_floating_output


def class_log_probs(apply_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """log_softmax of the logits that `apply_fn` returns, at least float32."""
    check_callable(apply_fn)

    def log_probs(params: PyTree, *inputs: PyTree) -> jax.Array:
        logits = apply_fn(params, *inputs)
        check_floating_output("predict_log_probs", logits)
        if logits.ndim < 2 or logits.shape[-1] < 2:
            raise ValueError(
                "logits must have the examples on the first axis and K >= 2 classes on the last; "
                f"got shape {logits.shape}. For a binary model with one logit f return "
                "jnp.stack([jnp.zeros_like(f), f], axis=-1)."
            )
        return jax.nn.log_softmax(logits.astype(wide_dtype(logits.dtype)), axis=-1)

    return log_probs


def gaussian_head(
    apply_fn: Callable[..., Any], noise_variance: float | jax.Array | None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """An `apply_fn` that returns (μ, σ²) in one shape, at least float32."""
    check_callable(apply_fn)
    concrete = noise_variance if is_concrete(noise_variance) else None
    if concrete is not None and not np.all(np.asarray(concrete) >= 0):
        raise ValueError(f"noise_variance must be >= 0; got {concrete}.")

    def head(params: PyTree, *inputs: PyTree) -> tuple[jax.Array, jax.Array]:
        out = apply_fn(params, *inputs)
        if isinstance(out, tuple | list) == (noise_variance is not None):
            raise ValueError(
                "apply_fn must return a pair (mean, variance), or the mean alone with "
                f"noise_variance given; got {type(out).__name__} with noise_variance="
                f"{noise_variance}."
            )
        mean, variance = (out, noise_variance) if noise_variance is not None else out
        check_floating_output("a Gaussian head", mean)
        if noise_variance is None and jnp.shape(variance) not in ((), mean.shape):
            raise ValueError(
                f"the variance must have the shape of the mean, {mean.shape}, or be a scalar; got "
                f"{jnp.shape(variance)}."
            )
        mean = mean.astype(wide_dtype(mean.dtype))
        variance = jnp.broadcast_to(jnp.asarray(variance, mean.dtype), mean.shape)
        return mean, jnp.where(variance >= 0, variance, jnp.nan)

    return head
