"""Validation of arguments, with messages that say what to pass instead."""

import math
import numbers
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.axes import varying_axes
from ivon_jax._core.trees import Owned, PyTree, place

Number = float | jax.Array
RATE_ROUNDING = 1e-4
"""By how much a schedule in float32 may miss its end at 0, of peaks up to 1,000."""


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    allow_inf: bool = False,
) -> Number:
    """A Python float for a concrete number in [low, high), or the traced number.

    With `open_low`, `low` itself is refused; with `allow_inf`, +inf is accepted. A traced number
    that turns out to be outside becomes NaN, which everything that uses it will show; by how much
    a schedule in float32 misses `low` is forgiven.
    """
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        _check_array(name, value)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = " For a schedule use optax.inject_hyperparams(ivon)." if callable(value) else ""
        raise TypeError(f"{name} must be a real number; got {value!r}.{hint}")
    if isinstance(value, jax.core.Tracer):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.float32)
        above_low = value > low if open_low else value >= low - 1e-6
        below_high = value <= high if allow_inf else value < high
        return jnp.where(above_low & below_high, jnp.clip(value, low, high), jnp.nan)
    number = float(cast(Any, value))
    below = number <= low if open_low else number < low
    with np.errstate(over="ignore", under="ignore"):
        stored = np.float32(number)  # the state holds float32
    below = below or (open_low and stored == 0)
    above = number >= high or math.isinf(stored)
    if math.isnan(number) or below or (above and not (allow_inf and number == math.inf)):
        left = f"> {low:g}" if open_low else f">= {low:g}" if low > -math.inf else "a number"
        right = " and finite in float32" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{name} must be {left}{'' if allow_inf else right}; got {number!r}.")
    return number


def is_concrete(*arrays: Any) -> bool:
    """Whether none is traced. Ask it of a result: under jit comparing constants is traced."""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def check_positive(name: str, value: Any) -> int:
    """A Python integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}.")
    return int(value)


def check_scalar(name: str, value: Any) -> None:
    """Refuses an array, traced or not, that would be broadcast against the parameters."""
    if jnp.shape(value):
        raise ValueError(f"{name} must be a scalar; got an array of shape {jnp.shape(value)}.")


def checked_rate(rate: Any) -> jax.Array:
    """A rate by a schedule; what is below 0 by more than rounding is refused, under jit NaN."""
    check_scalar("the learning rate that the schedule returned", rate)
    rate = jnp.asarray(rate)
    if not jnp.issubdtype(rate.dtype, jnp.floating):
        rate = rate.astype(jnp.float32)
    proper = ~(rate < -RATE_ROUNDING)
    if is_concrete(proper) and not bool(proper):
        raise ValueError(
            f"the schedule of the learning rate returned {float(rate):g}: it must be >= 0 (ivon "
            "subtracts its steps itself)."
        )
    return jnp.where(proper, jnp.maximum(rate, 0), jnp.nan)


def _check_array(name: str, value: Any) -> None:
    dtype = value.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number; got an array of dtype {dtype}.")
    if value.ndim:
        raise ValueError(f"{name} must be a scalar; got an array of shape {value.shape}.")
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise TypeError(
            f"{name} is {dtype}, in which 0.99999 is 1: pass "
            "optax.inject_hyperparams(ivon, hyperparam_dtype=jnp.float32), or a Python number."
        )


def check_momentum_dtype(dtype: Any) -> np.dtype | None:
    """A floating dtype, or None."""
    if dtype is None:
        return None
    if isinstance(dtype, jax.Array) or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"momentum_dtype must be a floating dtype; got {dtype!r}. Under inject_hyperparams "
            "a dtype is taken for a schedule: pass static_args=('momentum_dtype',)."
        )
    return jnp.dtype(dtype)


def check_exactly_one(noise: PyTree | None, hess: PyTree | None) -> None:
    """Refuses an update that is given neither noise nor curvature, or both."""
    if (noise is None) == (hess is None):
        got = "neither" if noise is None else "both"
        raise ValueError(
            f"ivon().update needs exactly one of noise= and hess=; got {got}. Pass the noise that "
            "sample_params(key, state) returned with the sample at which the gradient was taken, "
            "or the hess of mc_value_and_grad; for loops that cannot pass anything, wrap the "
            "optimizer in auto_sample(tx, key). If it is wrapped, a transformation in between "
            "drops extra arguments: put auto_sample inside that one."
        )


def check_precision(name: str, precision: PyTree) -> None:
    """Refuses concrete precisions that are negative or NaN."""
    for path, x in jax.tree_util.tree_leaves_with_path(precision):
        proper = jnp.all(x >= 0)
        if is_concrete(proper) and not bool(proper):
            raise ValueError(
                f"{name} must be >= 0 (+inf: fixed); at {place(path)} "
                f"the smallest is {float(jnp.min(x)):g}."
            )


def check_floating(own: Owned, name: str, leaves: list[jax.Array]) -> None:
    """Refuses owned leaves that are not real floating arrays, with their path."""
    for path, x in zip(own.paths, leaves, strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be real and floating; got {x.dtype} at {place(path)}.")


def check_axis_name(name: str, value: Any) -> None:
    """Refuses what cannot name mesh or mapped axes."""
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not names:
        raise ValueError(f"{name} is an empty tuple: name an axis, or pass None.")
    if value is not None and not all(isinstance(n, str) for n in names):
        raise TypeError(f"{name} must be the name of an axis, or a tuple of names; got {value!r}.")


def check_varying(grads: list[jax.Array], axis_name: str | tuple[str, ...] | None) -> None:
    """Refuses gradients that `shard_map` has already summed over the axis."""
    if axis_name is None:
        return
    for name in (axis_name,) if isinstance(axis_name, str) else axis_name:
        # Only where the axis index varies does jax track which arrays do.
        tracked = name in varying_axes(jax.typeof(jax.lax.axis_index(name)))
        if tracked and not all(name in varying_axes(jax.typeof(g)) for g in grads):
            raise ValueError(
                f"axis_name={name!r}, but the gradients do not vary over that axis: under "
                "shard_map the gradient with respect to a replicated sample is already summed, "
                "and a mean leaves it too large by the axis size. Draw one sample per device (fold "
                "the axis index into the key), or average the loss and leave axis_name out, as "
                "after mc_value_and_grad with this axis_name. With auto_sample mark its first "
                f"parameters with jax.lax.pcast(params, {name!r}, to='varying')."
            )
