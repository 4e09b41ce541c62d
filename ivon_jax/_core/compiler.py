"""What XLA may and may not merge into one kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def computed_once(leaves: list[jax.Array]) -> list[jax.Array]:
    """The same arrays, bit for bit, which a CPU writes once and then reads.

    XLA for CPUs has one output per kernel, and repeats cheap operations in every kernel that uses
    their result. Then no old value can be overwritten before the last kernel is done, and all are
    copied. A division is not cheap in its eyes. This one is by 1, which only the last stage of
    the compiler can know, so that it costs nothing. Compilers for GPUs and TPUs write all results
    from one kernel and see nothing of it.
    """
    if not leaves:
        return []

    def divided(leaves: list[jax.Array]) -> list[jax.Array]:
        return [_over_one(x) for x in leaves]

    return jax.lax.platform_dependent(leaves, cpu=divided, default=lambda leaves: leaves)


def running_sums(first: jax.Array, steps: list[int]) -> list[jax.Array]:
    """Integers: `first`, and after each step its sum with all steps so far.

    They are not constants to a CPU's compiler, for which kernels that differ in a constant are
    different ones; kernels that are the same it compiles once.
    """

    def sums(first: jax.Array, computed: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
        totals = [computed(first)]
        for step in steps:
            totals.append(computed(totals[-1] + jnp.asarray(step, first.dtype)))
        return totals

    return jax.lax.platform_dependent(
        first,
        cpu=lambda first: sums(first, _over_one),
        default=lambda first: sums(first, lambda x: x),
    )


def rounded(x: jax.Array) -> jax.Array:
    """The same array as a sum sees it that is not merged with the product it comes from.

    A compiler contracts a·b + c to one operation in some kernels and not in others, so that the
    last bit would depend on the sharding, and differ between a sample and its noise.
    """
    return jnp.where(jnp.isfinite(x), x, x + x)


def _over_one(x: jax.Array) -> jax.Array:
    return jax.lax.div(x, jax.lax.optimization_barrier(jnp.ones_like(x)))
