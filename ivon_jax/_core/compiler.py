"""What is done for XLA: how results are split into kernels.

Nothing here changes a value. Each has a test that fails without it (tests/test_compiler.py).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def materialized(leaves: list[jax.Array]) -> list[jax.Array]:
    """The same arrays, which a CPU writes to memory once and then reads.

    XLA for CPUs has one output per kernel, and repeats cheap operations in every kernel that uses
    their result. Then no old value can be overwritten before the last kernel is done, and all are
    copied. XLA does not count a division as cheap; this one is by 1, which only the compiler's
    last stage can know, so that it costs nothing. Compilers for GPUs and TPUs write all results
    from one kernel and are given nothing of it.
    """
    if not leaves:
        return []

    def divided(leaves: list[jax.Array]) -> list[jax.Array]:
        types = {jax.typeof(x): x for x in leaves}
        ones = {kind: _hidden_ones(x) for kind, x in types.items()}
        return [jax.lax.div(x, ones[jax.typeof(x)]) for x in leaves]

    return jax.lax.platform_dependent(leaves, cpu=divided, default=lambda leaves: leaves)


def rounded(x: jax.Array) -> jax.Array:
    """The same array, as a sum sees it that is not merged with the product it comes from.

    A compiler contracts a·b + c to one operation in some kernels and not in others, so that the
    last bit would depend on the sharding, and differ between a sample and its noise.
    """
    return jnp.where(jnp.isfinite(x), x, x + x)


def kept_on_cpu(
    value: list[jax.Array], key_data: jax.Array, again: Callable[[jax.Array], list[jax.Array]]
) -> list[jax.Array]:
    """The value as it is on a CPU; on accelerators `again(key_data)`, which is the same.

    For random numbers that are used before and after a forward and backward pass: drawing twice
    saves their memory, but on a CPU takes longer than reading them, and memory is not short there.
    """
    return jax.lax.platform_dependent(
        value,
        key_data,
        cpu=lambda value, _: value,
        default=lambda _, key_data: again(jax.lax.optimization_barrier(key_data)),
    )


def variables(values: list[int], dtype: Any) -> list[jax.Array]:
    """The integers, as a CPU's compiler sees numbers that are not constants.

    Kernels that differ in a constant are compiled one by one, kernels that are the same once.
    """
    totals, last = [], jnp.zeros((), dtype)
    one = _hidden_ones(last)
    for step in np.diff(np.array(values, dtype), prepend=0):
        last = jax.lax.div(jax.lax.add(last, np.asarray(step, dtype)), one)
        totals.append(last)
    return totals


def _hidden_ones(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.ones_like(x))
