"""The training loop of all examples: nothing in it knows which optimizer it runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import trange

PyTree = Any


def train(
    tx: optax.GradientTransformation,
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    data: PyTree,
    *,
    key: jax.Array,
    epochs: int,
    batch_size: int,
    progress: bool = True,
) -> tuple[PyTree, PyTree]:
    """Minimises the mean of `loss_fn(params, batch)` over shuffled minibatches.

    Several seeds are one compiled program. Give each its own noise, too:

        def fit(params, key):
            noise_key, shuffle_key = jax.random.split(key)
            tx = auto_sample(ivon(**settings), noise_key)
            return train(tx, loss_fn, params, data, key=shuffle_key, epochs=20, batch_size=50)

        params, states = jax.vmap(fit)(stacked_params, keys)

    Args:
      tx: any optax optimizer, such as `optax.adamw(1e-3)` or `auto_sample(ivon(...), key)`.
      loss_fn: the mean loss of a batch; `batch` has the structure of `data`.
      params: initial parameters.
      data: arrays with the examples on axis 0.
      key: decides the order of the examples.
      epochs: passes over the data; an incomplete last batch is left out.
      batch_size: examples per step, at most all of them.
      progress: whether to show a progress bar.

    Returns:
      Parameters and optimizer state. After `auto_sample` the parameters are one posterior
      sample: predict with the state.
    """

    def step(data, carry, rows):
        params, state = carry
        batch = jax.tree.map(lambda x: x[rows], data)
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @partial(jax.jit, donate_argnums=1)
    def epoch(data, carry, key):
        return jax.lax.scan(partial(step, data), carry, shuffled_rows(key, data, batch_size))[0]

    carry = jax.tree.map(jnp.array, params), tx.init(params)  # a copy, since epochs donate
    for number in trange(epochs, unit="epoch", disable=not progress):
        carry = epoch(data, carry, jax.random.fold_in(key, number))
    return carry


def shuffled_rows(key: jax.Array, data: PyTree, batch_size: int) -> jax.Array:
    """Row numbers of the examples in random order, (batches, batch_size)."""
    num_examples = len(jax.tree.leaves(data)[0])
    num_batches = num_examples // batch_size
    if num_batches == 0:
        raise ValueError(f"batch_size is {batch_size}, but there are {num_examples} examples.")
    order = jax.random.permutation(key, num_examples)
    return order[: num_batches * batch_size].reshape(num_batches, batch_size)


def classification_loss(apply_fn: Callable[..., Any]) -> Callable[[PyTree, PyTree], jax.Array]:
    """The mean cross-entropy of a batch `(inputs, labels)`; `apply_fn(params, inputs)` is logits."""

    def loss_fn(params, batch):
        inputs, labels = batch
        logits = apply_fn(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn
