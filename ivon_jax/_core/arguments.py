"""The positional arguments of a loss that each Monte Carlo sample is given."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ivon_jax._core.sampling import key_words
from ivon_jax._core.trees import PyTree


def batch_slices(
    args: tuple[Any, ...],
    num_samples: int,
    split_batch: bool,
    batch_argnums: tuple[int, ...] | None,
    rng_argnums: tuple[int, ...],
) -> dict[int, Any]:
    """The arguments of `fun` of which each sample gets a slice, with the samples on axis 0."""
    if not split_batch:
        return {}
    if batch_argnums is None:
        batch_argnums = tuple(i for i in range(1, len(args) + 1) if i not in rng_argnums)
    return {i: _split(i, args[i - 1], num_samples) for i in batch_argnums}


def check_keys(args: tuple[Any, ...], rng_argnums: tuple[int, ...]) -> None:
    """Refuses what is named in `rng_argnums` and is not a key."""
    for i in rng_argnums:
        try:
            key_words(args[i - 1])
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"argument {i} of fun is named in rng_argnums but is not a single PRNG key "
                "(arguments are counted as in jax.grad: the parameters are argument 0)."
            ) from error


def arguments(
    args: tuple[Any, ...], sliced: dict[int, Any], rng_argnums: tuple[int, ...], index: jax.Array
) -> list[Any]:
    """The positional arguments of `fun` for the sample of this index."""
    new = list(args)
    for i, x in sliced.items():
        new[i - 1] = x
    for i in rng_argnums:
        new[i - 1] = jax.random.fold_in(args[i - 1], index)
    return new


def _split(argnum: int, arg: PyTree, num_samples: int) -> PyTree:
    def split(path: Any, x: Any) -> jax.Array:
        shape = jnp.shape(x)
        if not shape or shape[0] % num_samples:
            raise ValueError(
                f"split_batch: argument {argnum} of fun has shape {shape}"
                f"{' at ' + jax.tree_util.keystr(path) if path else ''}, whose leading axis cannot "
                f"be split into {num_samples} equal slices. Name the arguments to split in "
                "batch_argnums."
            )
        return jnp.reshape(x, (num_samples, shape[0] // num_samples, *shape[1:]))

    return jax.tree_util.tree_map_with_path(split, arg)


def argnums(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """The option `name` as a tuple of argument numbers."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(i, int) and i >= 1 for i in numbers):
        raise ValueError(
            f"{name} counts the arguments of fun as in jax.grad, where the parameters are "
            f"argument 0; expected integers >= 1, got {value!r}."
        )
    return numbers


def check_argnums(num_args: int, numbers: tuple[int, ...]) -> None:
    """Refuses numbers of arguments that were not given."""
    for i in numbers:
        if i > num_args:
            raise ValueError(
                f"rng_argnums or batch_argnums names argument {i}, but fun was called with the "
                f"parameters and {num_args} further arguments."
            )
