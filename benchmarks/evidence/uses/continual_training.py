"""Tasks, training and evaluation for `continual_learning.py`.

`METHODS` are the ways to go from one task to the next. All of them carry a Gaussian `Posterior`
between tasks and return the next one: AdamW ignores its precision, EWC and IVON use it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.evidence.uses.merging_fisher import diagonal_fisher
from examples._shared.datasets import load_small_digits, stratified_split
from ivon_jax import Posterior, ivon, posterior, sample_params

NUM_TASKS = 5
WIDTH = 64
PIXELS = 64
BATCH_SIZE = 50
WARMUP_SHARE = 0.05  # of the steps of a task

Array = jax.Array
Params = jax.Array  # all weights as one vector
Values = Mapping[str, Any]  # hyperparameters by name


class Perceptron(nn.Module):
    """Two hidden layers and one head for all tasks."""

    outputs: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images (n, 64) in [0, 1] to logits."""
        x = 2.0 * images - 1.0
        for _ in range(2):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(self.outputs)(x)


class Net(NamedTuple):
    """The perceptron as a function of one vector, which compiles faster than a tree of six."""

    outputs: int

    def init(self, key: Array) -> Array:
        """Random weights."""
        return ravel_pytree(Perceptron(self.outputs).init(key, jnp.zeros((1, PIXELS))))[0]

    def apply(self, weights: Array, images: Array) -> Any:
        """Logits (n, outputs) of images (n, 64)."""
        network = Perceptron(self.outputs)
        shapes = jax.eval_shape(network.init, jax.random.key(0), images)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return network.apply(ravel_pytree(zeros)[1](weights), images)


class Tasks(NamedTuple):
    """Tasks of one seed, stacked on axis 0, and the rows of each training batch.

    With an axis in front, those of several seeds.
    """

    images: Array  # (tasks, n, 64)
    labels: Array  # (tasks, n)
    eval_images: Array
    eval_labels: Array
    rows: Array  # (tasks, steps, batch)
    joint_rows: Array  # (tasks · steps, batch), of all tasks' images together
    seed: Array


# --- Tasks ----------------------------------------------------------------------------------------


