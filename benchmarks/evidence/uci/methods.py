"""AdamW, MC-dropout, a deep ensemble and IVON on many small regressions at once.

A network has one hidden layer of 50 ReLUs, and all methods train with half the mean squared error
of standardised targets. The variance of the observations s² is not trained: it is the one under
which held-out targets are most likely, so that no method is punished for noise learned by
overfitting. Each lane of a `vmap` is one network with hyperparameters of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks._shared.methods import Values, ivon_step, plain_step, warmup_cosine
from benchmarks._shared.tuning import Grid
from ivon_jax import ivon, posterior, sample_params

HIDDEN = 50
BATCH = 32
SAMPLES = 100  # networks, or masks, that a prediction averages over
MEMBERS = 5
NOISE_LEVELS = jnp.geomspace(0.003, 1.5, 80)  # s, in units of the targets' standard deviation

ADAMW_GRID = {
    "learning_rate": (3e-3, 1e-2, 3e-2, 0.1),
    "weight_decay": (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3),
}
# 24 settings each; every grid was moved once, after a first one on `concrete` that chose at an
# edge. All share the number of steps and of gradient evaluations, of which the ensemble has five
# times as many. IVON's `sharpness` is ess/N: 1/s² would be Bayes.
GRIDS: dict[str, Grid] = {
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

Array = jax.Array
Params = dict[str, Array]
Data = tuple[Array, Array]


# --- The network ----------------------------------------------------------------------------------


def init(key: Array, features: int) -> Params:
    """He's initialisation."""
    one, two = jax.random.split(key)
    return {
        "w1": jax.random.normal(one, (features, HIDDEN)) * jnp.sqrt(2.0 / features),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(two, (HIDDEN,)) * jnp.sqrt(1.0 / HIDDEN),
        "b2": jnp.zeros(()),
    }


def apply(params: Params, x: Array, key: Any = None, rate: Any = None) -> Array:
    """Predictions (n,) for inputs (n, features).

    With a rate, inputs and hidden units are dropped, by a mask of its own for each example.
    """

    def drop(key: Array, values: Array) -> Array:
        kept = jax.random.bernoulli(key, 1.0 - rate, values.shape)
        return jnp.where(kept, values / (1.0 - rate), 0.0)

    one, two = (None, None) if rate is None else jax.random.split(key)
    hidden = jax.nn.relu((x if one is None else drop(one, x)) @ params["w1"] + params["b1"])
    return (hidden if two is None else drop(two, hidden)) @ params["w2"] + params["b2"]


def half_square(predicted: Array, y: Array) -> Array:
    """Half the mean squared error."""
    return 0.5 * jnp.mean((predicted - y) ** 2)


# --- Training and prediction ----------------------------------------------------------------------


def train(method: str, steps: int, key: Array, values: Values, data: Data) -> Any:
    """One network, five for the ensemble, or IVON's posterior."""
    if method == "ensemble":
        keys = jax.random.split(key, MEMBERS)
        return jax.vmap(lambda k: train("adamw", steps, k, values, data))(keys)
    x, y = data
    schedule = warmup_cosine(values["learning_rate"], steps)

    def loss(params: Params, batch: Any) -> Array:
        rows, mask_key = batch
        return half_square(apply(params, x[rows], mask_key, values.get("rate")), y[rows])

    if method == "ivon":
        ess = values["sharpness"] * len(y)
        decay = PRIOR_PRECISION / ess
        tx = ivon(schedule, ess, weight_decay=decay, b2=values["b2"], **IVON_FIXED)
        step = ivon_step(loss, tx)
    else:
        tx = optax.adamw(schedule, weight_decay=values["weight_decay"])
        step = plain_step(loss, tx)

    def one(carry: Any, key: Array) -> tuple[Any, None]:
        rows_key, step_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH,), 0, len(y))
        params, state, _ = step(step_key, carry[0], carry[1], (rows, step_key))
        return (params, state), None

    init_key, steps_key = jax.random.split(key)
    params = init(init_key, x.shape[1])
    keys = jax.random.split(steps_key, steps)
    params, state = jax.lax.scan(one, (params, tx.init(params)), keys)[0]
    return posterior(state) if method == "ivon" else params


def draws(method: str, key: Array, values: Values, fitted: Any, x: Array) -> Array:
    """Predictions of each sample, mask or member, (samples, n)."""
    keys = jax.random.split(key, SAMPLES)
    if method == "adamw":
        return apply(fitted, x)[None]
    if method == "ensemble":
        return jax.vmap(apply, (0, None))(fitted, x)
    if method == "dropout":
        return jax.lax.map(lambda k: apply(fitted, x, k, values["rate"]), keys)
    if method == "ivon_mean":
        return apply(fitted.mean, x)[None]
    return jax.lax.map(lambda k: apply(sample_params(k, fitted)[0], x), keys)


# --- Scores ---------------------------------------------------------------------------------------


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
