"""What antithetic samples, a lean state and a bfloat16 momentum do to what is learned.

    pip install -e ".[examples]"
    python benchmarks/variants.py                    # about two minutes on two cores

Every row spends the same number of gradients. All numbers are from live training, in which mean,
curvature and momentum move together, as mean ± standard error.

1. A quadratic with curvature 1 and noisy gradients: the average h that is learned (1 is right), and
   the variances of h and of the momentum around their averages in time.
2. Logistic regression with two weights (examples/logistic_2d.py): KL from q to the exact posterior,
   at the end and the number of gradients until it is 0.02 above the best diagonal Gaussian's.
3. Digits, a perceptron 64-128-128-10: test NLL averaged over 32 samples, and at the mean.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._shared.measuring import environment, format_table
from benchmarks.cost import models
from benchmarks.evidence.uses.logistic_2d import PRIOR_PRECISION, draw_batch, flowers, loss_fn
from benchmarks.evidence.uses.logistic_2d_exact import Diagonal as Gaussian
from benchmarks.evidence.uses.logistic_2d_exact import (
    exact_posterior,
    free_energy,
    optimal_diagonal,
)
from examples._shared.datasets import load_small_digits
from examples._shared.reporting import cell, positive
from ivon_jax import auto_sample, ivon, mc_value_and_grad, posterior, posterior_mean, sample_params

PyTree = Any
Array = jax.Array

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


class Run:
    """A training run of one variant: a step from (carry, keys of the batches) to a carry."""

    def __init__(self, loss: Callable[[PyTree, Any], Array], variant: dict[str, Any], **settings):
        options = dict(variant)
        self.samples = options.pop("samples", 1)
        self.loss = loss
        self.estimator = options.pop("estimator", False)
        dtype = options.pop("momentum_dtype", None)
        self.inner = ivon(**settings, momentum_dtype=dtype)
        self.options = {**options, "mc_samples": self.samples}

    def init(self, params: PyTree, key: Array) -> PyTree:
        """What is carried: parameters, state, and a key for the explicit estimator."""
        tx = self.inner if self.estimator else auto_sample(self.inner, key, **self.options)
        return params, tx.init(params), key

    def step(self, carry: PyTree, batches: Any) -> PyTree:
        """One step of the mean, from a batch for each of its samples on the leading axis."""
        params, state, key = carry
        if self.estimator:
            key, draw_key = jax.random.split(key)
            estimate = mc_value_and_grad(self.loss, 2, antithetic=True, split_batch=True)
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
            _, grads, hess = estimate(draw_key, state, flat)
            updates, state = self.inner.update(grads, state, params, hess=hess)
            return optax.apply_updates(params, updates), state, key
        tx = auto_sample(self.inner, 0, **self.options)  # the key is in the state
        for i in range(self.samples):
            batch = jax.tree.map(lambda x, i=i: x[i], batches)
            grads = jax.grad(self.loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state, key


def ivon_state(state: PyTree) -> Any:
    """The state of ivon in one of either form."""
    return state.inner_state if hasattr(state, "inner_state") else state


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
        state = ivon_state(carry[1])
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


def logistic(variant: dict[str, Any], seeds: int, gradients: int) -> list[str]:
    """KL at the end, and how many gradients it takes to come close to the best."""
    signed = flowers()
    evidence = exact_posterior(signed).log_evidence

    def divergence(mean: np.ndarray, std: np.ndarray) -> float:
        return free_energy(Gaussian(mean, std), signed)[0] + evidence

    best = divergence(*optimal_diagonal(signed))
    run = Run(
        loss_fn,
        variant,
        learning_rate=lambda t: 0.03 * jnp.minimum(1.0, 300 / (t.astype(jnp.float32) + 1)) ** 0.5,
        ess=len(signed),
        hess_init=0.1,
        b2=0.999,
        weight_decay=PRIOR_PRECISION / len(signed),
    )
    data, every = jnp.asarray(signed, jnp.float32), 100

    def body(carry: PyTree, keys: Array) -> tuple[PyTree, None]:
        return run.step(carry, jax.vmap(lambda k: draw_batch(k, data))(keys)), None

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
    model = models.mlp(128, 128)
    images, test_images = images.reshape(-1, 64), test_images.reshape(-1, 64)

    def rate(t: Array) -> Array:
        done = t.astype(jnp.float32) * run.samples / gradients
        return 0.5 * jnp.minimum(1.0, 20 * done) * (1 + jnp.cos(jnp.pi * done)) / 2

    run = Run(
        model.loss,
        variant,
        learning_rate=rate,
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
        carry = run.init(model.init(init_key), key)
        keys = jax.random.split(batch_key, gradients // run.samples)
        (params, state, _), _ = jax.lax.scan(body, carry, keys)

        def probabilities(weights: PyTree) -> Array:
            one = jax.vmap(lambda x, y: jnp.exp(-model.loss(weights, (x[None], y[None]))))
            return one(test_images, test_labels)

        q = posterior(state, params)
        samples = jax.vmap(lambda k: probabilities(sample_params(k, q)[0]))
        averaged = samples(jax.random.split(sample_key, 32)).mean(axis=0)
        at_mean = probabilities(posterior_mean(state, params))
        return -jnp.log(averaged).mean(), -jnp.log(at_mean).mean()

    averaged, at_mean = jax.device_get(train(jax.random.split(jax.random.key(0), seeds)))
    return [cell(averaged, 4), cell(at_mean, 4)]


def main() -> None:
    """Prints one table for each problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--seeds", type=positive, default=10, help="for digits (default: 10)")
    args = parser.parse_args()
    print(environment())
    chosen = {name: VARIANTS[name] for name in args.variants}
    for rate in (0.1, 0.5):
        rows = [[name, *quadratic(v, rate, 4000)] for name, v in chosen.items()]
        header = [f"quadratic, rate {rate:g}", "h", "1000 Var h", "1000 Var momentum"]
        print("\n" + format_table([header, *rows]), flush=True)
    rows = [[name, *logistic(v, 40, 10_000)] for name, v in chosen.items()]
    header = ["logistic regression, 40 seeds", "KL at the end", "gradients until close"]
    print("\n" + format_table([header, *rows]), flush=True)
    rows = [[name, *digits(v, args.seeds, 2000)] for name, v in chosen.items()]
    header = [f"digits, {args.seeds} seeds", "NLL, 32 samples", "NLL at the mean"]
    print("\n" + format_table([header, *rows]), flush=True)


if __name__ == "__main__":
    main()
