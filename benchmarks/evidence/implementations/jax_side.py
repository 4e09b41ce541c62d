"""The comparison's JAX side: optax's AdamW and ivon_jax."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._shared.measuring import jax_loop
from benchmarks._shared.methods import Array, Batch, step_of
from benchmarks.evidence.implementations.task import Setting, Task, Trained
from ivon_jax import ivon, posterior, sample_params

Carry = tuple[Any, Any, Array]  # parameters, optimizer state, key


@jax.jit
def log_probs(params: list, images: Array) -> Array:
    """Log-probabilities of the perceptron."""
    x = images
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias[None])
    weight, bias = params[-1]
    return jax.nn.log_softmax(x @ weight + bias[None])


def mean_loss(params: list, batch: Batch) -> Array:
    """Mean cross-entropy per example."""
    return -jnp.take_along_axis(log_probs(params, batch[0]), batch[1][:, None], axis=1).mean()


class Trainer:
    """A setting, compiled once for all seeds."""

    def __init__(self, setting: Setting, task: Task):
        self.setting, self.task = setting, task
        values = {**setting.values, "learning_rate": setting.schedule(task)}
        if setting.optimizer == "ivon":
            self._tx = ivon(ess=task.num_train, **values)
        else:
            self._tx = optax.with_extra_args_support(optax.adamw(**values))
        step = step_of(setting.optimizer, mean_loss, self._tx)

        @partial(jax.jit, donate_argnums=0)
        def advance(carry: Carry, images: Array, labels: Array) -> Carry:
            params, state, key = carry
            key, draw_key = jax.random.split(key)
            params, state, _ = step(draw_key, params, state, (images, labels))
            return params, state, key

        self._step = advance
        self._batch = (jnp.asarray(task.images[:50]), jnp.asarray(task.labels[:50]))
        self._step(self._init(0), *self._batch)  # compile

    def _init(self, seed: int) -> Carry:
        params = jax.tree.map(jnp.asarray, self.task.weights(seed))
        return params, self._tx.init(params), jax.random.key(seed)

    def train(self, seed: int) -> Trained:
        """Trains step by step from the weights and with the batches of a seed."""
        task = self.task
        carry = self._init(seed)
        batches = [(jnp.asarray(x), jnp.asarray(y)) for x, y in task.batches(seed)]
        start = time.perf_counter()
        for images, labels in batches:
            carry = self._step(carry, images, labels)
        params, state, key = jax.block_until_ready(carry)
        seconds = time.perf_counter() - start
        samples = None
        if self.setting.optimizer == "ivon":
            q = posterior(state)
            draws = (sample_params(k, q)[0] for k in jax.random.split(key, task.samples))
            samples = np.stack([log_probs(draw, task.test_images) for draw in draws])
        return Trained(np.asarray(log_probs(params, task.test_images)), samples, seconds)

    def timed(self) -> Callable[[int], None]:
        """A function that takes so many steps."""
        return jax_loop(self._step, self._init(0), *self._batch)
