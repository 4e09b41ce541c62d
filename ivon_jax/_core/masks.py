"""Which leaves get weight decay."""

from collections.abc import Callable

import jax
import jax.core
import numpy as np

from ivon_jax._core.trees import PyTree, is_masked, without_nnx


def decay_flags(
    mask: PyTree | Callable[[PyTree], PyTree], mean: PyTree, params: PyTree
) -> np.ndarray:
    """One float32 0 or 1 for each owned leaf of `mean`, from a mask as in `optax.adamw`.

    Args:
      mask: a tree of bools, of which it may be a prefix, or a function of `params`.
      mean: the posterior mean, with `MaskedNode` where a leaf is not owned.
      params: what a callable mask is given.

    Raises:
      TypeError: if a leaf of the mask is not a bool.
      ValueError: if the mask is one single bool, or does not fit the parameters.
    """
    if not jax.tree.leaves(mean):
        # No leaf is owned, or optax has put its placeholder in the place of the parameters.
        return np.zeros(0, np.float32)
    tree = without_nnx(mask(params) if callable(mask) else mask)
    leaves = jax.tree.leaves(tree)
    if not callable(mask) and len(leaves) == 1 and leaves[0] is tree:
        raise ValueError(
            f"mask is a single value, {tree!r}. Under inject_hyperparams a function is taken for "
            "a schedule: pass static_args=('mask',). To treat all leaves alike leave mask out, or "
            "set weight_decay=0."
        )
    for leaf in leaves:
        if isinstance(leaf, jax.core.Tracer) or np.shape(leaf) or np.asarray(leaf).dtype != bool:
            raise TypeError(
                f"the leaves of mask must be Python bools; got {leaf!r}. Under inject_hyperparams "
                "pass static_args=('mask',)."
            )
    return np.array(_broadcast(tree, mean), np.float32)


def _broadcast(mask: PyTree, mean: PyTree) -> list[bool]:
    if is_masked(mean):
        return []
    masks, mask_def = jax.tree.flatten(mask, is_leaf=lambda x: x is not mask)
    if len(masks) == 1 and masks[0] is mask:
        return [bool(mask)] * len(jax.tree.leaves(mean))
    means, mean_def = jax.tree.flatten(mean, is_leaf=lambda x: x is not mean)
    if mask_def != mean_def:
        raise ValueError(f"mask does not fit the parameters: {mask_def} is no prefix of {mean_def}")
    return [flag for pair in zip(masks, means, strict=True) for flag in _broadcast(*pair)]
