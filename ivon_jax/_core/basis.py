"""An eigenbasis for every matrix of parameters, in which the posterior's covariance is diagonal.

A leaf M (rows × columns) has the coordinates M' = Q_Lᵀ M Q_R, with Q_L and Q_R the eigenvectors of
moving averages of G Gᵀ and Gᵀ G over the gradients G (arXiv:2606.23357; the basis is that of SOAP,
arXiv:2409.11321). Leaves of higher rank are matrices of some leading axes against the others, or a
stack of such matrices. `()` in place of a matrix is the identity, which costs nothing: vectors and
scalars have no other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import gathered, split_like
from ivon_jax._core.checks import Number, check_number, check_positive
from ivon_jax._core.masks import leaf_flags
from ivon_jax._core.trees import Owned, PyTree, get_field, place, unflatten_like


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
      factors: in the same form L and R, moving averages of G Gᵀ and Gᵀ G.
    """

    vectors: Basis
    factors: Basis


@dataclass(frozen=True)
class Eigenbasis:
    """How `ivon(..., basis=Eigenbasis())` finds the eigenbasis of its posterior.

    The recursion of `ivon` is unchanged and runs in the coordinates M' = Q_Lᵀ M Q_R. After the
    first step the eigenvectors are computed exactly, then every `update_every` steps by one power
    iteration, sorted by their estimated eigenvalues. Momentum turns with the basis; h does not, its
    entries follow the vectors when these are sorted.

    Attributes:
      update_every: steps between two turns of the basis.
      decay: of the moving averages L and R.
      max_dim: axes that are longer, such as a vocabulary, keep the identity.
      hess_clip: bound c > 1 on each step of h: ĥ is clipped to ±c(h+δ); none by default.
      stacked: leaves whose first axis counts layers, as `nn.scan` makes them, each with a basis of
        its own: a tree of bools (or a prefix of it), or a function of the parameters that returns
        one, such as `{"blocks": True, "head": False}`.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from ivon_jax import Eigenbasis, ivon
      >>> state = ivon(0.1, ess=100, basis=Eigenbasis()).init({"kernel": jnp.ones((4, 3))})
      >>> (sides,) = state.basis.vectors
      >>> sides.rows.shape, sides.columns.shape
      ((4, 4), (3, 3))
    """

    update_every: int = 10
    decay: float = 0.95
    max_dim: int = 8192
    hess_clip: float = math.inf
    stacked: PyTree | Callable[[PyTree], PyTree] | None = None

    def __post_init__(self) -> None:
        checked = {
            "update_every": check_positive("update_every", self.update_every),
            "max_dim": check_positive("max_dim", self.max_dim),
            "decay": check_number("decay", self.decay, low=0.0, high=1.0),
            "hess_clip": check_number(
                "hess_clip", self.hess_clip, low=1.0, open_low=True, allow_inf=True
            ),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, mean: PyTree, params: PyTree) -> EigenState:
        """The identity, as matrices where a basis will be, and factors of zero."""
        leaves = Owned(mean).leaves
        if not leaves:
            # `optax.tree_map_params` looks at the state of no parameters: there a leaf stands for
            # whatever the real state has in its place, and a tuple only for one as long.
            one, other = jnp.zeros([]), jnp.zeros([])  # two, for donation
            return EigenState(one, other)  # pyright: ignore[reportArgumentType]

        stacked = [False] * len(leaves)
        if self.stacked is not None:
            stacked = leaf_flags("stacked", self.stacked, mean, params, "stack them yourself")

        def basis(make: Callable[..., jax.Array]) -> Basis:
            def side(stack: tuple[int, ...], size: int, dtype: Any) -> jax.Array | tuple[()]:
                if not self._turns(size):
                    return ()
                return jnp.broadcast_to(make(size, dtype), (*stack, size, size))

            splits = map(self._split, (x.shape for x in leaves), stacked)
            return tuple(
                Sides(*(side(stack, size, x.dtype) for size in sizes))
                for x, (stack, *sizes) in zip(leaves, splits, strict=True)
            )

        eye, zeros = lambda n, t: jnp.eye(n, dtype=t), lambda n, t: jnp.zeros((n, n), t)
        return EigenState(basis(eye), basis(zeros))

    def _turns(self, size: int) -> bool:
        return 1 < size <= self.max_dim

    def _split(self, shape: tuple[int, ...], is_stacked: bool) -> tuple[tuple[int, ...], int, int]:
        """The axis of the stack, if any, and the rows and columns of the others as a matrix.

        The smallest one of which both sides turn: a kernel (features, heads, size) of attention is
        features × (heads · size), one of a convolution (height · width · in) × out.
        """
        stack, shape = (shape[:1], shape[1:]) if is_stacked else ((), shape)
        splits = _splits(shape) if math.prod(stack) else []
        turned = [split for split in splits if all(map(self._turns, split))]
        if turned:
            return stack, *min(reversed(turned), key=sum)
        if not splits or (is_stacked and not self._turns(splits[-1][0])):
            return stack, 0, 0
        return stack, *splits[-1]

    def turned(
        self, state: Any, count: Any, grads: list[jax.Array], *coordinates: PyTree
    ) -> tuple[EigenState, list[PyTree]]:
        """The state after a step, and what lives in its coordinates: momentum, then h.

        Args:
          state: the `EigenState` before the step.
          count: number of steps taken, with this one.
          grads: ĝ in the coordinates of the parameters.
          *coordinates: trees of momentum and of h.
        """
        if not grads:
            return state, list(coordinates)
        factors = tuple(map(partial(_moved_factors, self.decay), state.factors, grads))
        momentum, hess = (jax.tree.leaves(tree) for tree in coordinates)
        cases = [
            lambda *kept: kept,
            partial(_turned, _exact, factors),
            partial(_turned, _iterated, factors),
        ]
        case = jnp.where(count == 1, 1, jnp.where(count % self.update_every == 0, 2, 0))
        vectors, *turned = jax.lax.switch(case, cases, state.vectors, momentum, hess)
        return EigenState(vectors, factors), list(map(unflatten_like, coordinates, turned))


