"""Uncertainty in the gap between two clusters of data: AdamW, IVON, and a mixture of IVON runs.

Run `python examples/regression_1d.py`. A network with one hidden layer is fitted to 40 points in
[-2, -1] and [1, 2] with known noise. Look at the band between the clusters: AdamW's has the width
of the noise everywhere, IVON's widens. A mixture of five runs (`fit_mixture`) is hardly wider here:
with so few data they end in much the same posterior. (On digits they do not: see the guide on
prediction.)

Every seed draws a true function from the network's prior, so that exact inference would be
calibrated: its 95 % band would hold 95 % of new points. IVON's does inside the clusters; in the gap
and outside one diagonal Gaussian is too narrow.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from examples._shared.reporting import COLORS, cell, format_table, save_figure
from examples._shared.training import train
from examples._shared.training import warmup_cosine as schedule
from ivon_jax import (
    Moments,
    Posterior,
    auto_sample,
    ivon,
    metrics,
    mixture,
    posterior,
    predict_moments,
)

WIDTH = 16
NOISE = 0.1  # standard deviation of an observation, known to both methods
NUM_TRAIN = 40
MEMBERS = 5  # of the mixture
SAMPLES = 500  # of a posterior, or of all members together
# ess = N and a prior precision of ess · weight_decay = 1: plain Bayes.
SETTINGS: Any = {"ess": NUM_TRAIN, "weight_decay": 1 / NUM_TRAIN, "hess_init": 3.0, "b2": 0.999}
BAND = 1.96  # standard deviations on either side hold 95 % of a Gaussian

Array = jax.Array


class Problem(NamedTuple):
    """One data set: training points in the two clusters, test points everywhere."""

    x: Array
    y: Array
    test_x: Array
    test_f: Array  # the true function
    test_y: Array  # with noise


def main(seeds: int = 10, steps: int = 20_000, figure: Path = Path("regression_1d.png")) -> None:
    """Fits every data set by all methods, prints the table and writes the figure."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.arange(seeds))
    problems = jax.vmap(draw_problem)(keys[:, 0])
    starts = jax.vmap(draw_members)(keys[:, 1])
    fits = {"AdamW": fit_adamw, "IVON": fit_ivon, f"{MEMBERS} of IVON": fit_mixture}
    methods = {
        name: jax.vmap(partial(fit, steps))(problems, starts, keys[:, 2])
        for name, fit in fits.items()
    }
    print(f"\n{table(methods, problems)}\n")
    print(
        f"Mean ± standard error over {seeds} data sets. std of f: of the function, without "
        "noise.\nNLL and band: of noisy test points; the NLL is better if lower."
    )
    save_figure(draw(methods, problems), figure)


def network(weights: Array, x: Array) -> Array:
    """Maps inputs (n,) to function values (n,) by one hidden tanh layer.

    The scales make N(0, 1) the prior of every weight: one weight decay fits all.
    """
    slope, bias, out = weights[: 3 * WIDTH].reshape(3, 1, WIDTH)
    hidden = jnp.tanh(2.0 * (x[:, None] * slope + bias))
    return hidden @ out[0] * (1.5 / WIDTH**0.5) + weights[-1]


def draw_weights(key: Array) -> Array:
    """Draws the network's weights from the prior N(0, I)."""
    return jax.random.normal(key, (3 * WIDTH + 1,))


def draw_members(key: Array) -> Array:
    """Initial weights of every member; a single network takes the first."""
    return jax.vmap(draw_weights)(jax.random.split(key, MEMBERS))


