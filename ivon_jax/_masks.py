"""Which leaves get weight decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np

from ivon_jax._trees import Slots, without_nnx

PyTree = Any


def decay_flags(mask: PyTree | Callable[[PyTree], PyTree], mean: PyTree) -> np.ndarray:
    """One float32 0 or 1 for each owned leaf of `mean`, from a mask as in `optax.adamw`.

    Raises:
      TypeError: if a leaf of the mask is not a bool.
      ValueError: if the mask is one single bool, or does not fit the parameters.
    """
    if not jax.tree.leaves(mean):
        # No leaf is owned, or optax has put its placeholder in the place of the parameters.
        return np.zeros(0, np.float32)
    tree = without_nnx(mask(mean) if callable(mask) else mask)
    leaves = jax.tree.leaves(tree)
    if not callable(mask) and len(leaves) == 1 and leaves[0] is tree:
        raise ValueError(
            f"mask is a single value, {tree!r}. Under inject_hyperparams a function is taken for "
            "a schedule: pass static_args=('mask',). To treat all leaves alike leave mask out, or "
            "set weight_decay=0."
        )
    for leaf in leaves:
        if isinstance(leaf, jax.core.Tracer) or np.asarray(leaf).dtype != bool:
            raise TypeError(
                f"the leaves of mask must be Python bools; got {leaf!r}. Under inject_hyperparams "
                "pass static_args=('mask',)."
            )
    return np.array(_broadcast(tree, mean), np.float32)


def _broadcast(mask: PyTree, mean: PyTree) -> list[bool]:
    try:
        full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: bool(m), sub), mask, mean)
        return jax.tree.leaves(full)
    except ValueError:
        # Inside optax.masked one MaskedNode may stand for a subtree that the mask spells out.
        owned, _ = Slots(mean).split("mask", jax.tree.map(np.asarray, mask))
        return [bool(x) for x in owned]