def permuted(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All digits in every task, each task with its pixels in an order of its own."""
    rng = np.random.default_rng(seed)
    orders = [np.arange(images.shape[1]), *(rng.permutation(PIXELS) for _ in range(NUM_TASKS - 1))]
    return np.stack([images[:, order] for order in orders]), np.tile(labels, (NUM_TASKS, 1))


def split(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits 0 and 1, then 2 and 3, ..., as even (0) or odd (1); equally many of each pair."""
    del seed
    members = [np.flatnonzero(labels // 2 == task) for task in range(NUM_TASKS)]
    size = min(map(len, members))
    rows = np.stack([each[:size] for each in members])
    return images[rows], labels[rows] % 2


class Benchmark(NamedTuple):
    """How tasks are made of the digits."""

    title: str
    make: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
    outputs: int


BENCHMARKS = {
    "permuted": Benchmark("Permuted digits, ten classes", permuted, 10),
    "split": Benchmark("Split digits, even or odd", split, 2),
}


def make_tasks(benchmark: str, seeds: int, steps: int, validate: bool) -> Tasks:
    """The tasks of every seed, stacked on a first axis.

    With `validate` each seed holds out another 20 % of the training images, to evaluate on;
    otherwise all are trained on and the test images are evaluated on.
    """
    data = load_small_digits()
    stacked = []
    for seed in range(seeds):
        if validate:
            parts = stratified_split(
                data.train_images, data.train_labels, len(data.train_labels) // 5, seed
            )
        else:
            parts = (data.train_images, data.train_labels, data.test_images, data.test_labels)
        make = BENCHMARKS[benchmark].make
        task_seed = seed + 1000 * validate  # permutations of the report are not those of tuning
        train, held_out = (
            make(images.reshape(len(images), -1), labels, task_seed)
            for images, labels in (parts[:2], parts[2:])
        )
        rng = np.random.default_rng(task_seed)
        size = train[1].shape[1]
        rows = np.stack([batch_rows(rng, size, steps) for _ in range(NUM_TASKS)])
        joint = batch_rows(rng, NUM_TASKS * size, NUM_TASKS * steps)
        stacked.append((*train, *held_out, rows, joint, np.uint32(task_seed)))
    return Tasks(*(jnp.asarray(np.stack(parts)) for parts in zip(*stacked, strict=True)))


def batch_rows(rng: np.random.Generator, size: int, steps: int) -> np.ndarray:
    """Rows of `steps` batches, in shuffled passes over the data."""
    per_pass = size // BATCH_SIZE
    passes = [
        rng.permutation(size)[: per_pass * BATCH_SIZE].reshape(per_pass, BATCH_SIZE)
        for _ in range(-(-steps // per_pass))
    ]
    return np.concatenate(passes)[:steps].astype(np.int32)


# --- Learning one task ----------------------------------------------------------------------------


class Task(NamedTuple):
    """What a method is given to learn a task from."""

    net: Net
    images: Array
    labels: Array
    rows: Array  # of each batch
    key: Array
    start: Params  # where training starts


def loss_fn(net: Net, params: Params, images: Array, labels: Array) -> Array:
    """Mean cross-entropy per example."""
    logits = net.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def schedule(learning_rate: Any, steps: int) -> Callable[[Any], Any]:
    """Linear warmup and cosine decay to zero, anew for every task."""
    warmup = min(max(1, round(WARMUP_SHARE * steps)), steps - 1)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps)
    return lambda count: learning_rate * shape(count)


def descend(task: Task, tx: optax.GradientTransformation, penalty: Callable) -> Params:
    """Plain training of the loss plus a penalty on the parameters."""

    def step(carry: Any, rows: Array) -> tuple[Any, None]:
        params, state = carry

        def objective(params: Params) -> Array:
            batch = task.images[rows], task.labels[rows]
            return loss_fn(task.net, params, *batch) + penalty(params)

        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (task.start, tx.init(task.start)), task.rows)
    return params


def learn_adamw(values: Values, task: Task, q: Posterior) -> Posterior:
    """AdamW from where the last task ended."""
    rate = schedule(values["learning_rate"], len(task.rows))
    tx = optax.adamw(rate, weight_decay=values["weight_decay"])
    return Posterior(descend(task, tx, lambda params: jnp.zeros([])), q.precision)


def learn_ewc(values: Values, task: Task, q: Posterior) -> Posterior:
    """Elastic weight consolidation (Kirkpatrick et al. 2017), in its form for several tasks.

    Adam with the penalty ½ Σ s (θ − m)² / N for the mean m and precision s of `q`, to which every
    task adds `strength` times its Fisher information.
    """
    size = len(task.labels)

    def penalty(params: Params) -> Array:
        return 0.5 * jnp.sum(q.precision * (params - q.mean) ** 2) / size

    rate = schedule(values["learning_rate"], len(task.rows))
    params = descend(task, optax.adam(rate), penalty)
    fisher = diagonal_fisher(task.net.apply, params, task.images)
    return Posterior(params, q.precision + values["strength"] * size * fisher)


def learn_ivon(values: Values, task: Task, prior: Posterior) -> Posterior:
    """IVON under a Gaussian prior, from where the last task ended: returns the posterior."""
    tx = ivon(
        schedule(values["learning_rate"], len(task.rows)),
        ess=len(task.labels) / values["temperature"],
        hess_init=values["hess_init"],
        b2=values["b2"],
        prior=prior,
        # The rate is a share of a Newton step whatever the prior's precision, which grows.
        rescale_lr=False,
    )

    def step(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
        params, state = carry
        rows, key = inputs
        sample, noise = sample_params(key, state)
        batch = task.images[rows], task.labels[rows]
        grads = jax.grad(partial(loss_fn, task.net))(sample, *batch)
        updates, state = tx.update(grads, state, params, noise=noise)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(task.key, len(task.rows))
    carry, _ = jax.lax.scan(step, (task.start, tx.init(task.start)), (task.rows, keys))
    return posterior(carry[1])


def learn_ivon_afresh(values: Values, task: Task, q: Posterior) -> Posterior:
    """IVON from where the last task ended, but under the prior of the first task."""
    learned = learn_ivon(values, task, first_prior(values, task, q.mean))
    return Posterior(learned.mean, q.precision)


def first_prior(values: Values, task: Task, like: Params) -> Posterior:
    """N(0, 1/(λδ)) for the effective sample size λ."""
    precision = values["weight_decay"] * len(task.labels) / values.get("temperature", 1.0)
    return Posterior(jnp.zeros_like(like), jnp.full_like(like, precision))


class Method(NamedTuple):
    """One way to learn tasks one after the other; `joint` is training on all at once."""

    label: str
    learn: Callable[[Values, Task, Posterior], Posterior]
    joint: bool = False


METHODS = {
    "adamw": Method("AdamW", learn_adamw),
    "ewc": Method("EWC", learn_ewc),
    "ivon_afresh": Method("IVON, first prior", learn_ivon_afresh),
    "ivon": Method("IVON, posterior as prior", learn_ivon),
    "joint": Method("all tasks at once, AdamW", learn_adamw, joint=True),
}


# --- A sequence of tasks --------------------------------------------------------------------------


def run_sequence(benchmark: str, method: str, values: Values, tasks: Tasks) -> Array:
    """Learns one seed's tasks in order; returns accuracies (after task, on task)."""
    net = Net(BENCHMARKS[benchmark].outputs)
    init_key, noise_key = jax.random.split(jax.random.key(tasks.seed))
    start = net.init(init_key)
    keys = jax.random.split(noise_key, NUM_TASKS)
    learn = METHODS[method].learn

    def evaluate(params: Params) -> Array:
        accuracy = partial(task_accuracy, net, params)
        return jax.vmap(accuracy)(tasks.eval_images, tasks.eval_labels)

    def one_task(carry: Any, inputs: tuple[Array, Array, Array, Array]) -> tuple[Any, Array]:
        params, q = carry
        images, labels, rows, key = inputs
        q = learn(values, Task(net, images, labels, rows, key, params), q)
        return (q.mean, q), evaluate(q.mean)

    first = Task(net, tasks.images[0], tasks.labels[0], tasks.rows[0], keys[0], start)
    q = first_prior(values, first, start)
    if METHODS[method].joint:
        together = tasks.images.reshape(-1, tasks.images.shape[-1]), tasks.labels.ravel()
        q = learn(values, Task(net, *together, tasks.joint_rows, keys[0], start), q)
        return jnp.tile(evaluate(q.mean), (NUM_TASKS, 1))
    inputs = (tasks.images, tasks.labels, tasks.rows, keys)
    return jax.lax.scan(one_task, (start, q), inputs)[1]


def task_accuracy(net: Net, params: Params, images: Array, labels: Array) -> Array:
    """Share of the images that are classified correctly."""
    return jnp.mean(jnp.argmax(net.apply(params, images), axis=-1) == labels)


def make_runner(benchmark: str, method: str) -> Callable[[Values, Tasks], Array]:
    """Compiles a method once for all seeds and hyperparameters: (seeds, after task, on task)."""
    return jax.jit(jax.vmap(partial(run_sequence, benchmark, method), (None, 0)))
