"""Validation of numbers, with messages that say what to pass instead."""

import math
import numbers
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Number = float | jax.Array


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    allow_inf: bool = False,
) -> Number:
    """A Python float for a concrete number in [low, high), or the traced number as it is.

    Args:
      name: the argument's name, for the message.
      value: a Python or NumPy number, or a scalar array, concrete or traced.
      low: smallest value.
      high: bound that must not be reached.
      open_low: whether `low` itself is refused.
      allow_inf: whether +inf is accepted.

    Raises:
      TypeError: if it is not a real number, or an array with less than float32 precision.
      ValueError: if it is NaN or out of range.
    """
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        _check_array(name, value)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number; got {value!r}.{_schedule_hint(value)}")
    if isinstance(value, jax.core.Tracer):
        return value
    number = float(cast(Any, value))
    below = number <= low if open_low else number < low
    if math.isnan(number) or below or (number >= high and not (allow_inf and number == math.inf)):
        left = f"> {low:g}" if open_low else f">= {low:g}"
        right = "" if allow_inf else " and finite" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{name} must be {left}{right}; got {number!r}.")
    return number


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


def _schedule_hint(value: Any) -> str:
    if not callable(value):
        return ""
    return " Only learning_rate may be a schedule; for others use optax.inject_hyperparams(ivon)."
