"""What is done for XLA: how results are split into kernels, in four verbs.

Nothing here changes a value. Each has a test that fails without it (tests/test_compiler.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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
        ones = {jax.typeof(x): _hidden_ones(x) for x in leaves}  # one for all leaves of a shape
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


def running_sums(first: jax.Array, steps: list[int]) -> list[jax.Array]:
    """Integers: `first`, and after each step its sum with all steps so far.

    To a CPU's compiler they are not constants: kernels that differ in a constant are compiled one
    by one, kernels that are the same once.
    """

    def sums(first: jax.Array, opaque: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
        totals = [opaque(first)]
        for step in steps:
            totals.append(opaque(totals[-1] + jnp.asarray(step, first.dtype)))
        return totals

    return jax.lax.platform_dependent(
        first,
        cpu=lambda first: sums(first, lambda x: jax.lax.div(x, _hidden_ones(x))),
        default=lambda first: sums(first, lambda x: x),
    )


def _hidden_ones(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.ones_like(x))
