"""What IVON learns where the exact answer can be drawn: logistic regression with two weights.

Run `python examples/logistic_2d.py`. Twenty iris flowers (every fifth versicolor and virginica of
scikit-learn's data) are classified by standardised petal length and width under a Gaussian prior.
So few flowers leave a wide, skewed posterior, which a grid gives exactly. Look at IVON's Gaussian
beside it, and at the probabilities far from the data, where SGD, which ends at the mode, is sure.

IVON's ess is the number of flowers, its weight decay the prior precision over ess: plain Bayes.
The best diagonal Gaussian, found on the grid, says what the diagonal alone costs.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_iris

from examples._shared.reporting import COLORS, cell, format_table, save_figure
from examples._shared.training import classification_loss, train, warmup_cosine
from ivon_jax import Posterior, auto_sample, ivon, posterior, predict_log_probs

PRIOR_PRECISION = 0.1  # of each weight: a standard deviation of 3.2
BATCH_SIZE = 5
TICKS = np.linspace(-8.0, 20.0, 401)  # the posterior beyond is negligible
GRID = np.stack(np.meshgrid(TICKS, TICKS, indexing="ij"), axis=-1)

Array = jax.Array


class Gaussian(NamedTuple):
    """With a diagonal covariance."""

    mean: np.ndarray
    std: np.ndarray


def main(seeds: int = 10, epochs: int = 5000, figure: Path = Path("logistic_2d.png")) -> None:
    """Trains, prints the table and writes the figure."""
    x, y = flowers()
    log_posterior = exact_posterior(x, y)
    points, q = fit(x, y, seeds, epochs)
    learned = list(map(Gaussian, np.asarray(q.mean), np.asarray(q.precision) ** -0.5))
    print(f"\n{table(log_posterior, learned, points)}\n")
    print(
        "w1: petal length, w2: petal width. KL(q‖p) in nats, from q to the exact posterior p.\n"
        f"IVON and SGD: mean ± standard error over {seeds} seeds of batches and noise."
    )
    drawn = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    draw_posteriors(left, log_posterior, learned[0], points[0])
    draw_probabilities(right, log_posterior, jax.tree.map(lambda x: x[0], q), points[0], x)
    save_figure(drawn, figure)


def flowers() -> tuple[np.ndarray, np.ndarray]:
    """Standardised petal length and width (20, 2), and labels (20,): 1 is virginica."""
    features, species = load_iris(return_X_y=True)
    rows = np.flatnonzero(species > 0)[::5]
    petals = features[rows][:, 2:].astype(np.float32)
    return (petals - petals.mean(axis=0)) / petals.std(axis=0), species[rows] - 1


def apply(weights: Array, x: Array) -> Array:
    """Logits (n, 2) of the two species."""
    z = x @ weights
    return jnp.stack([jnp.zeros_like(z), z], axis=-1)


def fit(x: np.ndarray, y: np.ndarray, seeds: int, epochs: int) -> tuple[np.ndarray, Posterior]:
    """Where SGD ends, and the posterior of IVON; all arrays are (seeds, 2)."""
    data, decay = (jnp.asarray(x), jnp.asarray(y)), PRIOR_PRECISION / len(y)
    num_steps = epochs * (len(y) // BATCH_SIZE)
    run = partial(train, epochs=epochs, batch_size=BATCH_SIZE)
    loss_fn, start = classification_loss(apply), jnp.zeros(2)

    def run_sgd(key: Array) -> Array:
        tx = optax.sgd(warmup_cosine(0.1, num_steps))
        tx = optax.chain(optax.add_decayed_weights(decay), tx)
        return run(tx, loss_fn, start, data, key=key, label="SGD")[0]

    def run_ivon(key: Array) -> Posterior:
        noise_key, key = jax.random.split(key)
        rate = warmup_cosine(0.03, num_steps)
        tx = ivon(rate, ess=len(y), hess_init=0.1, b2=0.999, weight_decay=decay)
        _, state = run(auto_sample(tx, noise_key), loss_fn, start, data, key=key, label="IVON")
        return posterior(state)

    keys = jax.random.split(jax.random.key(0), seeds)
    return np.asarray(jax.vmap(run_sgd)(keys)), jax.vmap(run_ivon)(keys)


def exact_posterior(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Log-probabilities of the cells of the grid."""
    z = GRID @ x.T
    log_joint = (y * z - np.logaddexp(0.0, z)).sum(axis=-1)
    log_joint -= 0.5 * PRIOR_PRECISION * (GRID**2).sum(axis=-1)
    return log_joint - np.logaddexp.reduce(log_joint, axis=None)


