"""Approximations of a posterior, each with the same number of gradients in all.

A fit returns a function that draws outputs on the test set. Runs that are trained together are one
`vmap`; an ensemble, or a mixture, of k divides the gradients among its runs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from benchmarks._shared import methods as shared
from benchmarks._shared.tuning import Grid
from benchmarks.evidence.images.methods import RANK, draw_swag, swag_of
from benchmarks.evidence.inference.problems import Problem
from ivon_jax import (
    Eigenbasis,
    Posterior,
    kl_divergence,
    mixture,
    posterior,
    predict_samples,
    recipes,
    sample_params,
)

Array = jax.Array
BATCH_SIZE = 50
SAMPLES = 512
RUNS = (1, 2, 4, 8)
COLLECT = 0.25  # share of a run of SWAG in which weights are collected

RATES = (
    5e-4,
    1e-3,
    2e-3,
    3e-3,
    5e-3,
    7e-3,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.07,
    0.1,
    0.15,
    0.2,
    0.3,
)
IVON_GRID = {"learning_rate": (0.01, 0.05, 0.3, 1.5), "hess_init": (0.003, 0.03, 0.3, 1.0)}
# Sixteen settings each. `rate` is SWAG's in its last quarter, `drop` of MC-dropout.
GRIDS: dict[str, Grid] = {
    "map": {"learning_rate": RATES},
    "laplace": {"learning_rate": RATES},
    "dropout": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "drop": (0.003, 0.01, 0.05, 0.3)},
    "swag": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "rate": (0.01, 0.03, 0.1, 0.3)},
    "ivon": IVON_GRID,
    "ivon_nll": IVON_GRID,
    "ivon_basis": IVON_GRID,
}
BASIS = Eigenbasis(decay=0.99)


@partial(jax.jit, static_argnames=("problem", "method", "runs", "gradients"))
def predictions(
    problem: Problem, method: str, runs: int, gradients: int, key: Array, values: Mapping[str, Any]
) -> Array:
    """Outputs on the test set at samples of the approximation, (samples, n[, classes])."""
    fit_key, draw_key = jax.random.split(key)
    fit = partial(FITS[method], problem, gradients // runs, values)
    keys = jax.random.split(fit_key, runs)
    # jaxlib 0.10.2 crashes on the CPU in a `vmap` of the training and the Jacobian together.
    fitted = jax.lax.map(fit, keys) if method == "laplace" else jax.vmap(fit)(keys)
    return draw(problem, method, fitted, values, draw_key)


@partial(jax.jit, static_argnames=("problem", "method", "runs", "gradients"))
def free_energy(
    problem: Problem, method: str, runs: int, gradients: int, key: Array, values: Mapping[str, Any]
) -> Array:
    """What IVON minimises, per training example, where its runs end: E_q[loss] + KL(q‖p)/N."""
    number = len(problem.train.y)

    def one(key: Array) -> Array:
        fit_key, key = jax.random.split(key)
        q = FITS[method](problem, gradients // runs, values, fit_key)
        zero, flat = (optax.tree.full_like(q.mean, x) for x in (0.0, problem.precision))
        loss = lambda k: problem.loss(sample_params(k, q)[0], problem.train)  # noqa: E731
        losses = jax.lax.map(loss, jax.random.split(key, SAMPLES // runs))
        return losses.mean() + kl_divergence(q, Posterior(zero, flat)) / number

    return jax.vmap(one)(jax.random.split(key, runs)).mean()


@partial(jax.jit, static_argnames=("problem", "gradients"))
def objective_at_mode(
    problem: Problem, gradients: int, key: Array, values: Mapping[str, Any]
) -> Array:
    """What `fit_map` minimises, where one run of it ends."""
    return problem.penalised(fit_map(problem, gradients, values, key), problem.train)


# --- Fits, of one run -----------------------------------------------------------------------------


def _train(problem: Problem, tx: Any, step: Any, num_steps: int, key: Array) -> Any:
    init_key, key = jax.random.split(key)
    params = problem.init(init_key)
    carry, keys = (params, tx.init(params)), jax.random.split(key, num_steps)
    return shared.scan_random_batches(step, BATCH_SIZE, problem.train, carry, keys)[0]


def fit_ivon(
    problem: Problem,
    num_steps: int,
    values: Mapping[str, Any],
    key: Array,
    basis: Eigenbasis | None = None,
) -> Any:
    """IVON at temperature 1 and with the prior of the problem: its posterior."""
    number, b2 = len(problem.train.y), recipes.b2_for(num_steps)
    fixed = {"prior_precision": problem.precision, "b2": b2, "basis": basis}
    tx = shared.optimizer("ivon", {**values, **fixed}, num_steps, number)
    step = shared.ivon_step(problem.loss, tx)
    return posterior(_train(problem, tx, step, num_steps, key)[1])


def fit_map(problem: Problem, num_steps: int, values: Mapping[str, Any], key: Array) -> Any:
    """The mode of the posterior, by Adam; with `drop`, under dropout."""
    tx = optax.adam(shared.warmup_cosine(values["learning_rate"], num_steps))

    def step(key: Array, params: Any, state: Any, batch: Any) -> Any:
        loss = lambda p, b: problem.penalised(p, b, _mask(key, values))  # noqa: E731
        return shared.plain_step(loss, tx)(key, params, state, batch)

    return _train(problem, tx, step, num_steps, key)[0]


def fit_swag(problem: Problem, num_steps: int, values: Mapping[str, Any], key: Array) -> Any:
    """Moments of SGD's weights in the last quarter of a run."""
    last = max(1, round(COLLECT * num_steps / RANK)) * RANK
    first, end = num_steps - last, values["rate"]
    shape = shared.warmup_cosine(1.0, first)
    tx = optax.sgd(lambda t: end + (values["learning_rate"] - end) * shape(t), momentum=0.9)
    step = shared.plain_step(problem.penalised, tx)
    begin_key, *keys = jax.random.split(key, RANK + 1)
    init_key, begin_key = jax.random.split(begin_key)
    params = problem.init(init_key)

    def run(carry: Any, keys: Array) -> Any:
        carry, _ = shared.scan_random_batches(step, BATCH_SIZE, problem.train, carry, keys)
        return carry, carry[0]

    carry, _ = run((params, tx.init(params)), jax.random.split(begin_key, first))
    parts = jax.vmap(lambda k: jax.random.split(k, last // RANK))(jnp.stack(keys))
    return swag_of(jax.lax.scan(run, carry, parts)[1])


def fit_laplace(problem: Problem, num_steps: int, values: Mapping[str, Any], key: Array) -> Any:
    """The mode, and a root of the full covariance: the generalised Gauss-Newton matrix there."""
    mode = fit_map(problem, num_steps, values, key)
    flat, unravel = ravel_pytree(mode)

    def outputs(flat: Array) -> Array:
        return problem.apply(unravel(flat), problem.train.x)

    jacobian = jax.jacobian(outputs)(flat)
    if problem.noise is None:  # Σ_k p_k ∇log p_k ∇log p_kᵀ is the matrix of the softmax
        jacobian = (jnp.exp(0.5 * outputs(flat))[..., None] * jacobian).reshape(-1, flat.size)
    else:
        jacobian = jacobian / problem.noise
    hessian = jacobian.T @ jacobian + problem.precision * jnp.eye(flat.size)
    return mode, jnp.linalg.cholesky(hessian)


FITS: dict[str, Callable[..., Any]] = {
    "map": fit_map,
    "laplace": fit_laplace,
    "dropout": fit_map,
    "swag": fit_swag,
    "ivon": fit_ivon,
    "ivon_nll": fit_ivon,
    "ivon_basis": partial(fit_ivon, basis=BASIS),
}


# --- Draws ----------------------------------------------------------------------------------------


def draw(
    problem: Problem, method: str, fitted: Any, values: Mapping[str, Any], key: Array
) -> Array:
    """Outputs on the test set at samples that are divided among the runs; a mode has one."""
    if method.startswith("ivon"):
        return predict_samples(problem.apply, SAMPLES)(key, mixture(fitted), problem.test.x)
    if method == "map":
        return jax.vmap(problem.apply, (0, None))(fitted, problem.test.x)
    runs = len(jax.tree.leaves(fitted)[0])
    keys = jax.random.split(key, (runs, SAMPLES // runs))
    one = partial(ONE_DRAW[method], problem, values)
    found = jax.vmap(lambda q, keys: jax.lax.map(partial(one, q), keys))(fitted, keys)
    return found.reshape(-1, *found.shape[2:])


def one_of_dropout(problem: Problem, values: Mapping[str, Any], params: Any, key: Array) -> Array:
    """Outputs under a mask."""
    return problem.apply(params, problem.test.x, _mask(key, values))


def one_of_swag(problem: Problem, values: Mapping[str, Any], fitted: Any, key: Array) -> Array:
    """Outputs at a sample of SWAG's Gaussian."""
    del values
    return problem.apply(draw_swag(key, fitted), problem.test.x)


def one_of_laplace(problem: Problem, values: Mapping[str, Any], fitted: Any, key: Array) -> Array:
    """Outputs of the network linearised at the mode, as the authors of `laplace` advise."""
    del values
    mode, root = fitted
    flat, unravel = ravel_pytree(mode)
    noise = jax.random.normal(key, flat.shape)
    step = jax.scipy.linalg.solve_triangular(root.T, noise, lower=False)
    out, moved = jax.jvp(lambda p: problem.apply(p, problem.test.x), (mode,), (unravel(step),))
    return out + moved if problem.noise else jax.nn.log_softmax(out + moved)


def _mask(key: Array, values: Mapping[str, Any]) -> Callable[[Array], Array] | None:
    if "drop" not in values:
        return None
    kept = 1.0 - values["drop"]
    return lambda x: jnp.where(jax.random.bernoulli(key, kept, x.shape), x / kept, 0.0)


ONE_DRAW: dict[str, Callable[..., Array]] = {
    "laplace": one_of_laplace,
    "dropout": one_of_dropout,
    "swag": one_of_swag,
}
