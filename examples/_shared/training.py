"""The training loop of the examples; nothing in it knows which optimizer it runs."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from tqdm import tqdm

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
    label: str | None = None,
) -> tuple[PyTree, PyTree]:
    """Minimises the mean of `loss_fn(params, batch)` over shuffled minibatches.

    The whole run is one compiled program, of one seed or of several:

        def fit(params, key):
            noise_key, shuffle_key = jax.random.split(key)  # noise of its own for every seed
            tx = auto_sample(ivon(**settings), noise_key)
            return train(tx, loss_fn, params, data, key=shuffle_key, epochs=20, batch_size=50)

        params, states = jax.vmap(fit)(stacked_params, keys)

    Arrays in `data` have the examples on axis 0; the key decides their order, and an incomplete
    last batch is left out. Returns parameters and optimizer state. After `auto_sample` the
    parameters are one posterior sample: predict with the state.
    """
    bar = tqdm(total=epochs, unit="epoch", desc=label, disable=not progress)

    def count() -> None:
        bar.update()

    @jax.jit
    def run(params, data, key):
        def step(carry, rows):
            params, state = carry
            batch = jax.tree.map(lambda x: x[rows], data)
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            carry, _ = jax.lax.scan(step, carry, shuffled_rows(key, data, batch_size))
            jax.debug.callback(count)  # once per epoch, also under vmap
            return carry, None

        return jax.lax.scan(epoch, (params, tx.init(params)), jax.random.split(key, epochs))[0]

    with bar:
        trained = run(params, data, key)
        jax.effects_barrier()  # the bar is complete before it is closed
    return trained


def shuffled_rows(key: jax.Array, data: PyTree, batch_size: int) -> jax.Array:
    """Row numbers of the examples in random order, (batches, batch_size)."""
    num_examples = len(jax.tree.leaves(data)[0])
    num_batches = num_examples // batch_size
    if num_batches == 0:
        raise ValueError(f"batch_size is {batch_size}, but there are {num_examples} examples.")
    order = jax.random.permutation(key, num_examples)
    return order[: num_batches * batch_size].reshape(num_batches, batch_size)


def warmup_cosine(peak: float, num_steps: int) -> optax.Schedule:
    """Linear warmup over 5 % of the steps, then a cosine to zero."""
    warmup = max(1, round(0.05 * num_steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps)


def classification_loss(apply_fn: Callable[..., Any]) -> Callable[[PyTree, PyTree], jax.Array]:
    """The mean cross-entropy of a batch `(inputs, labels)`, given `apply_fn(params, inputs)`."""

    def loss_fn(params, batch):
        inputs, labels = batch
        logits = apply_fn(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn
