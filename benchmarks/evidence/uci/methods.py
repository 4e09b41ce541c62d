"""AdamW, MC-dropout, a deep ensemble and IVON on many small regressions at once.

A network has one hidden layer of 50 ReLUs, and all methods train with half the mean squared error
of standardised targets. The variance of the observations s² is not trained: it is the one under
which held-out targets are most likely, so that no method is punished for noise learned by
overfitting. Each lane of a `vmap` is one network with hyperparameters of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._shared import methods as shared
from benchmarks._shared.methods import Array, Batch, Values
from benchmarks._shared.networks import dropout
from benchmarks._shared.tuning import Grid
from ivon_jax import Eigenbasis, posterior, sample_params

HIDDEN = 50
BATCH = 32
SAMPLES = 100  # networks, or masks, that a prediction averages over
MEMBERS = 5
NOISE_LEVELS = jnp.geomspace(0.003, 1.5, 80)  # s, in units of the targets' standard deviation

ADAMW_GRID = {
    "learning_rate": (3e-3, 1e-2, 3e-2, 0.1),
    "weight_decay": (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1),
}
IVON_GRID = {
    "learning_rate": (0.3, 1.0, 2.0),
    "sharpness": (20.0, 80.0, 320.0, 1280.0),
    "b2": (0.999, 0.9999),
}
# 24 settings each; every grid was moved towards what was chosen at an edge, on `concrete` and then
# on `yacht`. All share the number of steps and of gradient evaluations, of which the ensemble has
# five times as many. IVON's `sharpness` is ess/N: 1/s² would be Bayes.
GRIDS: dict[str, Grid] = {
    "adamw": ADAMW_GRID,
    "dropout": {
        "learning_rate": (3e-3, 1e-2, 3e-2),
        "weight_decay": (3e-5, 5e-4),
        "rate": (0.002, 0.005, 0.01, 0.05),
    },
    "ensemble": ADAMW_GRID,
    "ivon": IVON_GRID,
    "eigenbasis": IVON_GRID,
}
# λδ = 1: weights of order one.
IVON_FIXED = {"hess_init": 0.5, "precision_floor": 0.1, "prior_precision": 1.0}
FIXED = {"ivon": IVON_FIXED, "eigenbasis": {**IVON_FIXED, "basis": Eigenbasis(decay=0.99)}}

Params = dict[str, Array]
Data = tuple[Array, Array]


# --- The network ----------------------------------------------------------------------------------


def init(key: Array, features: int) -> Params:
    """He's initialisation."""
    one, two = jax.random.split(key)
    return {
        "w1": jax.random.normal(one, (features, HIDDEN)) * jnp.sqrt(2.0 / features),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(two, (HIDDEN, 1)) * jnp.sqrt(1.0 / HIDDEN),
        "b2": jnp.zeros(()),
    }


def apply(params: Params, x: Array, key: Any = None, rate: Any = None) -> Array:
    """Predictions (n,) for inputs (n, features).

    With a rate, inputs and hidden units are dropped, by a mask of its own for each example.
    """
    x = dropout(lambda: jax.random.split(key)[0], x, rate)
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    hidden = dropout(lambda: jax.random.split(key)[1], hidden, rate)
    return (hidden @ params["w2"])[:, 0] + params["b2"]


def half_square(predicted: Array, y: Array) -> Array:
    """Half the mean squared error."""
    return 0.5 * jnp.mean((predicted - y) ** 2)


# --- Training and prediction ----------------------------------------------------------------------


def train(method: str, steps: int, key: Array, values: Values, data: Data) -> Any:
    """One network, five for the ensemble, or IVON's posterior."""
    if method == "ensemble":
        keys = jax.random.split(key, MEMBERS)
        return jax.vmap(lambda k: train("adamw", steps, k, values, data))(keys)

    def loss(params: Params, batch: Batch) -> Array:
        x, y, mask_key = batch
        return half_square(apply(params, x, mask_key, values.get("rate")), y)

    name = "ivon" if method in FIXED else "adamw"
    tx = shared.optimizer(name, {**values, **FIXED.get(method, {})}, steps, len(data[1]))
    update = shared.step_of(name, loss, tx)

    def step(key: Array, params: Params, state: Any, batch: Batch) -> tuple[Params, Any, Array]:
        return update(key, params, state, (*batch, key))

    init_key, steps_key = jax.random.split(key)
    params = init(init_key, data[0].shape[1])
    keys = jax.random.split(steps_key, steps)
    carry = (params, tx.init(params))
    (params, state), _ = shared.scan_random_batches(step, BATCH, data, carry, keys)
    return posterior(state) if method in FIXED else params


def fit_and_predict(
    method: str, steps: int, key: Array, values: Values, data: Data, x: Array
) -> dict[str, Array]:
    """Predictions of each sample, mask or member, (samples, n); with IVON also of the mean.

    They are named by the suffix of the results: "", and "_mean".
    """
    fitted = train(method, steps, key, values, data)
    keys = jax.random.split(jax.random.fold_in(key, 1), SAMPLES)
    if method == "adamw":
        return {"": apply(fitted, x)[None]}
    if method == "ensemble":
        return {"": jax.vmap(apply, (0, None))(fitted, x)}
    if method == "dropout":
        return {"": jax.lax.map(lambda k: apply(fitted, x, k, values["rate"]), keys)}
    sampled = jax.lax.map(lambda k: apply(sample_params(k, fitted)[0], x), keys)
    return {"": sampled, "_mean": apply(fitted.mean, x)[None]}


# --- Scores ---------------------------------------------------------------------------------------


def log_likelihood(predicted: Array, y: Array, noise: Array) -> Array:
    """Mean log density of the mixture of Gaussians, mean_s N(y; f_s, s²)."""
    log_p = shared.average(-0.5 * ((predicted - y) / noise) ** 2)
    return jnp.mean(log_p) - jnp.log(noise) - 0.5 * jnp.log(2 * jnp.pi)


def best_noise(predicted: Array, y: Array) -> tuple[Array, Array]:
    """The s of `NOISE_LEVELS` under which the targets are most likely, and that likelihood."""
    scores = jax.lax.map(lambda s: log_likelihood(predicted, y, s), NOISE_LEVELS)
    return NOISE_LEVELS[jnp.argmax(scores)], jnp.max(scores)


def root_mean_square(predicted: Array, y: Array) -> Array:
    """RMSE of the averaged prediction."""
    return jnp.sqrt(jnp.mean((predicted.mean(0) - y) ** 2))
