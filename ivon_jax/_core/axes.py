"""What is known, while tracing, of the mesh axes an array varies over or is split over."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def varying_axes(aval: Any) -> frozenset[str]:
    """Mesh axes over which an array of this type varies; empty where jax does not track it."""
    manual = getattr(aval, "manual_axis_type", None)
    axes = getattr(aval, "vma", None) if manual is None else manual.varying
    return frozenset(axes or ())


def zeros_of(aval: Any) -> jax.Array:
    """Zeros of exactly this type, so that they can start a scan that carries it."""
    return varying_over(
        jnp.zeros(aval.shape, aval.dtype, device=_explicit(aval)), varying_axes(aval)
    )


def varying_over(x: jax.Array, names: frozenset[str]) -> jax.Array:
    """An array that varies over these mesh axes as well, for jax's bookkeeping."""
    axes = tuple(sorted(names - varying_axes(jax.typeof(x))))
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):  # its older name is pvary
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # pyright: ignore[reportAttributeAccessIssue]


def split_over(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The array with its leading axis split over these axes of the mesh in `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"spmd_axis_name={names} must name axes of the mesh, but the current one has the axes "
            f"{tuple(mesh.axis_names)}: call this inside `with jax.set_mesh(mesh):`."
        )
    parts = math.prod(mesh.shape[name] for name in names)
    if x.shape[0] % parts:
        raise ValueError(
            f"sample_batch_size={x.shape[0]} samples cannot be split over {parts} devices along "
            f"{names}: use a multiple of that."
        )
    if mesh.axis_types[mesh.axis_names.index(names[0])] == AxisType.Explicit:
        return jax.sharding.reshard(x, PartitionSpec(names, *jax.typeof(x).sharding.spec[1:]))
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(names, *rest))


def whole_first_axis(x: jax.Array) -> jax.Array:
    """The array with its leading axis on every device, where jax wants to be told (Explicit)."""
    sharding = _explicit(jax.typeof(x))
    if sharding is None or sharding.spec[0] is None:
        return x
    return jax.sharding.reshard(x, PartitionSpec(None, *sharding.spec[1:]))


def gathered(x: jax.Array) -> jax.Array:
    """The array on every device, where jax wants to be told (Explicit)."""
    sharding = _explicit(jax.typeof(x))
    return x if sharding is None else jax.sharding.reshard(x, sharding.update(spec=PartitionSpec()))


def split_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array with the sharding of another one of its shape, likewise."""
    sharding = _explicit(jax.typeof(like))
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def is_on_mesh(x: jax.Array) -> bool:
    """Whether the array is known to be on a mesh: by its type, or by `jax.set_mesh`."""
    return _explicit(jax.typeof(x)) is not None or not jax.sharding.get_abstract_mesh().empty


def _explicit(aval: Any) -> NamedSharding | None:
    """The sharding that is part of the type, on a mesh with Explicit axes."""
    sharding = aval.sharding
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    return None
