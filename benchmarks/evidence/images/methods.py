"""The methods that are compared: how each is trained, and what it predicts with.

All get the initial weights, the batches and the number of steps of their seed (the ensemble five
times) and, but for SWAG's last quarter, one schedule: warmup, then a cosine to zero.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks._shared import methods as shared
from benchmarks._shared.methods import Array, Carry, Step, Values
from benchmarks._shared.networks import Perceptron, ResNet
from ivon_jax import Posterior, kl_divergence, posterior, predict_samples

NETWORKS: dict[str, nn.Module] = {"mlp": Perceptron(), "resnet": ResNet()}
Tree = Any
Data = tuple[Array, Array]  # images and labels

MEMBERS = 5  # of the ensemble
MEMBER_STRIDE = 1000  # between the seeds of its members; member 0 is the SGD network of the seed
COLLECT_SHARE = 0.25  # of the steps, the last ones, in which SWAG collects weights
RANK = 20  # of SWAG's covariance


METHODS = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "dropout": "MC-dropout",
    "swag": "SWAG",
    "backprop": "Bayes by Backprop",
    "ensemble": "ensemble of 5",
    "ivon": "IVON",
    "ivon_bayes": "IVON, ess = N",
}
POINTS = ("sgd", "adamw")  # one set of weights
VARIATIONAL = ("ivon", "ivon_bayes")


# --- What a method predicts with ------------------------------------------------------------------


class Members(NamedTuple):
    """Weights of one network, or of several, stacked on axis 0."""

    params: Tree


class Masked(NamedTuple):
    """Weights under dropout masks."""

    params: Tree
    rate: Any


class Swag(NamedTuple):
    """A Gaussian of low rank plus a diagonal (Maddox et al. 2019); deviations on axis 0."""

    mean: Tree
    variance: Tree
    deviations: Tree


Fitted = Members | Masked | Swag | Posterior


@partial(jax.jit, static_argnames=("network", "count"))
def sample_log_probs(
    network: nn.Module, fitted: Fitted, key: Array, images: Array, count: int
) -> Array:
    """Log-probabilities by every member, or by so many draws: (samples, images, classes)."""

    def at(params: Tree, *rate: Any, **rngs: Any) -> Array:
        logits: Any = network.apply(params, images, *rate, **rngs)
        return jax.nn.log_softmax(logits)

    keys = jax.random.split(key, count)
    if isinstance(fitted, Members):
        return jax.lax.map(at, fitted.params)
    if isinstance(fitted, Masked):
        return jax.lax.map(lambda k: at(fitted.params, fitted.rate, rngs={"dropout": k}), keys)
    if isinstance(fitted, Swag):
        return jax.lax.map(lambda k: at(draw_swag(k, fitted)), keys)
    apply: Any = network.apply
    return jax.nn.log_softmax(predict_samples(apply, count)(key, fitted, images))


def at_mean(fitted: Fitted) -> Members:
    """The network at the mean of a Gaussian, or without dropout."""
    if isinstance(fitted, Members):
        return fitted
    params = fitted.params if isinstance(fitted, Masked) else fitted.mean
    return Members(jax.tree.map(lambda x: x[None], params))


def fitted_by(method: str, values: Values, params: Tree, state: Any) -> Fitted:
    """What the parameters and the state of one run predict with."""
    if method in VARIATIONAL:
        return posterior(state)
    if method == "backprop":
        return gaussian_of(params)
    if method == "dropout":
        return Masked(params, values["rate"])
    return Members(jax.tree.map(lambda x: x[None], params))


def swag_of(snapshots: Tree) -> Swag:
    """Moments of weights that are stacked on axis 0, and deviations from their running mean."""

    def moments(x: Array) -> tuple[Array, Array, Array]:
        mean = x.mean(axis=0)
        variance = jnp.maximum((x**2).mean(axis=0) - mean**2, 0.0)
        count = jnp.arange(1, len(x) + 1, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return mean, variance, (x - jnp.cumsum(x, axis=0) / count)[-RANK:]

    leaves, treedef = jax.tree.flatten(snapshots)
    return Swag(*(treedef.unflatten(part) for part in zip(*map(moments, leaves), strict=True)))


def draw_swag(key: Array, q: Swag) -> Tree:
    """Weights m + √(v/2) ε₁ + D ε₂/√(2(K−1)), with one ε₂ of length K for all leaves."""
    common, own = jax.random.split(key)
    rank = len(jax.tree.leaves(q.deviations)[0])
    weights = jax.random.normal(common, (rank,)) / jnp.sqrt(2.0 * max(1, rank - 1))

    def draw(noise: Array, mean: Array, variance: Array, deviations: Array) -> Array:
        noise = jnp.sqrt(variance / 2.0) * noise
        return mean + noise + jnp.tensordot(weights, deviations, axes=1)

    return jax.tree.map(draw, optax.tree.random_like(own, q.mean), *q)


# --- Optimizers and steps -------------------------------------------------------------------------


def make_optimizer(
    method: str, values: Values, steps: int, num_train: int
) -> optax.GradientTransformationExtraArgs:
    """Weight decay falls on every parameter."""
    if method == "backprop":
        return optax.adam(shared.warmup_cosine(values["learning_rate"], steps))
    if method == "swag":
        return swag_optimizer(values, steps - collecting_steps(steps))
    plain = method if method == "adamw" else "sgd"
    return shared.optimizer("ivon" if method in VARIATIONAL else plain, values, steps, num_train)


def swag_optimizer(values: Values, steps: int) -> optax.GradientTransformationExtraArgs:
    """SGD whose rate falls for so many steps to that at which SWAG collects weights."""
    shape, end = shared.warmup_cosine(1.0, steps), values["swag_rate"]
    rise = values["learning_rate"] - end
    decay = optax.add_decayed_weights(values["weight_decay"])
    return optax.chain(decay, optax.sgd(lambda count: end + rise * shape(count), momentum=0.9))


def collecting_steps(steps: int) -> int:
    """Length of the last part of a run, in which SWAG collects `RANK` sets of weights."""
    return max(1, round(COLLECT_SHARE * steps / RANK)) * RANK


def make_step(
    network: nn.Module,
    method: str,
    values: Values,
    tx: optax.GradientTransformationExtraArgs,
    num_train: int,
) -> Step:
    """The training step; the loss is the mean cross-entropy per example."""

    def loss_fn(params: Tree, batch: Data, *rate: Any, **rngs: Any) -> Array:
        logits: Any = network.apply(params, batch[0], *rate, **rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def masked(key: Array, params: Tree, batch: Data) -> Array:
        """MC-dropout (Gal & Ghahramani 2016)."""
        return loss_fn(params, batch, values["rate"], rngs={"dropout": key})

    def variational(key: Array, params: Tree, batch: Data) -> Array:
        """Bayes by Backprop (Blundell et al. 2015), with IVON's objective and prior."""
        q, ess = gaussian_of(params), num_train / values["temperature"]
        noise = optax.tree.random_like(key, q.mean, jax.random.normal)
        sample = jax.tree.map(lambda m, p, e: m + e * p**-0.5, q.mean, q.precision, noise)
        flat = optax.tree.full_like(q.mean, ess * values["weight_decay"])
        prior = Posterior(optax.tree.zeros_like(q.mean), flat)
        return loss_fn(sample, batch) + kl_divergence(q, prior) / ess

    def sharpest(key: Array, params: Tree, state: Any, batch: Data) -> tuple[Tree, Any, Array]:
        """SAM (Foret et al. 2021): the gradient where the loss is largest nearby."""
        grads = jax.grad(loss_fn)(params, batch)
        scale = values["rho"] / (optax.tree.norm(grads) + 1e-12)
        worst = jax.tree.map(lambda p, g: p + scale * g, params, grads)
        loss, grads = jax.value_and_grad(loss_fn)(worst, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    if method in VARIATIONAL:
        return shared.ivon_step(loss_fn, tx)
    if method == "sam":
        return sharpest
    if method not in ("dropout", "backprop"):
        return shared.plain_step(loss_fn, tx)
    objective = masked if method == "dropout" else variational
    return lambda key, *rest: shared.plain_step(partial(objective, key), tx)(key, *rest)


def gaussian_of(variational: tuple[Tree, Tree]) -> Posterior:
    """The Gaussian of a mean and of ρ, where σ = log(1 + eᵖ)."""
    mean, rho = variational
    return Posterior(mean, jax.tree.map(lambda r: jax.nn.softplus(r) ** -2, rho))


# --- Training -------------------------------------------------------------------------------------


class Trainer:
    """A method ready to run, compiled once for all seeds and hyperparameters."""

    def __init__(self, network: nn.Module, method: str, data: Data, epochs: int, batch_size: int):
        num_train = len(data[1])
        self.method, self.epochs, self.batch_size = method, epochs, batch_size
        self.num_steps = steps = epochs * (num_train // batch_size)

        def start(key: Array, values: Values) -> Carry:
            params: Tree = network.init(key, data[0][:1])
            if method == "backprop":
                rho = jnp.log(jnp.expm1(values["init_std"]))
                params = params, optax.tree.full_like(params, rho)
            return params, make_optimizer(method, values, steps, num_train).init(params)

        def one(values: Values, data: Data, carry: Carry, inputs: Any) -> tuple[Carry, Array]:
            tx = make_optimizer(method, values, steps, num_train)
            step = make_step(network, method, values, tx, num_train)
            return shared.step_on_rows(step, data, carry, inputs)

        def scan(values: Values, data: Data, carry: Carry, inputs: Any) -> Carry:
            return jax.lax.scan(partial(one, values, data), carry, inputs)[0]

        one_step = jax.jit(one, donate_argnums=2)

        def loop(values: Values, data: Data, carry: Carry, inputs: Any) -> Carry:
            for each in zip(*inputs, strict=True):
                carry, _ = one_step(values, data, carry, each)
            return carry

        self._start = jax.jit(start)
        # XLA's CPU code for the gradient of a convolution is some 30 times slower inside a loop.
        slow = isinstance(network, ResNet) and jax.default_backend() == "cpu"
        self._run = loop if slow else jax.jit(scan, donate_argnums=2)

    def stops(self, values: Values, data: Data, seed: int, at: Sequence[int]) -> Iterator[Carry]:
        """Trains from one seed; yields copies of parameters and state after so many steps each."""
        init_key, epochs_key, _ = shared.seed_keys(seed)
        carry = self._start(init_key, values)
        batches = partial(
            shared.shuffled_batches, num_examples=len(data[1]), batch_size=self.batch_size
        )
        passes = jax.vmap(batches)(jax.random.split(epochs_key, self.epochs))
        inputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), passes)
        for begin, end in zip([0, *at[:-1]], at, strict=True):
            part = jax.tree.map(lambda x, begin=begin, end=end: x[begin:end], inputs)
            carry = self._run(values, data, carry, part)
            yield jax.tree.map(jnp.copy, carry)

    def fit(self, values: Values, data: Data, seed: int) -> Fitted:
        """Trains to the end."""
        if self.method == "ensemble":
            seeds = [seed + MEMBER_STRIDE * member for member in range(MEMBERS)]
            ends = [next(self.stops(values, data, each, [self.num_steps])) for each in seeds]
            return Members(jax.tree.map(lambda *x: jnp.stack(x), *(params for params, _ in ends)))
        if self.method == "swag":
            length = collecting_steps(self.num_steps)
            at = range(self.num_steps - length, self.num_steps + 1, length // RANK)
            snapshots = [params for params, _ in self.stops(values, data, seed, at)][1:]
            return swag_of(jax.tree.map(lambda *x: jnp.stack(x), *snapshots))
        return fitted_by(
            self.method, values, *next(self.stops(values, data, seed, [self.num_steps]))
        )
