"""A basis for every matrix of parameters, in which the posterior's covariance is diagonal.

A leaf M (rows × columns) has the coordinates M' = Q_Lᵀ M Q_R (arXiv:2606.23357); `eigenbasis` says
how Q_L and Q_R are found. Leaves of higher rank are matrices of some leading axes against the
others, or a stack of such matrices. `()` in place of a matrix is the identity, which costs nothing:
vectors and scalars have no other.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivon_jax._core.axes import gathered, split_like
from ivon_jax._core.trees import Owned, get_field, place


class Sides(NamedTuple):
    """The orthogonal matrices of one leaf; `()` is the identity.

    Attributes:
      rows: Q_L (rows, rows), whose columns are the basis; of a stack of matrices (n, rows, rows).
      columns: Q_R (columns, columns), or (n, columns, columns).
    """

    rows: jax.Array | tuple[()] = ()
    columns: jax.Array | tuple[()] = ()


Basis = tuple[Sides, ...]
"""The sides of every leaf of a tree, in its order; `()` where no leaf has any."""


class EigenState(NamedTuple):
    """The basis in the state of `ivon`.

    Attributes:
      vectors: Q_L and Q_R of every leaf that `ivon` owns.
      factors: in the same form L and R, moving averages of G Gᵀ and Gᵀ G; `()` for a basis that is
        kept, which is that of the prior.
    """

    vectors: Basis
    factors: Basis = ()


def as_eigen_state(node: Any, number: int) -> EigenState | tuple[()]:
    """The state of so many leaves, from that or from the mappings that `nnx.state` makes of it."""
    if not isinstance(node, Mapping):
        return node
    vectors, factors = (get_field(node, field) for field in EigenState._fields)
    is_kept = bool(vectors) and not factors
    return EigenState(as_basis(vectors, number), () if is_kept else as_basis(factors, number))


def as_basis(node: Any, number: int) -> Basis:
    """The basis of so many leaves, from that or from a mapping, which leaves out what is empty."""
    if not isinstance(node, Mapping):
        return node
    return tuple(Sides(**dict(node.get(i, {}))) for i in range(number))


def in_coordinates(basis: Basis, leaves: list[jax.Array]) -> list[jax.Array]:
    """The coordinates Q_Lᵀ x Q_R of all leaves, which may have further axes in front."""
    if not leaves or not basis:
        return leaves
    return [_rotated(_inverse(sides), x) for sides, x in zip(basis, leaves, strict=True)]


def in_parameters(basis: Basis, leaves: list[jax.Array]) -> list[jax.Array]:
    """The inverse, Q_L x Q_Rᵀ."""
    if not leaves or not basis:
        return leaves
    return [_rotated(sides, x) for sides, x in zip(basis, leaves, strict=True)]


def are_turned(basis: Basis, leaves: list[jax.Array]) -> list[bool]:
    """Whether the coordinates of each leaf are others than its elements."""
    none = [False] * len(leaves)
    return [any(not isinstance(q, tuple) for q in sides) for sides in basis] or none


def check_sides(basis: Any, own: Owned) -> None:
    """Refuses a basis that does not fit the leaves of a posterior."""
    if not basis:
        return
    if isinstance(basis, Sides) or len(basis) != len(own.leaves):
        raise ValueError(
            f"a basis has one Sides(rows, columns) for each of the {len(own.leaves)} leaves of the "
            f"mean, in a tuple; got {len(basis)} entries of type {type(basis).__name__}."
        )
    for path, leaf, sides in zip(own.paths, own.leaves, basis, strict=True):
        if not _fit(sides, leaf.shape):
            shapes = [getattr(side, "shape", side) for side in sides]
            usual = [(n, n) for n in (splits(leaf.shape) or [(0, 0)])[-1]]
            raise ValueError(
                f"basis has rows and columns of shapes {shapes} at {place(path)}; a leaf of shape "
                f"{leaf.shape} needs {usual}, those of another split of its axes or of a stack, or "
                "() for the identity, all floating."
            )


def _fit(sides: Sides, shape: tuple[int, ...]) -> bool:
    """Whether these are sides of a leaf of this shape, as one matrix or as a stack of them."""
    present = [side for side in sides if not isinstance(side, tuple)]
    if not all(hasattr(q, "ndim") and jnp.issubdtype(q.dtype, jnp.floating) for q in present):
        return False
    stack, whole = ((), shape) if all(q.ndim == 2 for q in present) else (shape[:1], shape[1:])
    possible = splits(whole)
    if stack and isinstance(sides.rows, tuple):
        return False
    if len(present) < len(sides):  # the other side is known from the last axis alone
        possible = possible[-1:]
    fits = (
        all(
            isinstance(side, tuple) or side.shape == (*stack, size, size)
            for side, size in zip(sides, split, strict=True)
        )
        for split in possible
    )
    return not present or any(fits)


def diagonal_in(target: Basis, source: Basis, diagonals: list[jax.Array]) -> list[jax.Array]:
    """The diagonals in the target's coordinates of matrices that are diagonal in the source's.

    With W = Q_Tᵀ Q_S of each side such a diagonal D becomes (W_L ⊙ W_L) D (W_R ⊙ W_R)ᵀ. Variances
    of independent coordinates become those of others, and precisions likewise.
    """
    if not target and not source:
        return diagonals
    none = (Sides(),) * len(diagonals)
    pairs = zip(target or none, source or none, strict=True)
    squares = [Sides(*map(_squares, to, of)) for to, of in pairs]
    return list(map(_rotated, squares, diagonals))


def mixes(sides: Sides, flags: Any) -> Any:
    """Whether a side turns elements that are flagged together with others."""
    found = np.False_
    if all(isinstance(q, tuple) for q in sides):
        return found
    matrices = matrices_of(sides, flags)
    for axis, q in zip((-2, -1), sides, strict=True):
        if not isinstance(q, tuple):
            found |= (matrices.any(axis) != matrices.all(axis)).any()
    return found


def _squares(target: Any, source: Any) -> Any:
    """The squared elements of Q_Tᵀ Q_S."""
    if isinstance(source, tuple):
        return () if isinstance(target, tuple) else target.mT**2
    if isinstance(target, tuple):
        return source**2
    if target.shape != source.shape:
        raise ValueError(
            f"one basis has a matrix of shape {target.shape} where the other has {source.shape}: "
            "they are of other axes, or of stacked layers. Pass marginals(q) of one of them."
        )
    return product(target.mT, source) ** 2


def _inverse(sides: Sides) -> Sides:
    return Sides(*(() if isinstance(q, tuple) else q.mT for q in sides))


def splits(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows and columns of all matrices that an array of this shape can be."""
    if not math.prod(shape):
        return []
    return [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]


def _rotated(sides: Sides, x: jax.Array) -> jax.Array:
    """Q_L x Q_Rᵀ."""
    left, right = sides
    if isinstance(left, tuple) and isinstance(right, tuple):
        return x
    matrices = matrices_of(sides, gathered(x))
    if not isinstance(right, tuple):
        matrices = product(matrices, right.mT)
    if not isinstance(left, tuple):
        matrices = product(left, matrices)
    turned = matrices.reshape(x.shape)
    return split_like(turned, x)


def matrices_of(sides: Sides, x: Any) -> Any:
    """A leaf, or several of them in further axes in front, as matrices (…, rows, columns)."""
    left, right = sides
    columns = x.shape[-1] if isinstance(right, tuple) else right.shape[-1]
    if isinstance(left, tuple):
        return x.reshape(-1, columns)
    return x.reshape(-1, *left.shape[:-1], columns)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    # By default a TPU or GPU would multiply with fewer bits than float32 has.
    return jnp.matmul(a, b, precision="highest")
