"""Training and prediction of the methods that `out_of_domain.py` compares.

Every method is a `Method`: `fit` trains the perceptron of `image_training.py` from one seed, and
`predict` returns log-probabilities for each of its samples, `(samples, images, classes)`. Both are
pure functions for `jax.jit`. All share the initial weights and the order of examples of a seed,
the number of steps, and, but for SWAG's last quarter, the schedule (warmup, then cosine to zero).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.evidence.images.image_training import (
    MLP,
    NUM_CLASSES,
    WARMUP_SHARE,
    Data,
    Step,
    make_optimizer,
    make_step,
    predict,
    scan_epoch,
    seed_keys,
)
from ivon_jax import Posterior, posterior, predict_samples

MODEL = MLP()
MEMBERS = 5  # of the deep ensemble
MEMBER_STRIDE = 1000  # between the seeds of its members; member 0 is the SGD network of the seed
COLLECT_SHARE = 0.25  # of the epochs, the last ones, in which SWAG collects weights
RANK = 20  # of SWAG's covariance

Array = jax.Array
Tree = Any
Values = Mapping[str, Any]  # hyperparameters by name


class Run(NamedTuple):
    """What all methods are given; hashable, so that jit can take it as static."""

    epochs: int
    batch_size: int
    num_samples: int

    def num_steps(self, data: Data) -> int:
        """Gradient evaluations of one network."""
        return self.epochs * (len(data[1]) // self.batch_size)


class Method(NamedTuple):
    """One way to train and to predict."""

    label: str
    fit: Callable[[Run, Values, Any, Data], Tree]  # (run, values, seed, data) -> fitted
    predict: Callable[[Run, Values, Array, Tree, Array], Array]  # (run, values, key, fitted, x)
    networks: int = 1  # trained
    samples: int | None = None  # averaged in a prediction; None: as many as `Run` says


# --- What the methods share -----------------------------------------------------------------------


def train(
    run: Run, step: Step, tx: optax.GradientTransformation, params: Tree, keys: Array, data: Data
) -> tuple[Tree, Any]:
    """Runs one epoch per key from fresh optimizer state."""
    return run_epochs(run, step, (params, tx.init(params)), keys, data)


def run_epochs(run: Run, step: Step, carry: Any, keys: Array, data: Data) -> tuple[Tree, Any]:
    """Runs one shuffled epoch per key."""

    def epoch(carry, key):
        return scan_epoch(step, run.batch_size, data, carry, key), None

    return jax.lax.scan(epoch, carry, keys)[0]


def start(run: Run, seed: Any, data: Data) -> tuple[Tree, Array]:
    """Initial weights and the keys of the epochs, the same for all methods."""
    keys = seed_keys(seed)
    return MODEL.init(keys.init, data[0][:1]), jax.random.split(keys.epochs, run.epochs)


def cross_entropy(logits: Any, labels: Array) -> Array:
    """Mean over examples, the loss of every method."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- SGD and a deep ensemble of it ----------------------------------------------------------------


def fit_sgd(run: Run, values: Values, seed: Any, data: Data) -> Tree:
    """SGD with momentum; returns its weights."""
    tx = make_optimizer("sgd", values, run.num_steps(data), len(data[1]))
    return train(run, make_step("sgd", MODEL, tx), tx, *start(run, seed, data), data)[0]


def predict_point(run: Run, values: Values, key: Array, params: Tree, images: Array) -> Array:
    """One network, in the form of one sample."""
    del run, values, key
    return predict(MODEL, params, images)[None]


def fit_ensemble(run: Run, values: Values, seed: Any, data: Data) -> Tree:
    """Networks of `fit_sgd` from seeds of their own, stacked on axis 0."""
    seeds = seed + MEMBER_STRIDE * jnp.arange(MEMBERS)
    return jax.lax.map(lambda seed: fit_sgd(run, values, seed, data), seeds)


def predict_members(run: Run, values: Values, key: Array, members: Tree, images: Array) -> Array:
    """Each network of a stack."""
    del run, values, key
    return jax.lax.map(lambda params: predict(MODEL, params, images), members)


# --- MC-dropout -----------------------------------------------------------------------------------