def as_eigen_state(node: Any, number: int) -> EigenState | tuple[()]:
    """The state of so many leaves, from that or from the mappings that `nnx.state` makes of it."""
    if not isinstance(node, Mapping):
        return node
    bases = (get_field(node, field) for field in EigenState._fields)
    # They leave out what is empty.
    sides = [[basis.get(i, {}) for i in range(number)] for basis in bases]
    return EigenState(*(tuple(Sides(**dict(x)) for x in basis) for basis in sides))


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
            shapes = [() if isinstance(side, tuple) else side.shape for side in sides]
            usual = [(n, n) for n in (_splits(leaf.shape) or [(0, 0)])[-1]]
            raise ValueError(
                f"basis has rows and columns of shapes {shapes} at {place(path)}; a leaf of shape "
                f"{leaf.shape} needs {usual}, those of another split of its axes or of a stack, or "
                "() for the identity."
            )


def _fit(sides: Sides, shape: tuple[int, ...]) -> bool:
    """Whether these are sides of a leaf of this shape, as one matrix or as a stack of them."""
    present = [side for side in sides if not isinstance(side, tuple)]
    stack, whole = ((), shape) if all(q.ndim == 2 for q in present) else (shape[:1], shape[1:])
    splits = _splits(whole)
    if len(present) < len(sides):  # the other side is known from the last axis alone
        splits = splits[-1:]
    fits = (
        all(
            isinstance(side, tuple) or side.shape == (*stack, size, size)
            for side, size in zip(sides, split, strict=True)
        )
        for split in splits
    )
    return not present or any(fits)


def variances_in(target: Basis, source: Basis, variances: list[jax.Array]) -> list[jax.Array]:
    """The variances of coordinates of the target, from those of independent ones of the source.

    With W = Q_Tᵀ Q_S of each side they are (W_L ⊙ W_L) V (W_R ⊙ W_R)ᵀ.
    """
    if not target and not source:
        return variances
    none = (Sides(),) * len(variances)
    pairs = zip(target or none, source or none, strict=True)
    squares = [Sides(*map(_squares, to, of)) for to, of in pairs]
    return list(map(_rotated, squares, variances))


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
    return _product(target.mT, source) ** 2


