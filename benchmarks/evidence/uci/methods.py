"""AdamW, MC-dropout, a deep ensemble and IVON on many small regressions at once.

A network has one hidden layer of 50 ReLUs, and all methods train with half the mean squared error
of standardised targets. The variance of the observations s² is not trained: it is the one under
which held-out targets are most likely, so that no method is punished for noise learned by
overfitting. Each lane of a `vmap` is one network with hyperparameters of its own.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ivon_jax import ivon, posterior, sample_params

HIDDEN = 50
BATCH = 32
SAMPLES = 100  # networks, or masks, that a prediction averages over
MEMBERS = 5
WARMUP_SHARE = 0.05
NOISE_LEVELS = jnp.geomspace(0.003, 1.5, 80)  # s, in units of the targets' standard deviation

ADAMW_GRID = {
    "learning_rate": (3e-3, 1e-2, 3e-2, 0.1),
    "weight_decay": (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3),
}
# 24 settings each; every grid was moved once, after a first one on `concrete` that chose at an
# edge. All share the number of steps and of gradient evaluations, of which the ensemble has five
# times as many. IVON's `sharpness` is ess/N: 1/s² would be Bayes.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "adamw": ADAMW_GRID,
    "dropout": {
        "learning_rate": (1e-2, 3e-2, 0.1),
        "weight_decay": (1e-4, 1e-3),
        "rate": (0.002, 0.005, 0.01, 0.05),
    },
    "ensemble": ADAMW_GRID,
    "ivon": {
        "learning_rate": (0.15, 0.5, 1.0),
        "sharpness": (20.0, 80.0, 320.0, 1280.0),
        "b2": (0.999, 0.9999),
    },
}
IVON_FIXED: dict[str, Any] = {"hess_init": 0.5, "precision_floor": 0.1}
PRIOR_PRECISION = 1.0  # λδ: weights of order one
LABELS = {
    "adamw": "AdamW",
    "dropout": "MC-dropout",
    "ensemble": "ensemble of 5",
    "ivon": "IVON, 100 samples",
    "ivon_mean": "IVON at the mean",
}

Array = jax.Array
Params = dict[str, Array]
Values = Mapping[str, Any]
Data = tuple[Array, Array]


class Fit(NamedTuple):
    """What training is told that is the same for all lanes."""

    steps: int
    samples: int = SAMPLES


def grid(method: str) -> dict[str, Array]:
    """All settings of a method, each name with an array of 24 values."""
    names = list(GRIDS[method])
    columns = zip(*itertools.product(*GRIDS[method].values()), strict=True)
    return {name: jnp.array(column) for name, column in zip(names, columns, strict=True)}


def init(key: Array, features: int) -> Params:
    """He's initialisation."""
    one, two = jax.random.split(key)
    return {
        "w1": jax.random.normal(one, (features, HIDDEN)) * jnp.sqrt(2.0 / features),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(two, (HIDDEN,)) * jnp.sqrt(1.0 / HIDDEN),
        "b2": jnp.zeros(()),
    }


def apply(params: Params, x: Array) -> Array:
    """Predictions (n,) for inputs (n, features)."""
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def apply_dropout(params: Params, x: Array, key: Array, rate: Array) -> Array:
    """The same with dropout of inputs and of hidden units, a mask of its own for each example."""
    one, two = jax.random.split(key)

    def drop(key: Array, values: Array) -> Array:
        kept = jax.random.bernoulli(key, 1.0 - rate, values.shape)
        return jnp.where(kept, values / (1.0 - rate), 0.0)

    hidden = jax.nn.relu(drop(one, x) @ params["w1"] + params["b1"])
    return drop(two, hidden) @ params["w2"] + params["b2"]


def half_square(predicted: Array, y: Array) -> Array:
    """Half the mean squared error."""
    return 0.5 * jnp.mean((predicted - y) ** 2)


