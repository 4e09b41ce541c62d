"""Two fine-tuned networks become one, without their data: IVON's posteriors weigh every parameter.

A base network learns upright digits. One copy of it is fine-tuned on digits turned to the left, one
on digits turned to the right, both with the posterior of the base as prior. `merge` adds what each
has learned in units of precision, so that a parameter follows the network that is sure of it
(Daheim et al., arXiv:2310.12808). Look at the figure: at weight 1, where nothing is tuned, and over
a wide range around it the merge is as good as `task_arithmetic`, which takes all parameters as
equally sure, at its best weight. Joint training on all digits remains far better than both.

    python examples/model_merging.py
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from scipy.ndimage import rotate
from tqdm import tqdm

from examples._shared.datasets import load_small_digits, stratified_split
from examples._shared.networks import NETWORK, accuracies
from examples._shared.reporting import COLORS, cell, draw_band, format_table, save_figure
from examples._shared.training import classification_loss, train, warmup_cosine
from ivon_jax import Posterior, auto_sample, ivon, merge, posterior, task_arithmetic

ANGLES = {"upright": 0, "left": 30, "right": -30}  # degrees; the first is what the base learns
NUM_TRAIN, NUM_VALID = 270, 190  # images of each kind
BATCH_SIZE = 50
ESS_PER_EXAMPLE = 1 / 0.03  # a temperature of 0.03
WEIGHT_DECAY = 1e-4
WEIGHTS = np.array([0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8])


class Data(NamedTuple):
    """Images (seeds, kinds, n, 64) and their labels (seeds, kinds, n)."""

    train: tuple[Any, Any]  # other digits in each kind
    valid: tuple[Any, Any]  # the same digits in each kind, as in `test`
    test: tuple[Any, Any]


def turn(images: np.ndarray, degrees: float) -> np.ndarray:
    """Turns images (n, 8, 8, 1) about their centre; returns (n, 64) in [-1, 1]."""
    turned = rotate(images, degrees, axes=(2, 1), reshape=False, order=1) if degrees else images
    return 2 * np.clip(turned, 0.0, 1.0).reshape(len(images), -1) - 1


def make_data(seeds: int) -> Data:
    """The data of every seed; seeds differ in the split as well."""
    digits = load_small_digits()

    def turned(images, labels, rows=None):
        rows = np.tile(np.arange(len(labels)), (3, 1)) if rows is None else rows
        kinds = [turn(images[r], angle) for r, angle in zip(rows, ANGLES.values(), strict=True)]
        return np.stack(kinds), labels[rows]

    def of_seed(seed):
        images, labels, *valid = stratified_split(*digits[:2], NUM_VALID, seed)
        own = np.random.default_rng(seed).permutation(len(labels))[: 3 * NUM_TRAIN]
        train = turned(images, labels, own.reshape(3, -1))
        return Data(train, turned(valid[0], valid[1]), turned(*digits[2:4]))

    stacked = map(of_seed, range(seeds))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)


@partial(jax.jit, static_argnums=0)
def learn(epochs: int, keys: jax.Array, data: tuple, start: Any, prior: Posterior) -> Posterior:
    """Trains by IVON under a prior, every seed at the same time; returns the posteriors."""
    how: Any = {"epochs": epochs, "batch_size": BATCH_SIZE, "progress": False}
    loss_fn = classification_loss(NETWORK.apply)

    def fit(key: jax.Array, data: tuple, start: Any, prior: Posterior) -> Posterior:
        noise_key, data_key = jax.random.split(key)
        rate = warmup_cosine(0.02, epochs * (len(data[1]) // BATCH_SIZE))
        ess = len(data[1]) * ESS_PER_EXAMPLE
        # Without rescaling the rate is a share of a Newton step, however sharp the prior.
        tx = ivon(rate, ess, hess_init=0.03, b2=0.997, prior=prior, rescale_lr=False)
        tx = auto_sample(tx, noise_key)
        return posterior(train(tx, loss_fn, start, data, key=data_key, **how)[1])

    return jax.vmap(fit)(keys, data, start, prior)


class Models(NamedTuple):
    """Posteriors, whose leaves have an axis of seeds in front."""

    base: Posterior
    tasks: list[Posterior]
    joint: Posterior  # of all turned images, under the posterior of the base


def train_models(data: Data, epochs: int) -> Models:
    """Trains the networks, each for all seeds at the same time."""
    images, labels = data.train
    seeds = jnp.arange(len(labels))
    keys = jax.vmap(jax.random.split, (0, None))(jax.vmap(jax.random.key)(seeds), 5)
    start = jax.jit(jax.vmap(NETWORK.init))(keys[:, 0], images[:, 0, :1])
    decay = NUM_TRAIN * ESS_PER_EXAMPLE * WEIGHT_DECAY  # λδ, the precision of the first prior
    prior = Posterior(optax.tree.zeros_like(start), optax.tree.full_like(start, decay))

    bar = tqdm(total=4, unit="network")

    def fit(index, kinds, start, prior, epochs=epochs):
        own = tuple(x[:, kinds].reshape(len(seeds), -1, *x.shape[3:]) for x in data.train)
        found = jax.block_until_ready(learn(epochs, keys[:, index], own, start, prior))
        bar.update()
        return found

    with bar:
        base = fit(1, [0], start, prior)
        tasks = [fit(2, [1], base.mean, base), fit(3, [2], base.mean, base)]
        joint_epochs = 3 * epochs // 2  # as many steps as the three other networks together
        return Models(base, tasks, fit(4, [1, 2], base.mean, base, joint_epochs))


@jax.jit
def by_arithmetic(models: Models, weight: float) -> Any:
    """Task arithmetic; at weight 1/2 it is the average of the two networks."""
    means = [q.mean for q in models.tasks]
    return task_arithmetic(means, models.base.mean, weights=[weight, weight])


@jax.jit
def by_precision(models: Models, weight: float) -> Any:
    """IVON's merge, in which the base counts once."""
    return merge(models.tasks, base=models.base, weights=[weight, weight]).mean


