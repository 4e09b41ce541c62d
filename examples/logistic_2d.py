"""What IVON learns where the exact answer can be drawn: logistic regression with two weights.

Run `python examples/logistic_2d.py`. Twenty iris flowers (every fifth versicolor and virginica of
scikit-learn's data) are classified by standardised petal length and width under a Gaussian prior.
So few flowers leave a wide, skewed posterior, which a grid gives exactly. Look at IVON's Gaussians
beside it, with independent weights and in an eigenbasis, and at the probabilities far from the
data, where SGD, which ends at the mode, is sure.

IVON's ess is the number of flowers, its weight decay the prior precision over ess: plain Bayes.
The best Gaussians, found on the grid, say what their form alone costs.
"""

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
from ivon_jax import Eigenbasis, Posterior, auto_sample, ivon, posterior, predict_log_probs

PRIOR_PRECISION = 0.1  # of each weight: a standard deviation of 3.2
BATCH_SIZE = 5
TICKS = np.linspace(-8.0, 20.0, 201)  # the posterior beyond is negligible
GRID = np.stack(np.meshgrid(TICKS, TICKS, indexing="ij"), axis=-1)

Array = jax.Array


BASES = {"IVON": None, "IVON, eigenbasis": Eigenbasis(decay=0.999)}
STYLES = {"IVON": COLORS["IVON at the mean"], "IVON, eigenbasis": COLORS["IVON"]}


class Gaussian(NamedTuple):
    """Its mean and its covariance LLᵀ."""

    mean: np.ndarray
    root: np.ndarray  # L


def main(seeds: int = 10, epochs: int = 5000, figure: Path = Path("logistic_2d.png")) -> None:
    """Trains, prints the table and writes the figure."""
    x, y = flowers()
    log_posterior = exact_posterior(x, y)
    points = fit_sgd(x, y, seeds, epochs)
    posteriors = {name: fit_ivon(basis, x, y, seeds, epochs) for name, basis in BASES.items()}
    learned = {name: list(map(gaussian, each)) for name, each in posteriors.items()}
    print(f"\n{table(log_posterior, learned, points)}\n")
    print(
        "w1: petal length, w2: petal width; ρ: their correlation. KL(q‖p) in nats, from q to the\n"
        f"exact posterior p. IVON and SGD: mean ± standard error over {seeds} seeds of batches\n"
        "and noise."
    )
    drawn = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    draw_posteriors(left, log_posterior, {name: q[0] for name, q in learned.items()}, points[0])
    first = {name: q[0] for name, q in posteriors.items()}
    draw_probabilities(right, log_posterior, first, points[0], x)
    save_figure(drawn, figure)


def flowers() -> tuple[np.ndarray, np.ndarray]:
    """Standardised petal length and width (20, 2), and labels (20,): 1 is virginica."""
    features, species = load_iris(return_X_y=True)
    rows = np.flatnonzero(species > 0)[::5]
    petals = features[rows][:, 2:].astype(np.float32)
    return (petals - petals.mean(axis=0)) / petals.std(axis=0), species[rows] - 1


def apply(weights: Array, x: Array) -> Array:
    """Logits (n, 2) of the two species; the weights (2, 1) are a column, for a basis of both."""
    z = x @ weights[:, 0]
    return jnp.stack([jnp.zeros_like(z), z], axis=-1)


def fit_sgd(x: np.ndarray, y: np.ndarray, seeds: int, epochs: int) -> np.ndarray:
    """Where SGD ends: weights (seeds, 2)."""
    rate, decay = warmup_cosine(0.1, num_steps(y, epochs)), PRIOR_PRECISION / len(y)
    tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))

    def run(key: Array) -> Array:
        return fit(tx, x, y, epochs, key, "SGD")[0]

    return np.asarray(jax.vmap(run)(jax.random.split(jax.random.key(0), seeds)))[..., 0]


def fit_ivon(
    basis: Eigenbasis | None, x: np.ndarray, y: np.ndarray, seeds: int, epochs: int
) -> list[Posterior]:
    """The posteriors of IVON, one per seed."""
    rate, decay = warmup_cosine(0.03, num_steps(y, epochs)), PRIOR_PRECISION / len(y)
    tx = ivon(rate, ess=len(y), hess_init=0.1, b2=0.999, weight_decay=decay, basis=basis)

    def run(key: Array) -> Posterior:
        noise_key, key = jax.random.split(key)
        return posterior(fit(auto_sample(tx, noise_key), x, y, epochs, key, "IVON")[1])

    found = jax.vmap(run)(jax.random.split(jax.random.key(0), seeds))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(seeds)]


def fit(
    tx: Any, x: np.ndarray, y: np.ndarray, epochs: int, key: Array, label: str
) -> tuple[Array, Any]:
    """Weights and optimizer state after training."""
    data, loss_fn = (jnp.asarray(x), jnp.asarray(y)), classification_loss(apply)
    batches: Any = {"epochs": epochs, "batch_size": BATCH_SIZE}
    return train(tx, loss_fn, jnp.zeros((2, 1)), data, key=key, label=label, **batches)


