"""Going through data a batch at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ivon_jax._core.checks import check_positive
from ivon_jax._core.trees import PyTree


def num_examples(inputs: PyTree) -> int:
    """The common length of the leading axes.

    Raises:
      ValueError: if there is none.
    """
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