def _inverse(sides: Sides) -> Sides:
    return Sides(*(() if isinstance(q, tuple) else q.mT for q in sides))


def _splits(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows and columns of all matrices that an array of this shape can be."""
    if not math.prod(shape):
        return []
    return [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]


def _rotated(sides: Sides, x: jax.Array) -> jax.Array:
    """Q_L x Q_Rᵀ."""
    left, right = sides
    if isinstance(left, tuple) and isinstance(right, tuple):
        return x
    matrices = _matrices(sides, gathered(x))
    if not isinstance(right, tuple):
        matrices = _product(matrices, right.mT)
    if not isinstance(left, tuple):
        matrices = _product(left, matrices)
    turned = matrices.reshape(x.shape)
    return split_like(turned, x)


def _matrices(sides: Sides, x: jax.Array) -> jax.Array:
    """A leaf, or several of them in further axes in front, as matrices (…, rows, columns)."""
    left, right = sides
    columns = x.shape[-1] if isinstance(right, tuple) else right.shape[-1]
    if isinstance(left, tuple):
        return x.reshape(-1, columns)
    return x.reshape(-1, *left.shape[:-1], columns)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # By default a TPU or GPU would multiply with fewer bits than float32 has.
    return jnp.matmul(a, b, precision="highest")


def _moved_factors(decay: Number, factors: Sides, grad: jax.Array) -> Sides:
    """L and R, moved towards G Gᵀ and Gᵀ G, unless these overflow."""
    left, right = factors
    if isinstance(left, tuple) and isinstance(right, tuple):
        return factors
    grad = _matrices(factors, gathered(grad))
    if not isinstance(left, tuple):
        grad = grad[0]

    def moved(old: Any, a: jax.Array, b: jax.Array) -> Any:
        if isinstance(old, tuple):
            return old
        new = decay * old + (1 - decay) * _product(a, b)
        return jnp.where(jnp.all(jnp.isfinite(new)), new, old)

    return Sides(moved(left, grad, grad.mT), moved(right, grad.mT, grad))


def _turned(
    find: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
    factors: Basis,
    vectors: Basis,
    momentum: list[jax.Array],
    hess: list[jax.Array],
) -> tuple[Basis, list[jax.Array], list[jax.Array]]:
    """New eigenvectors, momentum in their coordinates, and h, whose entries follow theirs."""
    found, new_hess = [], []
    for old, factor, h in zip(vectors, factors, hess, strict=True):
        (left, rows), (right, columns) = (
            ((), None) if isinstance(q, tuple) else find(q, f)
            for q, f in zip(old, factor, strict=True)
        )
        found.append(Sides(left, right))
        new_hess.append(_sorted(old, h, rows, columns))
    turned = in_coordinates(tuple(found), in_parameters(vectors, momentum))
    turned = [g.astype(old.dtype) for g, old in zip(turned, momentum, strict=True)]
    return tuple(found), turned, new_hess


def _sorted(
    sides: Sides, h: jax.Array, rows: jax.Array | None, columns: jax.Array | None
) -> jax.Array:
    if rows is None and columns is None:
        return h
    matrices = _matrices(sides, gathered(h))
    if columns is not None:
        order = columns[..., None, :]
        order = order.reshape((1,) * (matrices.ndim - order.ndim) + order.shape)
        matrices = jnp.take_along_axis(matrices, order, axis=-1)
    if rows is not None:
        matrices = jnp.take_along_axis(matrices, rows[None, ..., None], axis=-2)
    return split_like(matrices.reshape(h.shape), h)


def _exact(old: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors by falling eigenvalues; h keeps its order, for the identity has none."""
    order = jnp.arange(old.shape[-1], dtype=jnp.int32)
    return jnp.linalg.eigh(factor)[1][..., ::-1], jnp.broadcast_to(order, old.shape[:-1])


def _iterated(old: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by a power iteration from the old ones, which are sorted first."""
    powered = _product(factor, old)
    order = jnp.argsort(-jnp.sum(old * powered, axis=-2)).astype(jnp.int32)
    q, r = jnp.linalg.qr(jnp.take_along_axis(powered, order[..., None, :], axis=-1))
    # No vector turns round, which would mirror the noise.
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return q * signs[..., None, :], order
