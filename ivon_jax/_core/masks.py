"""Flags of the leaves, from masks as optax has them."""

from collections.abc import Callable

import jax
import jax.core
import numpy as np

from ivon_jax._core.trees import PyTree, is_masked, without_nnx


def leaf_flags(
    name: str,
    mask: PyTree | Callable[[PyTree], PyTree],
    mean: PyTree,
    params: PyTree,
    single: str,
    hint: str = "",
) -> list[bool]:
    """The flag of each owned leaf of `mean`, from a mask as in `optax.adamw`.

    Args:
      name: of the argument that the mask is.
      mask: a tree of bools, a prefix of `mean`, or a function of `params` that returns one.
      mean: a tree of leaves, with `MaskedNode` where none is owned.
      params: what the function is given.
      single: what to do instead of giving one value for all leaves.
      hint: where else a leaf that is no bool may come from.
    """
    if not jax.tree.leaves(mean):
        # No leaf is owned, or optax has put its placeholder in place of the parameters.
        return []
    tree = without_nnx(mask(params) if callable(mask) else mask)
    leaves = jax.tree.leaves(tree)
    if not callable(mask) and len(leaves) == 1 and leaves[0] is tree:
        raise ValueError(f"{name} is a single value, {tree!r}. {single}")
    for leaf in leaves:
        if isinstance(leaf, jax.core.Tracer) or np.shape(leaf) or np.asarray(leaf).dtype != bool:
            raise TypeError(f"the leaves of {name} must be Python bools; got {leaf!r}.{hint}")
    return _broadcast(name, tree, without_nnx(mean))


def _broadcast(name: str, mask: PyTree, mean: PyTree) -> list[bool]:
    """The flag of each leaf of `mean`, of which `mask` may be a prefix."""
    if is_masked(mean):
        return []
    masks, mask_def = jax.tree.flatten(mask, is_leaf=lambda x: x is not mask)
    if len(masks) == 1 and masks[0] is mask:
        return [bool(mask)] * len(jax.tree.leaves(mean))
    means, mean_def = jax.tree.flatten(mean, is_leaf=lambda x: x is not mean)
    if mask_def != mean_def:
        raise ValueError(
            f"{name} does not fit the parameters: {mask_def} is no prefix of {mean_def}"
        )
    pairs = zip(masks, means, strict=True)
    return [flag for pair in pairs for flag in _broadcast(name, *pair)]
