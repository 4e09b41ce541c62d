"""What antithetic samples, a lean state and a bfloat16 momentum do to what is learned.

    python benchmarks/cost/variants.py               # about two minutes on two cores

Every row spends the same number of gradients. All numbers are from live training, in which mean,
curvature and momentum move together, as mean ± standard error.

1. A quadratic with curvature 1 and noisy gradients: the average h that is learned (1 is right), and
   the variances of h and of the momentum around their averages in time.
2. Logistic regression with two weights: KL from q to the exact posterior, at the end and the number
   of gradients until it is 0.02 above the best diagonal Gaussian's.
3. Digits, a perceptron 64-128-128-10: test NLL averaged over 32 samples, and at the mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment
from benchmarks._shared.methods import Array, estimator_step, warmup_cosine
from benchmarks._shared.networks import Perceptron
from benchmarks.cost.contenders import chosen
from examples._shared.datasets import load_small_digits
from examples._shared.reporting import cell, format_table
from examples._shared.training import classification_loss
from examples.logistic_2d import PRIOR_PRECISION, flowers
from ivon_jax import auto_sample, ivon, metrics, posterior, predict_log_probs

PyTree = Any

RATES = (0.1, 0.5)  # on the quadratic
# Options of auto_sample and ivon; `samples` gradients for each step of the mean.
VARIANTS: dict[str, dict[str, Any]] = {
    "one sample": {},
    "one sample, lean": {"store_mean": False},
    "one sample, bfloat16 momentum": {"momentum_dtype": jnp.bfloat16},
    "antithetic across steps": {"antithetic": True},
    "two samples": {"samples": 2},
    "a pair": {"samples": 2, "antithetic": True},
    "a pair, in mc_value_and_grad": {"samples": 2, "antithetic": True, "estimator": True},
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 10
    """On digits; logistic regression takes four times as many."""
    gradients: int = 10_000
    """Of logistic regression; two fifths on the quadratic, a fifth on digits."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one table for each problem."""
    options = parse(Options, __doc__, argv)
    print(environment())
    variants = chosen(options.variants, VARIANTS)
    seeds, gradients = options.seeds, options.gradients

    def show(header: list[str], measure: Callable[[dict[str, Any]], list[str]]) -> None:
        rows = [[name, *measure(variant)] for name, variant in variants.items()]
        print("\n" + format_table([header, *rows]), flush=True)

    for rate in RATES:
        header = [f"quadratic, rate {rate:g}", "h", "1000 Var h", "1000 Var momentum"]
        show(header, lambda v, rate=rate: quadratic(v, rate, gradients * 2 // 5))
    header = [f"logistic regression, {4 * seeds} seeds", "KL at the end", "gradients until close"]
    show(header, lambda v: logistic(v, 4 * seeds, gradients))
    header = [f"digits, {seeds} seeds", "NLL, 32 samples", "NLL at the mean"]
    show(header, lambda v: digits(v, seeds, gradients // 5))


class Run:
    """Training with one variant; carried are parameters, state and the key of the estimator."""

    def __init__(self, loss: Callable[[PyTree, Any], Array], variant: dict[str, Any], **settings):
        options = {"samples": 1, "estimator": False, "momentum_dtype": None, **variant}
        self.loss, self.samples = loss, options.pop("samples")
        self.estimator = options.pop("estimator")
        self.tx = ivon(**settings, momentum_dtype=options.pop("momentum_dtype"))
        self.auto = partial(auto_sample, self.tx, num_samples=self.samples, **options)

    def init(self, params: PyTree, key: Array) -> PyTree:
        """What is carried before the first step."""
        return params, (self.tx if self.estimator else self.auto(key)).init(params), key

    def step(self, carry: PyTree, batches: Any) -> PyTree:
        """One step of the mean, from a batch for each of its samples on the leading axis."""
        params, state, key = carry
        if self.estimator:
            key, draw_key = jax.random.split(key)
            options = {"num_samples": self.samples, "antithetic": True, "split_batch": True}
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
            step = estimator_step(self.loss, self.tx, **options)
            return *step(draw_key, params, state, flat)[:2], key
        tx = self.auto(0)  # the key is in the state
        for i in range(self.samples):
            grads = jax.grad(self.loss)(params, jax.tree.map(lambda x, i=i: x[i], batches))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state, key

    def scan(self, carry: PyTree, keys: Array, draw: Callable, read: Any = lambda _: None) -> Any:
        """A step for each key, from the batches `draw(key)`; collects `read(state)`."""

        def body(carry: PyTree, key: Array) -> tuple[PyTree, Any]:
            carry = self.step(carry, draw(key))
            return carry, read(carry[1])

        return jax.lax.scan(body, carry, keys)


# --- 1. The quadratic -----------------------------------------------------------------------------


def quadratic(variant: dict[str, Any], rate: float, gradients: int) -> list[str]:
    """Bias of h, and variances in time of h and of the momentum, over independent weights."""
    settings = {"learning_rate": rate, "ess": 100.0, "b2": 0.99, "weight_decay": 0.0}
    run = Run(lambda w, noise: jnp.sum(0.5 * w**2 + w * noise), variant, **settings)
    size, steps = 2000, gradients // run.samples

    def read(state: Any) -> tuple[Array, Array]:
        state = state if run.estimator else state.inner_state
        return state.hess, state.momentum.astype(jnp.float32)

    @jax.jit
    def train(key: Array) -> tuple[Array, Array]:
        start, keys = run.init(jnp.zeros(size), key), jax.random.split(key, steps)
        noise = partial(jax.random.normal, shape=(run.samples, size))
        return run.scan(start, keys, lambda key: 0.1 * noise(key), read)[1]

    hess, momentum = (np.asarray(x[steps // 4 :], np.float64) for x in train(jax.random.key(0)))
    variances = 1e3 * hess.var(axis=0), 1e3 * momentum.var(axis=0)
    return [cell(hess.mean(axis=0), 4), cell(variances[0], 2), cell(variances[1], 3)]


# --- 2. Logistic regression -----------------------------------------------------------------------


def kl_to_posterior(signed: np.ndarray) -> Callable[[np.ndarray, np.ndarray], float]:
    """KL of a diagonal Gaussian, given by mean and standard deviations, to the posterior."""

    def energy(weights: np.ndarray) -> np.ndarray:
        likelihood = np.logaddexp(0.0, -(weights @ signed.T)).sum(axis=-1)
        return likelihood + 0.5 * PRIOR_PRECISION * np.sum(weights**2, axis=-1)

    def square(ticks: np.ndarray) -> np.ndarray:
        return np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1)

    ticks = np.linspace(-8.0, 20.0, 701)  # the tails beyond are negligible
    cell_area = (ticks[1] - ticks[0]) ** 2
    log_evidence = scipy.special.logsumexp(-energy(square(ticks))) + np.log(cell_area)
    # Expectations under q, by a rule of Gauss and Hermite in both directions.
    nodes, weights = scipy.special.roots_hermitenorm(40)
    weights = np.outer(weights, weights) / (2 * np.pi)

    def divergence(mean: np.ndarray, std: np.ndarray) -> float:
        expected = np.sum(weights * energy(mean + std * square(nodes)))
        entropy = np.sum(np.log(std)) + 1 + np.log(2 * np.pi)
        return float(expected - entropy + log_evidence)

    return divergence


def logistic(variant: dict[str, Any], seeds: int, gradients: int) -> list[str]:
    """KL at the end, and how many gradients it takes to come close to the best."""
    (petals, virginica), every = flowers(), 100
    signed = petals * np.where(virginica, 1.0, -1.0)[:, None]  # p(y|x) = σ(signed·w)
    divergence, data = kl_to_posterior(signed), jnp.asarray(signed, jnp.float32)
    best = scipy.optimize.minimize(
        lambda x: divergence(x[:2], np.exp(x[2:])), np.zeros(4), tol=1e-8
    ).fun
    run = Run(
        lambda weights, rows: jnp.mean(jax.nn.softplus(-(rows @ weights))),
        variant,
        learning_rate=lambda t: 0.03 * jnp.minimum(1.0, 300 / (t.astype(jnp.float32) + 1)) ** 0.5,
        ess=len(signed),
        hess_init=0.1,
        b2=0.999,
        weight_decay=PRIOR_PRECISION / len(signed),
    )
    rows = jax.vmap(lambda key: jax.random.choice(key, data, (5,), replace=False))

    def stretch(carry: PyTree, keys: Array) -> tuple[PyTree, tuple[Array, Array]]:
        carry, _ = run.scan(carry, keys, rows)
        q = posterior(carry[1], carry[0])
        return carry, (q.mean, q.precision**-0.5)

    @jax.jit
    @jax.vmap
    def train(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, (gradients // every, every // run.samples, run.samples))
        return jax.lax.scan(stretch, run.init(jnp.zeros(2), key), keys)[1]

    found = jax.device_get(train(jax.random.split(jax.random.key(0), seeds)))
    curves = np.vectorize(divergence, signature="(n),(n)->()")(*found)
    close = curves < best + 0.02
    first = np.where(close.any(axis=1), close.argmax(axis=1) + 1, curves.shape[1]) * every
    return [cell(curves[:, -10:].mean(axis=1), 4), cell(first, 0)]


# --- 3. Digits ------------------------------------------------------------------------------------


def digits(variant: dict[str, Any], seeds: int, gradients: int) -> list[str]:
    """Test NLL averaged over samples and at the mean."""
    images, labels, test_images, test_labels = map(jnp.asarray, load_small_digits()[:4])
    model: Any = Perceptron()
    steps = gradients // variant.get("samples", 1)
    settings = {"ess": len(images), "hess_init": 0.1, "b2": 0.999, "weight_decay": 1e-4}
    settings["learning_rate"] = warmup_cosine(0.5, steps)
    run = Run(classification_loss(model.apply), variant, **settings)

    def draw(key: Array) -> tuple[Array, Array]:
        rows = jax.random.randint(key, (run.samples, 50), 0, len(images))
        return images[rows], labels[rows]

    @jax.jit
    @jax.vmap
    def train(key: Array) -> tuple[Array, Array]:
        init_key, batch_key, sample_key = jax.random.split(key, 3)
        start = run.init(model.init(init_key, images[:1]), key)
        (params, state, _), _ = run.scan(start, jax.random.split(batch_key, steps), draw)
        q = posterior(state, params)
        averaged = predict_log_probs(model.apply, 32)(sample_key, q, test_images)
        at_mean = jax.nn.log_softmax(model.apply(q.mean, test_images))
        return metrics.nll(averaged, test_labels), metrics.nll(at_mean, test_labels)

    return [cell(x, 4) for x in jax.device_get(train(jax.random.split(jax.random.key(0), seeds)))]


if __name__ == "__main__":
    main()
