"""Lining up gradients, noise and parameters with the leaves that IVON owns."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any


def is_masked(node: Any) -> bool:
    """Whether a node stands for a leaf that IVON does not own."""
    return isinstance(node, optax.MaskedNode)


# The classes of flax.nnx are recognised by their methods: flax is not a dependency.
def _is_nnx_variable(node: Any) -> bool:
    return hasattr(node, "get_value") and hasattr(node, "get_metadata")


def _is_nnx_state(node: Any) -> bool:
    return isinstance(node, Mapping) and hasattr(node, "flat_state")


def without_nnx(tree: PyTree) -> PyTree:
    """The tree with `flax.nnx` Variables replaced by their arrays and States by dicts."""

    def unwrap(node: Any) -> Any:
        if _is_nnx_variable(node):
            return node.get_value()
        if _is_nnx_state(node):
            return {key: without_nnx(child) for key, child in node.items()}
        return node

    return jax.tree.map(unwrap, tree, is_leaf=lambda x: _is_nnx_variable(x) or _is_nnx_state(x))


def has_fields(node: Any, kind: Any) -> bool:
    """Whether a node is a named tuple of that kind, or the mapping that `nnx.state` makes of it."""
    required = [field for field in kind._fields if field not in kind._field_defaults]
    is_mapping = isinstance(node, Mapping) and all(field in node for field in required)
    return isinstance(node, kind) or is_mapping


def get_field(node: Any, field: str) -> Any:
    """A field of a named tuple, or of the mapping that `nnx.state` makes of it."""
    return node.get(field, ()) if isinstance(node, Mapping) else getattr(node, field)


def set_fields(node: Any, **fields: Any) -> Any:
    """The node with those of the fields replaced that it has."""
    if isinstance(node, Mapping):
        new = {key: fields.get(key, child) for key, child in node.items()}
        return unflatten_like(node, jax.tree.leaves(new))
    return node._replace(**fields)


def unflatten_like(tree: PyTree, leaves: list[Any]) -> PyTree:
    """A tree of this structure with other leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def copy_array(x: Any) -> jax.Array:
    """A new buffer, so that donating one of the two leaves the other alive."""
    return jnp.array(x, copy=True)


def also_abstract(init: Callable[[PyTree], Any]) -> Callable[[PyTree], Any]:
    """An `init` that gives the abstract state of abstract parameters (`jax.ShapeDtypeStruct`).

    Restoring a checkpoint and sharded initialization start from it.
    """

    @functools.wraps(init)
    def initial_state(params: PyTree) -> Any:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            return jax.eval_shape(init, params)
        return init(params)

    return initial_state


def wide_dtype(dtype: Any) -> np.dtype:
    """The dtype of statistics of a floating `dtype`: at least float32."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def wide_zeros(leaf: Any) -> jax.Array:
    """Zeros in the shape of a leaf that IVON does not own, in the dtype of statistics."""
    dtype = jnp.result_type(leaf)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.zeros(jnp.shape(leaf), wide_dtype(dtype) if floating else jnp.float32)


def cast(leaf: jax.Array, dtype: Any) -> jax.Array:
    """The leaf in this dtype; a PRNG key, which has no `astype`, has it already."""
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def as_numbers(leaf: jax.Array, dtype: Any) -> jax.Array:
    """The leaf in this dtype; zeros for a PRNG key, which is no number and always fixed."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, dtype)
    return leaf.astype(dtype)


def difference(mean: jax.Array, params: jax.Array, dtype: Any) -> jax.Array:
    """mean − params, so that `params + difference` rounds to `mean` in the params' dtype."""
    target = mean.astype(params.dtype).astype(mean.dtype)
    return (target - params.astype(mean.dtype)).astype(dtype)


def place(path: Any) -> str:
    """How a message names the place of a leaf, from its key path or that as a string."""
    path = path if isinstance(path, str) else jax.tree_util.keystr(path)
    return path or "the root"