def schedule(peak: Array, steps: int) -> optax.Schedule:
    """Warmup, then cosine to zero."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, round(WARMUP_SHARE * steps)), steps)
    return lambda count: peak * shape(count)


def fit_plain(fit: Fit, key: Array, values: Values, data: Data) -> Params:
    """AdamW, through dropout where `values` has a rate."""
    x, y = data
    tx = optax.adamw(
        schedule(values["learning_rate"], fit.steps), weight_decay=values["weight_decay"]
    )
    init_key, steps_key = jax.random.split(key)
    params = init(init_key, x.shape[1])

    def loss(params: Params, key: Array, rows: Array) -> Array:
        if "rate" in values:
            return half_square(apply_dropout(params, x[rows], key, values["rate"]), y[rows])
        return half_square(apply(params, x[rows]), y[rows])

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, state = carry
        rows_key, mask_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH,), 0, len(y))
        updates, state = tx.update(jax.grad(loss)(params, mask_key, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(steps_key, fit.steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def fit_ivon(fit: Fit, key: Array, values: Values, data: Data) -> Any:
    """IVON; returns its posterior."""
    x, y = data
    ess = values["sharpness"] * len(y)
    tx = ivon(
        schedule(values["learning_rate"], fit.steps),
        ess,
        weight_decay=PRIOR_PRECISION / ess,
        b2=values["b2"],
        **IVON_FIXED,
    )
    init_key, steps_key = jax.random.split(key)

    def step(state: Any, key: Array) -> tuple[Any, None]:
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH,), 0, len(y))
        sample, noise = sample_params(noise_key, state)
        grads = jax.grad(lambda p: half_square(apply(p, x[rows]), y[rows]))(sample)
        return tx.update(grads, state, noise=noise)[1], None

    keys = jax.random.split(steps_key, fit.steps)
    return posterior(jax.lax.scan(step, tx.init(init(init_key, x.shape[1])), keys)[0])


def draws(fit: Fit, method: str, key: Array, values: Values, fitted: Any, x: Array) -> Array:
    """Predictions of each sample, mask or member, (samples, n)."""
    keys = jax.random.split(key, fit.samples)
    if method == "adamw":
        return apply(fitted, x)[None]
    if method == "ensemble":
        return jax.vmap(apply, (0, None))(fitted, x)
    if method == "dropout":
        return jax.lax.map(lambda k: apply_dropout(fitted, x, k, values["rate"]), keys)
    if method == "ivon_mean":
        return apply(fitted.mean, x)[None]
    return jax.lax.map(lambda k: apply(sample_params(k, fitted)[0], x), keys)


def train(fit: Fit, method: str, key: Array, values: Values, data: Data) -> Any:
    """One network, five for the ensemble, or a posterior."""
    if method == "ivon":
        return fit_ivon(fit, key, values, data)
    if method == "ensemble":
        keys = jax.random.split(key, MEMBERS)
        return jax.vmap(lambda k: fit_plain(fit, k, values, data))(keys)
    return fit_plain(fit, key, values, data)


def log_likelihood(predicted: Array, y: Array, noise: Array) -> Array:
    """Mean log density of the mixture of Gaussians, mean_s N(y; f_s, s²)."""
    squares = ((predicted - y) / noise) ** 2
    log_p = jax.nn.logsumexp(-0.5 * squares, axis=0) - jnp.log(float(len(predicted)))
    return jnp.mean(log_p) - jnp.log(noise) - 0.5 * jnp.log(2 * jnp.pi)


def best_noise(predicted: Array, y: Array) -> tuple[Array, Array]:
    """The s of `NOISE_LEVELS` under which the targets are most likely, and that likelihood."""
    scores = jax.lax.map(lambda s: log_likelihood(predicted, y, s), NOISE_LEVELS)
    return NOISE_LEVELS[jnp.argmax(scores)], jnp.max(scores)


def root_mean_square(predicted: Array, y: Array) -> Array:
    """RMSE of the averaged prediction."""
    return jnp.sqrt(jnp.mean((predicted.mean(0) - y) ** 2))
