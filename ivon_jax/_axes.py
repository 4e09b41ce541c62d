"""What is known, while tracing under `shard_map`, of the mesh axes an array varies over."""

from typing import Any

import jax
import jax.numpy as jnp


def varying_axes(aval: Any) -> frozenset[str]:
    """Mesh axes over which an array of this type varies; empty where jax does not track it.

    Args:
      aval: `jax.typeof(x)`, or a `jax.ShapeDtypeStruct` from `jax.eval_shape`.
    """
    manual = getattr(aval, "manual_axis_type", None)
    axes = getattr(aval, "vma", None) if manual is None else manual.varying
    return frozenset(axes or ())


def zeros_of(aval: Any) -> jax.Array:
    """Zeros of exactly this type, so that they can start a scan that carries it."""
    return varying_over(jnp.zeros(aval.shape, aval.dtype), varying_axes(aval))


def varying_over(zeros: jax.Array, names: frozenset[str]) -> jax.Array:
    """An array that varies over these mesh axes as well, for jax's bookkeeping."""
    axes = tuple(sorted(names - varying_axes(jax.typeof(zeros))))
    if not axes:
        return zeros
    if hasattr(jax.lax, "pcast"):  # its older name is pvary
        return jax.lax.pcast(zeros, axes, to="varying")
    return jax.lax.pvary(zeros, axes)  # pyright: ignore[reportAttributeAccessIssue]