def num_steps(y: np.ndarray, epochs: int) -> int:
    """Of all epochs."""
    return epochs * (len(y) // BATCH_SIZE)


def gaussian(q: Posterior) -> Gaussian:
    """A posterior on the two weights: L = Q diag(σ)."""
    vectors: Any = q.basis[0].rows if q.basis else jnp.eye(2)
    return Gaussian(np.asarray(q.mean[:, 0]), np.asarray(vectors / jnp.sqrt(q.precision[:, 0])))


def exact_posterior(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Log-probabilities of the cells of the grid."""
    z = GRID @ x.T
    log_joint = (y * z - np.logaddexp(0.0, z)).sum(axis=-1)
    log_joint -= 0.5 * PRIOR_PRECISION * (GRID**2).sum(axis=-1)
    return log_joint - np.logaddexp.reduce(log_joint, axis=None)


def divergence(q: Gaussian, log_posterior: np.ndarray) -> float:
    """KL(q‖p) by summation over the grid."""
    log_q = -0.5 * (((GRID - q.mean) @ np.linalg.inv(q.root).T) ** 2).sum(axis=-1)
    log_q -= np.logaddexp.reduce(log_q, axis=None)
    return float(np.sum(np.exp(log_q) * (log_q - log_posterior)))


def moments(log_posterior: np.ndarray) -> Gaussian:
    """The Gaussian with the mean and covariance of the exact posterior."""
    p = np.exp(log_posterior)[..., None]
    mean = (p * GRID).sum(axis=(0, 1))
    centred = (np.sqrt(p) * (GRID - mean)).reshape(-1, 2)
    return Gaussian(mean, np.linalg.cholesky(centred.T @ centred))


def best_gaussian(log_posterior: np.ndarray, diagonal: bool) -> Gaussian:
    """The Gaussian of least KL(q‖p), with independent weights or any covariance."""

    def unpacked(theta: np.ndarray) -> Gaussian:
        (upper, lower), below = np.exp(theta[2:4]), 0.0 if diagonal else theta[4]
        return Gaussian(theta[:2], np.array([[upper, 0.0], [below, lower]]))

    mean, root = moments(log_posterior)
    start = np.concatenate([mean, np.log(np.diag(root)), [] if diagonal else [root[1, 0]]])
    found = scipy.optimize.minimize(lambda x: divergence(unpacked(x), log_posterior), start)
    return unpacked(found.x)


def table(log_posterior: np.ndarray, learned: dict[str, list[Gaussian]], points: np.ndarray) -> str:
    """Means, standard deviations, correlation and KL(q‖p) by method."""
    best = {
        f"best {name}Gaussian": [best_gaussian(log_posterior, bool(name))]
        for name in ("diagonal ", "")
    }
    rows = [["", "w1 mean", "w1 std", "w2 mean", "w2 std", "ρ", "KL(q‖p)"]]
    rows.append(["exact posterior", *(f"{x:.3f}" for x in numbers(moments(log_posterior))), "0"])
    for label, several in (best | learned).items():
        columns = np.array(list(map(numbers, several))).T
        distances = [divergence(q, log_posterior) for q in several]
        rows.append([label, *(cell(each, 3) for each in columns), cell(distances, 4)])
    w1, w2 = (cell(weight, 3) for weight in points.T)
    return format_table([*rows, ["SGD", w1, "-", w2, "-", "-", "-"]])


def numbers(q: Gaussian) -> list[float]:
    """Mean and standard deviation of both weights, and their correlation."""
    covariance = q.root @ q.root.T
    (m1, m2), (s1, s2) = q.mean, np.sqrt(np.diag(covariance))
    return [m1, s1, m2, s2, covariance[0, 1] / (s1 * s2)]


def draw_posteriors(
    ax: Axes, log_posterior: np.ndarray, learned: dict[str, Gaussian], point: np.ndarray
) -> None:
    """The exact density, and ellipses of one and two standard deviations of the Gaussians."""
    ax.contourf(TICKS, TICKS, np.exp(log_posterior).T, 12, cmap="Greys")
    angle = np.linspace(0.0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for name, q in learned.items():
        for size, label in ((1, f"{name}, 1 and 2 σ"), (2, None)):
            ax.plot(*(q.mean + size * circle @ q.root.T).T, color=STYLES[name], label=label)
    style: Any = {"color": "black", "markersize": 12, "markeredgewidth": 2}
    ax.plot(*moments(log_posterior).mean, "+", label="exact mean", **style)
    ax.plot(*point, "X", color=COLORS["SGD"], markersize=9, label="SGD")
    ax.set(xlabel="w1 (petal length)", ylabel="w2 (petal width)", xlim=(-3, 10), ylim=(-3, 10))
    ax.set_title("Exact posterior density (grey)")
    ax.legend(loc="upper right")


def draw_probabilities(
    ax: Axes,
    log_posterior: np.ndarray,
    learned: dict[str, Posterior],
    point: np.ndarray,
    x: np.ndarray,
) -> None:
    """The probability of virginica where length minus width varies, which few flowers tell."""
    offset = np.linspace(-6, 6, 121, dtype=np.float32)
    inputs = jnp.stack([offset, -offset], axis=1)
    weights, p = GRID.reshape(-1, 2), np.exp(log_posterior).ravel()
    exact = [np.sum(p / (1 + np.exp(-weights @ each))) / p.sum() for each in np.asarray(inputs)]
    ax.plot(offset, exact, color="black", label="exact")
    for name, q in learned.items():
        averaged = predict_log_probs(apply, num_samples=1000)(jax.random.key(1), q, inputs)
        label = f"{name}, 1,000 samples"
        ax.plot(offset, jnp.exp(averaged)[:, 1], color=STYLES[name], label=label)
    ax.plot(offset, jax.nn.sigmoid(inputs @ point), color=COLORS["SGD"], ls="--", label="SGD")
    ax.plot((x[:, 0] - x[:, 1]) / 2, np.full(len(x), -0.03), "|", color="0.4", label="flowers")
    ax.set(xlabel="petal length = −petal width, standardised", ylabel="probability of virginica")
    ax.legend()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
