"""The eigenbasis of the gradients' second moments: how it is found, and followed as it turns.

Q_L and Q_R are the eigenvectors of moving averages of G Gᵀ and Gᵀ G over the gradients G, found as
in SOAP (arXiv:2409.11321): exactly after the first step, then by power iterations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import gathered, split_like, varying_axes, varying_over
from ivon_jax._core.basis import (
    Basis,
    EigenState,
    Sides,
    in_coordinates,
    in_parameters,
    matrices_of,
    product,
    splits,
)
from ivon_jax._core.checks import Number, check_number, check_positive
from ivon_jax._core.masks import leaf_flags
from ivon_jax._core.trees import Owned, PyTree, unflatten_like

_SINGLE = (
    'It must be a tree of bools such as {"blocks": True, "head": False}, or a function of the '
    "parameters that returns one; where the parameters are a single stack: lambda params: True."
)


@dataclass(frozen=True)
class Eigenbasis:
    """How `ivon(..., basis=Eigenbasis())` finds the eigenbasis of its posterior.

    The recursion of `ivon` is unchanged and runs in the coordinates M' = Q_Lᵀ M Q_R. After the
    first step the eigenvectors are computed exactly, then every `update_every` steps by one power
    iteration, sorted by their estimated eigenvalues. Momentum is turned into the new coordinates, h
    is not: each of its entries stays with its vector, also where sorting moves that. The
    state fixes which axes turn; all but `max_dim` and `stacked` may change in mid-run.

    Attributes:
      update_every: steps between two turns of the basis.
      decay: of the moving averages L and R.
      max_dim: axes that are longer, such as a vocabulary, keep the identity.
      hess_clip: bound c > 1 on each step of h: ĥ is clipped to ±c(h+δ); none by default.
      stacked: leaves whose first axis counts layers, as `nn.scan` makes them, each with a basis of
        its own: a tree of bools (or a prefix of it), or a function of the parameters that returns
        one, such as `{"blocks": True, "head": False}`. Otherwise that axis is turned like others,
        which mixes the layers. Of such leaves those with two axes, like biases, are not turned, nor
        those with more rows than `max_dim`. A function makes an `Eigenbasis` that is hashable.

    Raises:
      ValueError: if a number is out of range, or `update_every` or `max_dim` no integer; at `init`
        if `stacked` does not fit the parameters.
      TypeError: if `decay` or `hess_clip` is no number; at `init` if `stacked` has other leaves
        than bools.

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
            # `optax.tree_map_params` looks at the state of no parameters: there an array stands in
            # for whatever the real state has in its place, and a tuple only for one as long.
            one, other = jnp.zeros([]), jnp.zeros([])  # two, for donation
            return EigenState(one, other)  # pyright: ignore[reportArgumentType]

        stacked = [False] * len(leaves)
        if self.stacked is not None:
            stacked = leaf_flags("stacked", self.stacked, mean, params, _SINGLE)

        def basis(make: Callable[..., jax.Array]) -> Basis:
            def side(x: jax.Array, stack: tuple[int, ...], size: int) -> jax.Array | tuple[()]:
                if not self._turns(size):
                    return ()
                whole = jnp.broadcast_to(make(size, x.dtype), (*stack, size, size))
                return varying_over(whole, varying_axes(jax.typeof(x)))

            sizes_of = map(self._split, (x.shape for x in leaves), stacked)
            return tuple(
                Sides(*(side(x, stack, size) for size in sizes))
                for x, (stack, *sizes) in zip(leaves, sizes_of, strict=True)
            )

        eye, zeros = lambda n, t: jnp.eye(n, dtype=t), lambda n, t: jnp.zeros((n, n), t)
        return EigenState(basis(eye), basis(zeros))

    def _turns(self, size: int) -> bool:
        return 1 < size <= self.max_dim

    def _split(self, shape: tuple[int, ...], is_stacked: bool) -> tuple[tuple[int, ...], int, int]:
        """The axis of the stack, if any, and the rows and columns of the others as a matrix.

        The smallest one of which both sides turn. That is features × (heads · size) for a kernel
        (features, heads, size) of attention where features > size, and (height · width · in) × out
        for one of a convolution, but (height · width) × (in · out) where out < height · width.
        """
        stack, shape = (shape[:1], shape[1:]) if is_stacked else ((), shape)
        possible = splits(shape) if math.prod(stack) else []
        turned = [split for split in possible if all(map(self._turns, split))]
        if turned:
            return stack, *min(reversed(turned), key=sum)
        if not possible or (is_stacked and not self._turns(possible[-1][0])):
            return stack, 0, 0
        return stack, *possible[-1]

    def clipped(self, hess: jax.Array, h: jax.Array, scale: jax.Array) -> jax.Array:
        """ĥ within ±c(h+δ), from the scale h+δ; but h itself, which says nothing, stays."""
        if self.hess_clip == math.inf:
            return hess
        bound = self.hess_clip * scale
        # What has overflowed must not become a number.
        return jnp.where(jnp.isfinite(hess) & (hess != h), jnp.clip(hess, -bound, bound), hess)

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
        leaves = map(_varying_alike, state.vectors, momentum, hess, factors)
        vectors, momentum, hess = zip(*leaves, strict=True)
        case = jnp.where(count == 1, 1, jnp.where(count % self.update_every == 0, 2, 0))
        found, orders = jax.lax.switch(case, _WAYS, factors, vectors)
        leaves = vectors, found, orders, list(momentum), list(hess)
        turned = jax.lax.cond(case == 0, _stayed, _followed, *leaves)
        return EigenState(found, factors), list(map(unflatten_like, coordinates, turned))


