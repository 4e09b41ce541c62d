"""SOAP: Adam in the eigenbasis of the gradients' second moments (arXiv:2409.11321).

The basis is that of `ivon(..., basis=Eigenbasis())`, so that the two differ in nothing else than
what they do in it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ivon_jax import Eigenbasis
from ivon_jax._core.basis import EigenState, in_coordinates, in_parameters

PyTree = Any


class SoapState(NamedTuple):
    """Moments of the gradient in the coordinates of the basis."""

    step: jax.Array
    mu: PyTree
    nu: PyTree
    basis: EigenState


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, basis: Eigenbasis | None = None
) -> optax.GradientTransformation:
    """Q_L (m̂'/(√v̂' + ε)) Q_Rᵀ, with m' and v' the moving averages of Q_Lᵀ G Q_R and its square."""
    eigenbasis = basis or Eigenbasis()

    def init(params: PyTree) -> SoapState:
        mu, nu = (optax.tree.zeros_like(params) for _ in range(2))
        return SoapState(jnp.zeros([], jnp.int32), mu, nu, eigenbasis.init(params))

    def update(
        grads: PyTree, state: SoapState, params: PyTree | None = None
    ) -> tuple[PyTree, SoapState]:
        del params
        leaves, treedef = jax.tree.flatten(grads)
        vectors, step = state.basis.vectors, state.step + 1
        turned = treedef.unflatten(in_coordinates(vectors, leaves))
        mu = optax.tree.update_moment(turned, state.mu, b1, 1)
        nu = optax.tree.update_moment(turned, state.nu, b2, 2)
        moments = (optax.tree.bias_correction(x, b, step) for x, b in ((mu, b1), (nu, b2)))
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *moments)
        updates = treedef.unflatten(in_parameters(vectors, jax.tree.leaves(scaled)))
        new_basis, (mu, nu) = eigenbasis.turned(state.basis, step, leaves, mu, nu)
        return updates, SoapState(step, mu, nu, new_basis)

    # optax types a state as any tree of arrays.
    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