def main(seeds: int = 10, epochs: int = 120, figure: Path = Path("model_merging.png")) -> None:
    """Trains, merges, prints the table and writes the figure."""
    data = make_data(seeds)
    models = train_models(data, epochs)
    rows = [["test accuracy, %", "weight", *ANGLES, "mean"]]

    def add(name, params, weight="-"):
        found = np.asarray(accuracies(params, *data.test))
        kinds = [cell(kind, 1) for kind in found.T]
        rows.append([name, weight, *kinds, cell(found.mean(axis=1), 1)])
        return found.mean()

    add("base", models.base.mean)
    for name, q in zip(("left", "right"), models.tasks, strict=True):
        add(f"fine-tuned on {name}", q.mean)
    curves, levels = {}, {"average": add("average", by_arithmetic(models, 0.5), "0.5")}
    for name, rule in (("task arithmetic", by_arithmetic), ("IVON's merge", by_precision)):
        merged = [rule(models, weight) for weight in WEIGHTS]
        valid, test = (
            np.stack([accuracies(params, *part).mean(axis=1) for params in merged], axis=1)
            for part in (data.valid, data.test)
        )
        best = int(valid.mean(axis=0).argmax())
        add(name, merged[best], f"best held out: {WEIGHTS[best]:g}")
        curves[name] = test, best
    add("IVON's merge", by_precision(models, 1.0), "1")
    levels["joint training"] = add("joint training", models.joint.mean)
    print("\n" + format_table(rows))
    save_figure(draw(curves, levels), figure)


def draw(curves: dict[str, tuple[np.ndarray, int]], levels: dict[str, Any]) -> Figure:
    """Mean accuracy over the weights of the rules, each with its chosen weight."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    ax = figure.subplots()
    for (name, level), line in zip(levels.items(), (":", "--"), strict=True):
        ax.axhline(level, color=COLORS["reference"], linestyle=line, label=name)
    for (name, (values, best)), color in zip(curves.items(), ("AdamW", "IVON"), strict=True):
        draw_band(ax, WEIGHTS, values, COLORS[color], "o-", markevery=[best], label=name)
    ax.set(xscale="log", xlabel="weight of what was learned (dot: best on held-out images)")
    ax.set(ylabel="test accuracy, mean of the kinds, %")
    ax.set_xticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
