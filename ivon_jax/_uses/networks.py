"""Applying a network to data in batches, and checking its outputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.axes import whole_first_axis
from ivon_jax._core.checks import check_positive, is_concrete
from ivon_jax._core.trees import PyTree, is_masked, wide_dtype


def num_examples(inputs: PyTree) -> int:
    """The common length of the leading axes."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
    lengths = {shape[0] for shape in shapes if shape}
    if len(lengths) != 1 or () in shapes:
        raise ValueError(
            "inputs and targets must have the examples on their leading axis, and equally many; "
            f"got shapes {', '.join(map(str, shapes)) or '(none)'}."
        )
    return lengths.pop()


def apply_in_batches(
    apply_fn: Callable[..., PyTree], batch_size: int | None
) -> Callable[..., PyTree]:
    """`apply_fn(params, *inputs)` on `batch_size` examples at a time; None means all at once."""
    check_callable(apply_fn)
    if batch_size is None:
        return apply_fn
    size = check_positive("data_batch_size", batch_size)

    def batched(params: PyTree, *inputs: PyTree) -> PyTree:
        total = num_examples(inputs)
        if total <= size:
            return apply_fn(params, *inputs)

        def apply(batch: tuple[PyTree, ...]) -> PyTree:
            out = apply_fn(params, *batch)
            expected = num_examples(batch)
            for x in jax.tree.leaves(out):
                if jnp.shape(x)[:1] != (expected,):
                    raise ValueError(
                        f"data_batch_size needs an apply_fn whose outputs have the {expected} "
                        f"examples of a batch on their leading axis; got shape {jnp.shape(x)}."
                    )
            return out

        full = total - total % size
        inputs = jax.tree.map(whole_first_axis, inputs)
        stacked = jax.tree.map(lambda x: x[:full].reshape(full // size, size, *x.shape[1:]), inputs)
        out = jax.tree.map(lambda x: x.reshape(full, *x.shape[2:]), jax.lax.map(apply, stacked))
        if full == total:
            return out
        last = apply(jax.tree.map(lambda x: x[full:], inputs))
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), out, last)

    return batched


def check_callable(apply_fn: Any) -> None:
    """Refuses what is not a function, such as a posterior in its place."""
    if not callable(apply_fn):
        raise TypeError(
            f"apply_fn must be a function of (params, *inputs); got {type(apply_fn).__name__}."
        )


def check_floating_output(name: str, out: Any) -> None:
    """Refuses an output of `apply_fn` that is not one floating array."""
    if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            f"{name} needs an apply_fn that returns one floating array; got "
            f"{getattr(out, 'dtype', type(out).__name__)}. If it returns more, wrap it: "
            "lambda params, x: apply(params, x)[0]."
        )


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
                "apply_fn must return a pair (mean, variance), or the mean if noise_variance is "
                f"given; got {type(out).__name__} with noise_variance={noise_variance}."
            )
        mean, variance = (out, noise_variance) if noise_variance is not None else out
        check_floating_output("a Gaussian head", mean)
        if noise_variance is None and jnp.shape(variance) not in ((), mean.shape):
            raise ValueError(
                f"the variance must have the shape of the mean, {mean.shape}, or be a scalar; got "
                f"{jnp.shape(variance)}."
            )
        mean = mean.astype(wide_dtype(mean.dtype))
        if noise_variance is not None and not _broadcasts(jnp.shape(variance), mean.shape):
            raise ValueError(
                f"noise_variance has shape {jnp.shape(variance)}, where the mean has "
                f"{mean.shape}. For a variance of each example let apply_fn return (mean, "
                "variance), which data_batch_size then divides too."
            )
        variance = jnp.broadcast_to(jnp.asarray(variance, mean.dtype), mean.shape)
        return mean, jnp.where(variance >= 0, variance, jnp.nan)

    return head


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def applied(apply: Callable[..., PyTree], params: PyTree, inputs: tuple[PyTree, ...]) -> PyTree:
    """The outputs; an error in a network with holes gets a hint."""
    try:
        return apply(params, *inputs)
    except Exception as error:
        if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
            error.add_note(
                "ivon() owns a part of the parameters only, and the others are optax.MaskedNode "
                "here: pass them as params=."
            )
        raise
