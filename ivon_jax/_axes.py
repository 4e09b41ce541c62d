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
    zeros = jnp.zeros(aval.shape, aval.dtype)
    axes = tuple(sorted(varying_axes(aval)))
    if not axes:
        return zeros
    if hasattr(jax.lax, "pcast"):  # its older name is pvary
        return jax.lax.pcast(zeros, axes, to="varying")
    return jax.lax.pvary(zeros, axes)  # pyright: ignore[reportAttributeAccessIssue]