class DropoutMLP(nn.Module):
    """`MLP`, of the same parameters, with dropout after both hidden layers."""

    @nn.compact
    def __call__(self, images: Array, rate: Any) -> Array:
        """Maps images to logits; every image has a mask of its own."""
        x = (2.0 * images - 1.0).reshape(len(images), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(MODEL.width)(x))
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, x.shape)
            x = jnp.where(kept, x / (1.0 - rate), 0.0)
        return nn.Dense(NUM_CLASSES)(x)


def dropout_logits(params: Tree, key: Array, images: Array, rate: Any) -> Any:
    """Logits under one draw of the masks."""
    return DropoutMLP().apply(params, images, rate, rngs={"dropout": key})


def fit_dropout(run: Run, values: Values, seed: Any, data: Data) -> Tree:
    """SGD through dropout masks (Gal & Ghahramani 2016); returns the weights."""
    tx = make_optimizer("sgd", values, run.num_steps(data), len(data[1]))

    def loss_fn(params, key, batch):
        return cross_entropy(dropout_logits(params, key, batch[0], values["rate"]), batch[1])

    def step(key, params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, key, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train(run, step, tx, *start(run, seed, data), data)[0]


def predict_dropout(run: Run, values: Values, key: Array, params: Tree, images: Array) -> Array:
    """Keeps the masks on: one draw per sample and image."""

    def one_sample(key):
        return jax.nn.log_softmax(dropout_logits(params, key, images, values["rate"]))

    return jax.lax.map(one_sample, jax.random.split(key, run.num_samples))


# --- SWAG -----------------------------------------------------------------------------------------


class Swag(NamedTuple):
    """A Gaussian of low rank plus a diagonal, with deviations stacked on axis 0."""

    mean: Tree
    variance: Tree
    deviations: Tree


def fit_swag(run: Run, values: Values, seed: Any, data: Data) -> Swag:
    """SGD whose rate ends at a constant, with the Gaussian of its weights (Maddox et al. 2019).

    Warmup begins and the cosine ends at `swag_rate`, which the last quarter keeps. The weights
    after each epoch of that quarter are collected.
    """
    collected = max(2, round(COLLECT_SHARE * run.epochs))
    before = max(1, run.epochs - collected)
    num_steps = before * (len(data[1]) // run.batch_size)
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, num_steps)

    def schedule(count):
        share = shape(count)
        return share * values["learning_rate"] + (1.0 - share) * values["swag_rate"]

    decay = optax.add_decayed_weights(values["weight_decay"])
    tx = optax.with_extra_args_support(optax.chain(decay, optax.sgd(schedule, momentum=0.9)))
    step = make_step("sgd", MODEL, tx)
    params, keys = start(run, seed, data)
    carry = train(run, step, tx, params, keys[:before], data)

    def collect(carry, key):
        carry = scan_epoch(step, run.batch_size, data, carry, key)
        return carry, carry[0]

    _, snapshots = jax.lax.scan(collect, carry, keys[before:])
    return swag_of(snapshots, RANK)


def swag_of(snapshots: Tree, rank: int) -> Swag:
    """Moments of weights that are stacked on axis 0, in the order of training.

    The deviations are those of the last `rank` snapshots from the running mean at their time.
    """

    def moments(x):
        mean = x.mean(axis=0)
        variance = jnp.maximum((x**2).mean(axis=0) - mean**2, 0.0)
        count = jnp.arange(1, len(x) + 1, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return mean, variance, (x - jnp.cumsum(x, axis=0) / count)[-rank:]

    leaves, treedef = jax.tree.flatten(snapshots)
    return Swag(*(treedef.unflatten(part) for part in zip(*map(moments, leaves), strict=True)))


def draw_swag(key: Array, q: Swag) -> Tree:
    """Weights m + √(v/2) ε₁ + D ε₂/√(2(K−1)), with one ε₂ of length K for all leaves."""
    common, own = jax.random.split(key)
    leaves, treedef = jax.tree.flatten(q.mean)
    rank = len(jax.tree.leaves(q.deviations)[0])
    weights = jax.random.normal(common, (rank,)) / jnp.sqrt(2.0 * max(1, rank - 1))

    def draw(key, mean, variance, deviations):
        noise = jnp.sqrt(variance / 2.0) * jax.random.normal(key, mean.shape)
        return mean + noise + jnp.tensordot(weights, deviations, axes=1)

    keys = list(jax.random.split(own, len(leaves)))
    parts = (leaves, jax.tree.leaves(q.variance), jax.tree.leaves(q.deviations))
    return treedef.unflatten(map(draw, keys, *parts))


def predict_swag(run: Run, values: Values, key: Array, q: Swag, images: Array) -> Array:
    """Draws weights, one network per sample."""
    del values
    keys = jax.random.split(key, run.num_samples)
    return jax.lax.map(lambda key: predict(MODEL, draw_swag(key, q), images), keys)


# --- Mean-field variational inference by backpropagation ------------------------------------------


def gaussian_kl(mean: Tree, std: Tree, prior_precision: Any) -> Array:
    """KL(N(m, σ²) ‖ N(0, 1/s)) = ½ Σ [s(m² + σ²) − 1 − log(sσ²)]."""

    def one_leaf(m, s):
        scaled = prior_precision * s**2
        return 0.5 * jnp.sum(prior_precision * m**2 + scaled - 1.0 - jnp.log(scaled))

    return sum(jax.tree.leaves(jax.tree.map(one_leaf, mean, std)), jnp.zeros([]))


def fit_backprop(run: Run, values: Values, seed: Any, data: Data) -> Posterior:
    """Bayes by Backprop (Blundell et al. 2015): Adam on the mean and on ρ, where σ = log(1 + eᵖ).

    The objective is IVON's, E_q[ℓ̄] + KL/λ with prior precision λδ; the gradient goes through one
    sample θ = m + σε per step.
    """
    num_train = len(data[1])
    ess = num_train / values["temperature"]
    adam = {"learning_rate": values["learning_rate"], "weight_decay": 0.0}
    tx = make_optimizer("adamw", adam, run.num_steps(data), num_train)

    def loss_fn(variational, key, batch):
        mean, rho = variational
        std = jax.tree.map(jax.nn.softplus, rho)
        noise = optax.tree.random_like(key, mean, jax.random.normal)
        sample = jax.tree.map(lambda m, s, e: m + s * e, mean, std, noise)
        loss = cross_entropy(MODEL.apply(sample, batch[0]), batch[1])
        return loss + gaussian_kl(mean, std, ess * values["weight_decay"]) / ess

    def step(key, variational, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(variational, key, batch)
        updates, state = tx.update(grads, state, variational)
        return optax.apply_updates(variational, updates), state, loss

    mean, keys = start(run, seed, data)
    rho = jax.tree.map(lambda m: jnp.full_like(m, jnp.log(jnp.expm1(values["init_std"]))), mean)
    mean, rho = train(run, step, tx, (mean, rho), keys, data)[0]
    return Posterior(mean, jax.tree.map(lambda r: jax.nn.softplus(r) ** -2, rho))


# --- IVON -----------------------------------------------------------------------------------------


def fit_ivon(run: Run, values: Values, seed: Any, data: Data) -> Posterior:
    """IVON; returns its posterior."""
    tx = make_optimizer("ivon", values, run.num_steps(data), len(data[1]))
    return posterior(train(run, make_step("ivon", MODEL, tx), tx, *start(run, seed, data), data)[1])


def predict_posterior(run: Run, values: Values, key: Array, q: Posterior, images: Array) -> Array:
    """Draws weights from a diagonal Gaussian, one network per sample."""
    del values
    return jax.nn.log_softmax(predict_samples(MODEL.apply, run.num_samples)(key, q, images))


METHODS = {
    "sgd": Method("SGD", fit_sgd, predict_point, samples=1),
    "dropout": Method("MC-dropout", fit_dropout, predict_dropout),
    "swag": Method("SWAG", fit_swag, predict_swag),
    "backprop": Method("Bayes by Backprop", fit_backprop, predict_posterior),
    "ensemble": Method("ensemble of 5", fit_ensemble, predict_members, MEMBERS, MEMBERS),
    "ivon": Method("IVON", fit_ivon, predict_posterior),
    "ivon_bayes": Method("IVON, ess = N", fit_ivon, predict_posterior),
}


class Runner(NamedTuple):
    """A method compiled once for all seeds, data of one shape and hyperparameters."""

    fit: Callable[[Values, Any, Data], Tree]
    predict: Callable[[Values, Array, Tree, Array], Array]


def make_runner(method: str, run: Run) -> Runner:
    """Binds a method to the settings that all methods share."""
    chosen = METHODS[method]
    return Runner(jax.jit(partial(chosen.fit, run)), jax.jit(partial(chosen.predict, run)))
