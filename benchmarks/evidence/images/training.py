"""Training of the networks that `images.py` compares, one function for all methods.

Every method gets the initial weights, the batches and the number of steps of its seed, and, but
for SWAG's last quarter, the schedule of `image_training.make_optimizer`: warmup, then a cosine to
zero.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.evidence.images.image_training import (
    WARMUP_SHARE,
    Data,
    Step,
    make_ivon_step,
    make_optimizer,
    make_plain_step,
    seed_keys,
    shuffled_batches,
    step_on_rows,
)
from benchmarks.evidence.images.networks import ResNet
from benchmarks.evidence.images.ood_methods import (
    COLLECT_SHARE,
    MEMBER_STRIDE,
    MEMBERS,
    RANK,
    Swag,
    swag_of,
)
from ivon_jax import Posterior, posterior

Array = jax.Array
Tree = Any
Values = Mapping[str, float]  # hyperparameters by name
Carry = tuple[Tree, Any]  # parameters and optimizer state
Inputs = tuple[Array, Array]  # the key and the rows of every step

# The kind of training step of each method; an ensemble trains as SGD does.
STEPS = {
    "sgd": "sgd",
    "adamw": "adamw",
    "dropout": "sgd",
    "swag": "sgd",
    "ensemble": "sgd",
    "ivon": "ivon",
    "ivon_bayes": "ivon",
}


class Trainer(NamedTuple):
    """A method ready to run; it is compiled once for all seeds and hyperparameters."""

    method: str
    init: Callable[[Array, Values], Carry]
    run: Callable[[Data, Carry, Inputs, Values], Carry]
    epochs: int
    batch_size: int


def make_trainer(
    network: nn.Module, method: str, data: Data, epochs: int, batch_size: int
) -> Trainer:
    """Binds a method to the network, the data and the length of a run."""
    num_train = len(data[1])
    num_steps = epochs * (num_train // batch_size)

    def optimizer(values: Values) -> optax.GradientTransformationExtraArgs:
        if method == "swag":
            return swag_optimizer(values, num_steps)
        return make_optimizer(STEPS[method], values, num_steps, num_train)

    @jax.jit
    def init(key, values):
        params = network.init(key, data[0][:1])
        return params, optimizer(values).init(params)

    def step(values: Values) -> Step:
        return make_step(network, method, values, optimizer(values))

    def one_step(data, carry, inputs, values):
        return step_on_rows(step(values), data, carry, inputs)[0]

    def steps(data, carry, inputs, values):
        return jax.lax.scan(partial(step_on_rows, step(values), data), carry, inputs)[0]

    if isinstance(network, ResNet) and jax.default_backend() == "cpu":
        # XLA's CPU code for the gradient of a convolution is some 30 times slower inside a loop.
        run = partial(run_by_step, jax.jit(one_step, donate_argnums=1))
    else:
        run = jax.jit(steps, donate_argnums=1)
    return Trainer(method, init, run, epochs, batch_size)


def make_step(
    network: nn.Module, method: str, values: Values, tx: optax.GradientTransformationExtraArgs
) -> Step:
    """The step of a method; the loss is the mean cross-entropy per example."""

    def loss_of(logits: Any, labels: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def loss_fn(params, batch):
        return loss_of(network.apply(params, batch[0]), batch[1])

    def dropout_step(key, params, state, batch):
        def masked_loss(params, batch):
            logits = network.apply(params, batch[0], values["rate"], rngs={"dropout": key})
            return loss_of(logits, batch[1])

        return make_plain_step(masked_loss, tx)(key, params, state, batch)

    if method == "dropout":
        return dropout_step
    return (make_ivon_step if STEPS[method] == "ivon" else make_plain_step)(loss_fn, tx)


def swag_optimizer(values: Values, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """SGD whose rate begins and, after its cosine, ends at `swag_rate`, for the last quarter."""
    before = num_steps - collecting_steps(num_steps)
    shape = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, max(1, round(WARMUP_SHARE * before)), before
    )

    def schedule(count):
        share = shape(count)
        return share * values["learning_rate"] + (1.0 - share) * values["swag_rate"]

    decay = optax.add_decayed_weights(values["weight_decay"])
    return optax.with_extra_args_support(optax.chain(decay, optax.sgd(schedule, momentum=0.9)))


def collecting_steps(num_steps: int) -> int:
    """Length of the last part of a run, in which SWAG collects `RANK` sets of weights."""
    return max(1, round(COLLECT_SHARE * num_steps / RANK)) * RANK


def run_by_step(one: Callable, data: Data, carry: Carry, inputs: Inputs, values: Values) -> Carry:
    """What a scan over the inputs does, with a call per step."""
    for each in zip(*inputs, strict=True):
        carry = one(data, carry, each, values)
    return carry


def all_batches(trainer: Trainer, num_train: int, seed: int) -> Inputs:
    """The keys and rows of all steps of a seed, the same for all methods."""
    keys = jax.random.split(seed_keys(seed).epochs, trainer.epochs)
    batches = jax.vmap(lambda key: shuffled_batches(key, num_train, trainer.batch_size))(keys)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)


def stops_of(
    trainer: Trainer, values: Values, data: Data, seed: int, stops: Sequence[int]
) -> list[Carry]:
    """Trains from one seed; returns copies of parameters and state after so many steps each."""
    carry = trainer.init(seed_keys(seed).init, values)
    inputs = all_batches(trainer, len(data[1]), seed)
    reached = []
    for begin, end in zip([0, *stops[:-1]], stops, strict=True):
        part = jax.tree.map(lambda x, begin=begin, end=end: x[begin:end], inputs)
        carry = trainer.run(data, carry, part, values)
        reached.append(jax.tree.map(jnp.copy, carry))
    return reached


def fit(trainer: Trainer, values: Values, data: Data, seed: int) -> Tree | Swag | Posterior:
    """What a method predicts with: weights, those of the members, or a Gaussian of weights."""
    num_steps = trainer.epochs * (len(data[1]) // trainer.batch_size)
    if trainer.method == "ensemble":
        return fit_ensemble(trainer, values, data, seed, num_steps)
    if trainer.method == "swag":
        first = num_steps - collecting_steps(num_steps)
        stops = list(range(first, num_steps + 1, collecting_steps(num_steps) // RANK))
        reached = stops_of(trainer, values, data, seed, stops)[1:]
        snapshots = [params for params, _ in reached]
        return swag_of(jax.tree.map(lambda *x: jnp.stack(x), *snapshots), RANK)
    params, state = stops_of(trainer, values, data, seed, [num_steps])[-1]
    return posterior(state) if STEPS[trainer.method] == "ivon" else params


def fit_ensemble(
    trainer: Trainer, values: Values, data: Data, seed: int, num_steps: int
) -> list[Tree]:
    """Networks trained by SGD from seeds of their own."""
    seeds = [seed + MEMBER_STRIDE * member for member in range(MEMBERS)]
    return [stops_of(trainer, values, data, each, [num_steps])[-1][0] for each in seeds]
