"""The comparison's JAX side: optax's AdamW and ivon_jax."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks._shared.methods import Array, Batch, step_of
from benchmarks.evidence.implementations.task import SAMPLES, Setting, Task
from ivon_jax import ivon, posterior, predict_log_probs

Carry = tuple[Any, Any, Array]  # parameters, optimizer state, key


@jax.jit
def log_probs(params: list, images: Array) -> Array:
    """Log-probabilities of the perceptron."""
    *hidden, (last, last_bias) = params
    for weight, bias in hidden:
        images = jax.nn.relu(images @ weight + bias[None])
    return jax.nn.log_softmax(images @ last + last_bias[None])


def mean_loss(params: list, batch: Batch) -> Array:
    """Mean cross-entropy per example."""
    return -jnp.take_along_axis(log_probs(params, batch[0]), batch[1][:, None], axis=1).mean()


class Trainer:
    """A setting, compiled once for all seeds."""

    as_array = staticmethod(jnp.asarray)

    def __init__(self, setting: Setting, task: Task):
        self.task, self.variational = task, setting.optimizer == "ivon"
        values: dict[str, Any] = {**setting.values, "learning_rate": setting.schedule(task)}
        tx = ivon(ess=task.num_train, **values) if self.variational else optax.adamw(**values)
        self.tx = optax.with_extra_args_support(tx)
        self.update = step_of(setting.optimizer, mean_loss, self.tx)

    def start(self, seed: int) -> Carry:
        """Before the first step."""
        params = jax.tree.map(jnp.asarray, self.task.weights(seed))
        return params, self.tx.init(params), jax.random.key(seed)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, carry: Carry, images: Array, labels: Array) -> Carry:
        """One training step."""
        params, state, key = carry
        key, draw_key = jax.random.split(key)
        params, state, _ = self.update(draw_key, params, state, (images, labels))
        return params, state, key

    def predict(self, carry: Carry, images: Array) -> list[Array]:
        """Log-probabilities by the weights or mean and, for IVON, averaged over samples."""
        params, state, key = carry
        point = log_probs(params, images)
        if not self.variational:
            return [point]
        return [point, predict_log_probs(log_probs, SAMPLES)(key, posterior(state), images)]
