"""The diagonal Fisher information, by squared gradients of single examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def diagonal_fisher(apply: Callable[..., Any], params: Any, inputs: jax.Array) -> Any:
    """Σ_k p_k (∂ log p_k / ∂θ)², averaged over the inputs.

    The expectation is over the labels k that the model itself predicts. (At the true labels the
    squares nearly vanish for a network that fits its training data.) `apply` maps parameters and a
    batch of inputs to logits (n, K).
    """

    def add(total: Any, example: jax.Array) -> tuple[Any, None]:
        def log_probs(params: Any) -> jax.Array:
            return jax.nn.log_softmax(apply(params, example[None])[0])

        value, pull_back = jax.vjp(log_probs, params)
        (scaled,) = jax.vmap(pull_back)(jnp.diag(jnp.exp(0.5 * value)))  # √p_k ∂ log p_k
        return jax.tree.map(lambda t, g: t + jnp.sum(g**2, axis=0), total, scaled), None

    # One example at a time: the gradients of a batch would not fit into the processor's cache.
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), inputs)
    return jax.tree.map(lambda t: t / len(inputs), total)