def draw_problem(key: Array) -> Problem:
    """Draws a true function from the prior, and observations of it."""
    function_key, place_key, train_key, test_key = jax.random.split(key, 4)
    truth = draw_weights(function_key)
    distance = jax.random.uniform(place_key, (NUM_TRAIN,), minval=1.0, maxval=2.0)
    x = jnp.where(jnp.arange(NUM_TRAIN) < NUM_TRAIN // 2, -distance, distance)
    y = network(truth, x) + NOISE * jax.random.normal(train_key, x.shape)
    test_x = jnp.linspace(-3.0, 3.0, 301)
    test_f = network(truth, test_x)
    return Problem(x, y, test_x, test_f, test_f + NOISE * jax.random.normal(test_key, test_x.shape))


def loss_fn(weights: Array, batch: tuple[Array, Array]) -> Array:
    """The mean negative log-likelihood per point, up to a constant."""
    x, y = batch
    return jnp.mean((network(weights, x) - y) ** 2) / (2 * NOISE**2)


def fit_adamw(steps: int, problem: Problem, starts: Array, key: Array) -> Moments:
    """Predictions of one network: the noise is all the uncertainty it has."""
    tx = optax.adamw(schedule(1e-3, steps), weight_decay=1.0)
    run = partial(train, epochs=steps, batch_size=NUM_TRAIN)  # full batches: a step per epoch
    weights, _ = run(tx, loss_fn, starts[0], (problem.x, problem.y), key=key, label="AdamW")
    mean = network(weights, problem.test_x)
    return Moments(mean, jnp.full_like(mean, NOISE**2), jnp.zeros_like(mean))


def fit_ivon(steps: int, problem: Problem, starts: Array, key: Array) -> Moments:
    """Predictions averaged over IVON's posterior."""
    train_key, predict_key = jax.random.split(key)
    q = learn(steps, problem, starts[0], train_key)
    return predict_moments(network, SAMPLES, noise_variance=NOISE**2)(
        predict_key, q, problem.test_x
    )


def fit_mixture(steps: int, problem: Problem, starts: Array, key: Array) -> Moments:
    """Predictions averaged over the posteriors of several runs, trained in one program."""
    train_key, predict_key = jax.random.split(key)
    members = jax.vmap(partial(learn, steps, problem))(starts, jax.random.split(train_key, MEMBERS))
    return predict_moments(network, SAMPLES, noise_variance=NOISE**2)(
        predict_key, mixture(members), problem.test_x
    )


def learn(steps: int, problem: Problem, start: Array, key: Array) -> Posterior:
    """One run of IVON: the posterior that it ends with."""
    noise_key, train_key = jax.random.split(key)
    tx = auto_sample(ivon(schedule(0.1, steps), **SETTINGS), noise_key)
    run = partial(train, epochs=steps, batch_size=NUM_TRAIN)  # full batches: a step per epoch
    _, state = run(tx, loss_fn, start, (problem.x, problem.y), key=train_key, label="IVON")
    return posterior(state)


def table(methods: dict[str, Moments], problems: Problem) -> str:
    """Measures as rows, methods as columns; every array has the data sets on axis 0."""
    distance = np.abs(problems.test_x[0])
    inside = (distance >= 1) & (distance <= 2)
    regions = {"clusters": inside, "gap": distance < 1, "outside": distance > 2}

    def covered(moments: Moments, y: Array) -> Array:
        inside = jnp.abs(y - moments.mean) <= BAND * jnp.sqrt(moments.variance)
        return 100 * inside.mean(axis=1)

    measures: dict[str, tuple[Callable, int]] = {
        "std of f": (lambda q, _: jnp.sqrt(q.model_variance).mean(axis=1), 3),
        "NLL": (lambda q, y: jax.vmap(metrics.gaussian_nll)(q.mean, q.variance, y), 2),
        "% in 95 % band,": (covered, 0),
    }
    rows = [["", *methods]]
    for label, (measure, decimals) in measures.items():
        for region, where in regions.items():
            parts = (Moments(*(x[:, where] for x in moments)) for moments in methods.values())
            cells = [cell(measure(part, problems.test_y[:, where]), decimals) for part in parts]
            rows.append([f"{label} {region}", *cells])
    return format_table(rows)


def draw(methods: dict[str, Moments], problems: Problem) -> Figure:
    """The bands on the first data set."""
    figure = Figure(figsize=(6 * len(methods), 4.6), layout="constrained")
    axes = figure.subplots(1, len(methods), sharey=True)
    first = Problem(*(x[0] for x in problems))
    for ax, (method, moments) in zip(axes, methods.items(), strict=True):
        mean, half = moments.mean[0], BAND * np.sqrt(moments.variance[0])
        color = COLORS.get(method, COLORS["IVON"])
        band: Any = {"color": color, "alpha": 0.3, "linewidth": 0, "label": "95 % band"}
        ax.fill_between(first.test_x, mean - half, mean + half, **band)
        ax.plot(first.test_x, mean, color=color, linewidth=2, label="mean")
        ax.plot(first.test_x, first.test_f, color="black", lw=1, ls=":", label="true function")
        ax.plot(first.x, first.y, "o", color="black", markersize=3, label="data")
        ax.set(xlabel="x", ylabel="y", title=method)
        ax.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