def _varying_alike(
    vectors: Sides, momentum: jax.Array, hess: jax.Array, factors: Sides
) -> tuple[Sides, jax.Array, jax.Array]:
    """What a turn changes of a leaf, varying over the mesh axes over which any of it does.

    Under `shard_map` gradients of each device may meet a state that was the same on all.
    """
    changed = vectors, momentum, hess
    types = map(jax.typeof, jax.tree.leaves((changed, factors)))
    axes = frozenset[str]().union(*map(varying_axes, types))
    return jax.tree.map(lambda x: varying_over(x, axes), changed)


def _moved_factors(decay: Number, factors: Sides, grad: jax.Array) -> Sides:
    """L and R, moved towards G Gᵀ and Gᵀ G, unless these overflow."""
    left, right = factors
    if isinstance(left, tuple) and isinstance(right, tuple):
        return factors
    grad = matrices_of(factors, gathered(grad))
    if not isinstance(left, tuple):
        grad = grad[0]

    def moved(old: Any, a: jax.Array, b: jax.Array) -> Any:
        if isinstance(old, tuple):
            return old
        new = decay * old + (1 - decay) * product(a, b)
        return jnp.where(jnp.all(jnp.isfinite(new)), new, old)

    return Sides(moved(left, grad, grad.mT), moved(right, grad.mT, grad))


def _found(find: Callable[..., Any], factors: Basis, vectors: Basis) -> tuple[Basis, Basis]:
    """New eigenvectors, and which old one each of them continues."""

    def of_side(old: Any, factor: Any) -> tuple[Any, Any]:
        if isinstance(old, tuple):
            return (), ()
        axes, (q, order) = varying_axes(jax.typeof(old)), find(old, factor)
        return varying_over(q, axes), varying_over(order, axes)

    pairs = [list(map(of_side, old, factor)) for old, factor in zip(vectors, factors, strict=True)]
    found = tuple(Sides(*(q for q, _ in sides)) for sides in pairs)
    return found, tuple(Sides(*(order for _, order in sides)) for sides in pairs)


def _followed(
    old: Basis, new: Basis, orders: Basis, momentum: list[jax.Array], hess: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Momentum in the new coordinates, and h, whose entries go with their vectors."""
    turned = in_coordinates(new, in_parameters(old, momentum))
    turned = [g.astype(old.dtype) for g, old in zip(turned, momentum, strict=True)]
    return turned, list(map(_sorted, new, orders, hess))


def _stayed(
    old: Basis, new: Basis, orders: Basis, momentum: list[jax.Array], hess: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The same where nothing has turned."""
    del old, new, orders
    return momentum, hess


def _sorted(sides: Sides, orders: Sides, h: jax.Array) -> jax.Array:
    rows, columns = orders
    if isinstance(rows, tuple) and isinstance(columns, tuple):
        return h
    matrices = matrices_of(sides, gathered(h))
    if not isinstance(columns, tuple):
        order = columns[..., None, :]
        order = order.reshape((1,) * (matrices.ndim - order.ndim) + order.shape)
        matrices = jnp.take_along_axis(matrices, order, axis=-1)
    if not isinstance(rows, tuple):
        matrices = jnp.take_along_axis(matrices, rows[None, ..., None], axis=-2)
    return split_like(matrices.reshape(h.shape), h)


def _kept(old: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The old vectors, each where it was."""
    del factor
    return old, jnp.broadcast_to(jnp.arange(old.shape[-1], dtype=jnp.int32), old.shape[:-1])


def _exact(old: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors by falling eigenvalues; h keeps its order, for the identity has none."""
    return jnp.linalg.eigh(factor)[1][..., ::-1], _kept(old, factor)[1]


def _iterated(old: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by a power iteration from the old ones, which are sorted first."""
    powered = product(factor, old)
    order = jnp.argsort(-jnp.sum(old * powered, axis=-2)).astype(jnp.int32)
    q, r = jnp.linalg.qr(jnp.take_along_axis(powered, order[..., None, :], axis=-1))
    # No vector turns round, which would mirror the noise.
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return q * signs[..., None, :], order


# Made once: jax compiles a branch anew for a function that it does not know.
_WAYS = tuple(partial(_found, way) for way in (_kept, _exact, _iterated))
