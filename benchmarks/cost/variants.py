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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy
from sklearn.datasets import load_iris

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment
from benchmarks._shared.methods import Array, cross_entropy, estimator_step, warmup_cosine
from benchmarks._shared.networks import Perceptron
from benchmarks.cost.contenders import known
from examples._shared.datasets import load_small_digits
from examples._shared.reporting import cell, format_table
from ivon_jax import auto_sample, ivon, metrics, posterior, posterior_mean, predict_log_probs

PyTree = Any

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
    """Runs on digits, and a quarter of those of the logistic regression."""
    gradients: int = 10_000
    """Of the logistic regression; the quadratic takes two fifths, digits a fifth of them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one table for each problem."""
    options = parse(Options, __doc__, argv)
    print(environment())
    chosen = {name: VARIANTS[name] for name in known(options.variants, VARIANTS)}
    seeds, gradients = options.seeds, options.gradients

    def show(header: list[str], measure: Callable[[dict[str, Any]], list[str]]) -> None:
        rows = [[name, *measure(variant)] for name, variant in chosen.items()]
        print("\n" + format_table([header, *rows]), flush=True)

    for rate in (0.1, 0.5):
        header = [f"quadratic, rate {rate:g}", "h", "1000 Var h", "1000 Var momentum"]
        show(header, lambda v, rate=rate: quadratic(v, rate, gradients * 2 // 5))
    header = [f"logistic regression, {4 * seeds} seeds", "KL at the end", "gradients until close"]
    show(header, lambda v: logistic(v, 4 * seeds, gradients))
    header = [f"digits, {seeds} seeds", "NLL, 32 samples", "NLL at the mean"]
    show(header, lambda v: digits(v, seeds, gradients // 5))


class Run:
    """A training run of one variant: a step from (carry, keys of the batches) to a carry."""

    def __init__(self, loss: Callable[[PyTree, Any], Array], variant: dict[str, Any], **settings):
        options = dict(variant)
        self.samples = options.pop("samples", 1)
        self.loss = loss
        self.estimator = options.pop("estimator", False)
        dtype = options.pop("momentum_dtype", None)
        self.inner = ivon(**settings, momentum_dtype=dtype)
        self.options = {**options, "num_samples": self.samples}

    def init(self, params: PyTree, key: Array) -> PyTree:
        """What is carried: parameters, state, and a key for the explicit estimator."""
        tx = self.inner if self.estimator else auto_sample(self.inner, key, **self.options)
        return params, tx.init(params), key

    def step(self, carry: PyTree, batches: Any) -> PyTree:
        """One step of the mean, from a batch for each of its samples on the leading axis."""
        params, state, key = carry
        if self.estimator:
            key, draw_key = jax.random.split(key)
            step = estimator_step(
                self.loss, self.inner, num_samples=2, antithetic=True, split_batch=True
            )
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
            params, state, _ = step(draw_key, params, state, flat)
            return params, state, key
        tx = auto_sample(self.inner, 0, **self.options)  # the key is in the state
        for i in range(self.samples):
            grads = jax.grad(self.loss)(params, jax.tree.map(lambda x, i=i: x[i], batches))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state, key


# --- 1. The quadratic -----------------------------------------------------------------------------


def quadratic(variant: dict[str, Any], rate: float, gradients: int) -> list[str]:
    """Bias of h, and variances in time of h and of the momentum, over independent weights."""

    def loss(w: Array, noise: Array) -> Array:
        return jnp.sum(0.5 * w**2 + w * noise)

    run = Run(loss, variant, learning_rate=rate, ess=100.0, b2=0.99, weight_decay=0.0)
    size, steps = 2000, gradients // run.samples

    def body(carry: PyTree, key: Array) -> tuple[PyTree, tuple[Array, Array]]:
        noise = 0.1 * jax.random.normal(key, (run.samples, size))
        carry = run.step(carry, noise)
        state = carry[1] if run.estimator else carry[1].inner_state
        return carry, (state.hess, state.momentum.astype(jnp.float32))

    @jax.jit
    def train(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, steps)
        return jax.lax.scan(body, run.init(jnp.zeros(size), key), keys)[1]

    hess, momentum = (np.asarray(x[steps // 4 :], np.float64) for x in train(jax.random.key(0)))
    return [
        cell(hess.mean(axis=0), 4),
        cell(1e3 * hess.var(axis=0), 2),
        cell(1e3 * momentum.var(axis=0), 3),
    ]


# --- 2. Logistic regression -----------------------------------------------------------------------

PRIOR_PRECISION = 0.1  # of each weight: a standard deviation of 3.2


def flowers() -> np.ndarray:
    """Standardised petal length and width of 20 irises times the label ±1, p(y|x) = σ(signed·w)."""
    features, species = load_iris(return_X_y=True)
    rows = np.flatnonzero(species > 0)[::5]
    petals = features[rows][:, 2:]
    petals = (petals - petals.mean(axis=0)) / petals.std(axis=0)
    return petals * np.where(species[rows] == 2, 1.0, -1.0)[:, None]


def energy(weights: np.ndarray, signed: np.ndarray) -> np.ndarray:
    """−log p(y, w) for weights (..., 2), up to a constant."""
    likelihood = np.logaddexp(0.0, -(weights @ signed.T)).sum(axis=-1)
    return likelihood + 0.5 * PRIOR_PRECISION * np.sum(weights**2, axis=-1)


def exact(signed: np.ndarray) -> Callable[[np.ndarray, np.ndarray], float]:
    """KL of a diagonal Gaussian, given by mean and standard deviations, to the posterior."""
    ticks = np.linspace(-8.0, 20.0, 701)  # the tails beyond are negligible
    grid = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1)
    cell_area = (ticks[1] - ticks[0]) ** 2
    log_evidence = scipy.special.logsumexp(-energy(grid, signed)) + np.log(cell_area)
    # Expectations under q, by a rule of Gauss and Hermite in both directions.
    nodes, weights = scipy.special.roots_hermitenorm(40)
    points = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1)
    weights = np.outer(weights, weights) / (2 * np.pi)

    def divergence(mean: np.ndarray, std: np.ndarray) -> float:
        expected = np.sum(weights * energy(mean + std * points, signed))
        entropy = np.sum(np.log(std)) + 1 + np.log(2 * np.pi)
        return float(expected - entropy + log_evidence)

    return divergence


def logistic(variant: dict[str, Any], seeds: int, gradients: int) -> list[str]:
    """KL at the end, and how many gradients it takes to come close to the best."""
    signed = flowers()
    divergence = exact(signed)
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
    data, every = jnp.asarray(signed, jnp.float32), 100

    def body(carry: PyTree, keys: Array) -> tuple[PyTree, None]:
        return run.step(
            carry, jax.vmap(lambda k: jax.random.choice(k, data, (5,), replace=False))(keys)
        ), None

    def stretch(carry: PyTree, keys: Array) -> tuple[PyTree, tuple[Array, Array]]:
        carry, _ = jax.lax.scan(body, carry, keys)
        q = posterior(carry[1], carry[0])
        return carry, (q.mean, q.precision**-0.5)

    @jax.jit
    @jax.vmap
    def train(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, (gradients // every, every // run.samples, run.samples))
        return jax.lax.scan(stretch, run.init(jnp.zeros(2), key), keys)[1]

    means, stds = jax.device_get(train(jax.random.split(jax.random.key(0), seeds)))
    curves = np.array(
        [
            [divergence(m, s) for m, s in zip(*run, strict=True)]
            for run in zip(means, stds, strict=True)
        ]
    )
    close = curves < best + 0.02
    first = np.where(close.any(axis=1), close.argmax(axis=1) + 1, curves.shape[1]) * every
    return [cell(curves[:, -10:].mean(axis=1), 4), cell(first, 0)]


# --- 3. Digits ------------------------------------------------------------------------------------


def digits(variant: dict[str, Any], seeds: int, gradients: int) -> list[str]:
    """Test NLL averaged over samples and at the mean."""
    images, labels, test_images, test_labels = map(jnp.asarray, load_small_digits()[:4])
    model: Any = Perceptron()

    def loss(params: PyTree, batch: Any) -> Array:
        return cross_entropy(model.apply(params, batch[0]), batch[1])

    steps = gradients // variant.get("samples", 1)
    run = Run(
        loss,
        variant,
        learning_rate=warmup_cosine(0.5, steps),
        ess=len(images),
        hess_init=0.1,
        b2=0.999,
        weight_decay=1e-4,
    )

    def body(carry: PyTree, key: Array) -> tuple[PyTree, None]:
        rows = jax.random.randint(key, (run.samples, 50), 0, len(images))
        return run.step(carry, (images[rows], labels[rows])), None

    @jax.jit
    @jax.vmap
    def train(key: Array) -> tuple[Array, Array]:
        init_key, batch_key, sample_key = jax.random.split(key, 3)
        carry = run.init(model.init(init_key, images[:1]), key)
        (params, state, _), _ = jax.lax.scan(body, carry, jax.random.split(batch_key, steps))
        averaged = predict_log_probs(model.apply, 32)(
            sample_key, posterior(state, params), test_images
        )
        at_mean = jax.nn.log_softmax(model.apply(posterior_mean(state, params), test_images))
        return metrics.nll(averaged, test_labels), metrics.nll(at_mean, test_labels)

    averaged, at_mean = jax.device_get(train(jax.random.split(jax.random.key(0), seeds)))
    return [cell(averaged, 4), cell(at_mean, 4)]


if __name__ == "__main__":
    main()