class Owned:
    """Which leaves of the parameters are IVON's, from a tree of the state such as its mean.

    It holds arrays where IVON owns the leaf, and `MaskedNode` elsewhere, which may stand for a
    whole subtree: `optax.masked` and `optax.partition` accept prefixes.
    """

    def __init__(self, mean: PyTree):
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(
            without_nnx(mean), is_leaf=is_masked
        )
        self._slots = [(jax.tree_util.keystr(path), x) for path, x in flat]
        self.paths = [path for path, x in self._slots if not is_masked(x)]
        owned = [x for _, x in self._slots if not is_masked(x)]
        self.leaves = [jnp.asarray(x) if isinstance(x, float) else x for x in owned]

    def split(self, name: str, tree: PyTree) -> tuple[list[jax.Array], list[PyTree]]:
        """The owned leaves of `tree`, and its subtrees at the other positions."""
        pure = without_nnx(tree)
        try:
            subtrees = self.treedef.flatten_up_to(pure)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(self._mismatch(name, pure)) from error
        owned, others = [], []
        for (path, slot), x in zip(self._slots, subtrees, strict=True):
            if is_masked(slot):
                others.append(x)
            elif isinstance(x, float):
                owned.append(jnp.asarray(x))
            elif x is None or is_masked(x) or not hasattr(x, "dtype"):
                raise ValueError(
                    f"{name} holds {type(x).__name__} at {place(path)}, where the state of ivon() "
                    f"holds an array of shape {slot.shape}. Leaves that get no gradient belong "
                    "outside ivon(): call init with the trained part only, as in "
                    "tx.init(equinox.filter(model, equinox.is_inexact_array)), or use "
                    "optax.partition."
                )
            else:
                owned.append(x)
        return owned, others

    def checked(self, name: str, tree: PyTree) -> list[jax.Array]:
        """The owned leaves of `tree`, which must have the shapes of the mean's."""
        owned, _ = self.split(name, tree)
        self.check_shapes(name, owned)
        return owned

    def exactly(self, name: str, tree: PyTree) -> list[jax.Array]:
        """As `checked`, of a tree that must not hold anything else."""
        owned, others = self.split(name, tree)
        self.check_shapes(name, owned)
        free = [path for path, slot in self._slots if is_masked(slot)]
        for path, x in zip(free, others, strict=True):
            if jax.tree.leaves(x):
                raise ValueError(
                    f"{name} has leaves at {place(path)}, where the mean that it has to fit has "
                    "none: give all of them the same leaves."
                )
        return owned

    def join(self, owned: list[Any], others: list[PyTree] | None = None) -> PyTree:
        """The inverse of `split`; without `others` their positions hold `MaskedNode`."""
        left = iter(owned)
        right = iter(others if others is not None else [x for _, x in self._slots if is_masked(x)])
        return self.treedef.unflatten(
            next(right if is_masked(slot) else left) for _, slot in self._slots
        )

    def fill(self, owned: list[Any], params: PyTree, other: Callable[[Any], Any]) -> PyTree:
        """A tree like `params`: `owned` where IVON owns the leaf, `other(leaf)` elsewhere."""
        leaves, others = self.split("params", params)
        self.check_shapes("params", leaves)
        pure = self.join(owned, [jax.tree.map(other, x) for x in others])
        return unflatten_like(params, jax.tree.leaves(pure))

    def check_shapes(self, name: str, leaves: list[jax.Array]) -> None:
        """Raises if a leaf does not have exactly the shape of the mean's."""
        for path, x, m in zip(self.paths, leaves, self.leaves, strict=True):
            if x.shape != m.shape:
                raise ValueError(
                    f"{name} has shape {x.shape} at {place(path)}, but the state of ivon() holds "
                    f"a leaf of shape {m.shape} there."
                )

    def num_samples(self, **trees: list[jax.Array]) -> int | None:
        """The common length S of a leading Monte Carlo axis, or None if no leaf has one."""
        found: list[tuple[int | None, str]] = []
        for name, leaves in trees.items():
            for path, x, m in zip(self.paths, leaves, self.leaves, strict=True):
                size = None if x.shape == m.shape else x.shape[0] if x.ndim else 0
                if size is not None and (x.shape[1:] != m.shape or size == 0):
                    raise ValueError(
                        f"{name} has shape {x.shape} at {place(path)}; expected {m.shape}, or "
                        f"({', '.join(['S', *map(str, m.shape)])}) with S >= 1 Monte Carlo samples "
                        "on the first axis."
                    )
                samples = "no sample axis" if size is None else f"{size} samples"
                found.append((size, f"{name} has {samples} at {place(path)}"))
        for size, said in found:
            if size != found[0][0]:
                raise ValueError(
                    f"{said}, but {found[0][1]}. Every leaf of both needs the same number of "
                    "samples: the product with the noise is formed per sample and then averaged "
                    "(do not average the gradients before update)."
                )
        return found[0][0] if found else None

    def _mismatch(self, name: str, tree: PyTree) -> str:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        have = [jax.tree_util.keystr(path) for path, _ in leaves]
        missing = [path for path in self.paths if path not in have]
        known = tuple(path for path, _ in self._slots)
        extra = [path for path in have if not path.startswith(known)]
        said = f"{name} does not have the structure of the parameters that ivon() was given: "
        kinds = (("it lacks", missing), ("it has an unknown", extra))
        parts = [f"{what} {place(paths[0])}" for what, paths in kinds if paths]
        if parts:
            return said + " and ".join(parts) + "."
        return said + f"expected {self.treedef}, got {jax.tree.structure(tree)}."