def divergence(q: Gaussian, log_posterior: np.ndarray) -> float:
    """KL(q‖p) by summation over the grid."""
    log_q = -0.5 * (((GRID - q.mean) / q.std) ** 2).sum(axis=-1)
    log_q -= np.logaddexp.reduce(log_q, axis=None)
    return float(np.sum(np.exp(log_q) * (log_q - log_posterior)))


def moments(log_posterior: np.ndarray) -> Gaussian:
    """Mean and standard deviations of the exact posterior."""
    p = np.exp(log_posterior)[..., None]
    mean = (p * GRID).sum(axis=(0, 1))
    return Gaussian(mean, np.sqrt((p * (GRID - mean) ** 2).sum(axis=(0, 1))))


def best_diagonal(log_posterior: np.ndarray) -> Gaussian:
    """The diagonal Gaussian of least KL(q‖p)."""
    mean, std = moments(log_posterior)
    found = scipy.optimize.minimize(
        lambda theta: divergence(Gaussian(theta[:2], np.exp(theta[2:])), log_posterior),
        np.concatenate([mean, np.log(std)]),
    ).x
    return Gaussian(found[:2], np.exp(found[2:]))


def table(log_posterior: np.ndarray, learned: list[Gaussian], points: np.ndarray) -> str:
    """Means, standard deviations and KL(q‖p) by method."""
    rows = [["", "w1 mean", "w1 std", "w2 mean", "w2 std", "KL(q‖p)"]]
    best = best_diagonal(log_posterior)
    for label, several in {"best diagonal Gaussian": [best], "IVON": learned}.items():
        numbers = np.array([np.stack(q, axis=1).ravel() for q in several]).T
        distances = [divergence(q, log_posterior) for q in several]
        rows.append([label, *(cell(each, 3) for each in numbers), cell(distances, 4)])
    numbers = np.stack(moments(log_posterior), axis=1).ravel()
    rows.insert(1, ["exact posterior", *(f"{each:.3f}" for each in numbers), "0"])
    w1, w2 = (cell(weight, 3) for weight in points.T)
    return format_table([*rows, ["SGD", w1, "-", w2, "-", "-"]])


def draw_posteriors(ax: Axes, log_posterior: np.ndarray, q: Gaussian, point: np.ndarray) -> None:
    """The exact density, and ellipses of one and two standard deviations of IVON's Gaussian."""
    ax.contourf(TICKS, TICKS, np.exp(log_posterior).T, 12, cmap="Greys")
    angle = np.linspace(0.0, 2 * np.pi, 200)
    circle = q.std * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for size, label in ((1, "IVON, 1 and 2 σ"), (2, None)):
        ax.plot(*(q.mean + size * circle).T, color=COLORS["IVON"], label=label)
    style: Any = {"color": "black", "markersize": 12, "markeredgewidth": 2}
    ax.plot(*moments(log_posterior).mean, "+", label="exact mean", **style)
    ax.plot(*point, "X", color=COLORS["SGD"], markersize=9, label="SGD")
    ax.set(xlabel="w1 (petal length)", ylabel="w2 (petal width)", xlim=(-3, 10), ylim=(-3, 10))
    ax.set_title("Exact posterior density (grey)")
    ax.legend(loc="upper right")


def draw_probabilities(ax: Axes, log_posterior, q, point: np.ndarray, x: np.ndarray) -> None:
    """The probability of virginica where length minus width varies, which few flowers tell."""
    offset = np.linspace(-6, 6, 121, dtype=np.float32)
    inputs = jnp.stack([offset, -offset], axis=1)
    averaged = predict_log_probs(apply, num_samples=1000)(jax.random.key(1), q, inputs)
    weights, p = GRID.reshape(-1, 2)[::4], np.exp(log_posterior).ravel()[::4]
    exact = [np.sum(p / (1 + np.exp(-weights @ each))) / p.sum() for each in np.asarray(inputs)]
    ax.plot(offset, exact, color="black", label="exact")
    ax.plot(offset, jnp.exp(averaged)[:, 1], color=COLORS["IVON"], label="IVON, 1,000 samples")
    ax.plot(offset, jax.nn.sigmoid(inputs @ point), color=COLORS["SGD"], ls="--", label="SGD")
    ax.plot((x[:, 0] - x[:, 1]) / 2, np.full(len(x), -0.03), "|", color="0.4", label="flowers")
    ax.set(xlabel="petal length = −petal width, standardised", ylabel="probability of virginica")
    ax.legend()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
