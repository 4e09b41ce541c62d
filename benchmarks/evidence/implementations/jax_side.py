"""`implementations.py` in JAX: optax's AdamW and ivon_jax."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._shared.measuring import jax_loop
from benchmarks.evidence.implementations.task import Setting, Task, Trained
from ivon_jax import ivon, posterior, sample_params

Array = jax.Array
Carry = tuple[Any, Any, Array]  # parameters, optimizer state, key


def log_probs(params: list, images: Array) -> Array:
    """Log-probabilities of the perceptron."""
    x = images
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias[None])
    weight, bias = params[-1]
    return jax.nn.log_softmax(x @ weight + bias[None])


def mean_loss(params: list, images: Array, labels: Array) -> Array:
    """Mean cross-entropy per example."""
    return -jnp.take_along_axis(log_probs(params, images), labels[:, None], axis=1).mean()


def make_step(setting: Setting, task: Task) -> tuple[Callable, Callable]:
    """The initial carry, and the compiled step (carry, images, labels) -> carry."""
    schedule, values = setting.schedule(task), setting.values
    variational = setting.optimizer == "ivon"
    if variational:
        tx = ivon(
            schedule,
            ess=task.num_train,
            hess_init=values["hess_init"],
            b2=values["b2"],
            weight_decay=values["weight_decay"],
        )
    else:
        tx = optax.adamw(schedule, weight_decay=values["weight_decay"])

    def init(weights: list, seed: int) -> Carry:
        params = jax.tree.map(jnp.asarray, weights)
        return params, tx.init(params), jax.random.key(seed)

    def ivon_step(carry: Carry, images: Array, labels: Array) -> Carry:
        params, state, key = carry
        key, draw = jax.random.split(key)
        sample, noise = sample_params(draw, state)
        grads = jax.grad(mean_loss)(sample, images, labels)
        updates, state = tx.update(grads, state, params, noise=noise)
        return optax.apply_updates(params, updates), state, key

    def adamw_step(carry: Carry, images: Array, labels: Array) -> Carry:
        params, state, key = carry
        grads = jax.grad(mean_loss)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, key

    return init, jax.jit(ivon_step if variational else adamw_step, donate_argnums=0)


class Trainer:
    """A setting, compiled once for all seeds."""

    def __init__(self, setting: Setting, task: Task):
        self.setting, self.task = setting, task
        self._init, self._step = make_step(setting, task)
        self._predict = jax.jit(log_probs)
        self._batch = (jnp.asarray(task.images[:50]), jnp.asarray(task.labels[:50]))
        self._step(self._init(task.weights(0), 0), *self._batch)  # compile

    def train(self, seed: int) -> Trained:
        """Trains step by step from the weights and with the batches of a seed."""
        task = self.task
        carry = self._init(task.weights(seed), seed)
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
            samples = np.stack([self._predict(draw, task.test_images) for draw in draws])
        return Trained(np.asarray(self._predict(params, task.test_images)), samples, seconds)

    def timed(self) -> Callable[[int], None]:
        """A function that takes so many steps."""
        return jax_loop(self._step, self._init(self.task.weights(0), 0), *self._batch)
