"""Which training examples matter, and which labels are wrong: the sensitivity of a trained network.

Removing example i would move the network's output for it by about v_i e_i, the variance of the
prediction times its error (Nickl et al., arXiv:2310.19273). Both are known when IVON ends. Look at
the two rows of images in the figure: sensitive are those at the edge of a class and those with a
wrong label (red). Then read the table: for finding wrong labels alone, the plain training loss is
the better score.

    python examples/sensitivity.py
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from examples._shared.datasets import NUM_CLASSES, load_small_digits, with_wrong_labels
from examples._shared.networks import MLP
from examples._shared.reporting import COLORS, cell, format_table, save_figure
from examples._shared.training import classification_loss, train, warmup_cosine
from ivon_jax import auto_sample, ivon, posterior, sensitivity
from ivon_jax.metrics import detection

NUM_TRAIN = 500
BATCH_SIZE = 50
WRONG = 0.1  # share of the labels
PICTURES = 12  # in a row of the figure

Network = partial(MLP, activation=nn.tanh)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Data(NamedTuple):
    """The training images of a seed, the labels that are learned, and the true ones."""

    images: Any
    labels: Any
    true_labels: Any


def draw_data(key: jax.Array) -> Data:
    """Draws `NUM_TRAIN` digits, and gives `WRONG` of them the label of another class."""
    images, labels = map(jnp.asarray, load_small_digits()[:2])
    rows_key, *keys = jax.random.split(key, 3)
    rows = jax.random.permutation(rows_key, len(labels))[:NUM_TRAIN]
    return Data(images[rows], with_wrong_labels(keys, labels[rows], WRONG), labels[rows])


class Scores(NamedTuple):
    """What is known of each training example when training ends, (n,) each."""

    sensitivity: Any
    loss: Any


def train_and_score(epochs: int, data: Data, key: jax.Array) -> Scores:
    """Trains by IVON; scores every training example under the posterior."""
    network = Network(16)
    apply: Callable[..., Any] = network.apply
    init_key, noise_key, shuffle_key = jax.random.split(key, 3)
    params = network.init(init_key, data.images[:1])
    num_steps = epochs * (NUM_TRAIN // BATCH_SIZE)
    rate = warmup_cosine(0.3, num_steps)
    tx = ivon(rate, ess=NUM_TRAIN, hess_init=0.1, b2=0.999, weight_decay=1e-3)
    tx, loss_fn = auto_sample(tx, noise_key), classification_loss(apply)
    how = {"key": shuffle_key, "epochs": epochs, "batch_size": BATCH_SIZE}
    _, state = train(tx, loss_fn, params, (data.images, data.labels), **how)
    q = posterior(state)  # after training with another ess λ: temperature=λ/N
    found = sensitivity(apply, cross_entropy)(q, data.images, targets=data.labels)
    return Scores(found.score, cross_entropy(apply(q.mean, data.images), data.labels))


def run(seeds: int, epochs: int) -> tuple[Data, Scores]:
    """Data and scores of all seeds, which train at the same time."""
    data_keys, keys = jax.random.split(jax.random.key(0), (2, seeds))
    data = jax.jit(jax.vmap(draw_data))(data_keys)
    return jax.device_get((data, jax.vmap(partial(train_and_score, epochs))(data, keys)))


def main(seeds: int = 8, epochs: int = 60, figure: Path = Path("sensitivity.png")) -> None:
    """Trains, prints the table and writes the figure."""
    data, scores = run(seeds, epochs)
    wrong = data.labels != data.true_labels
    rows = [["", "AUROC", "wrong labels in the top tenth, %"]]
    for name, score in (("sensitivity", scores.sensitivity), ("training loss", scores.loss)):
        found = [detection(s[~w], s[w]).auroc for s, w in zip(score, wrong, strict=True)]
        top = np.argsort(-score, axis=1)[:, : int(WRONG * NUM_TRAIN)]
        share = 100 * np.take_along_axis(wrong, top, axis=1).mean(axis=1)
        rows.append([name, cell(found, 3), cell(share, 1)])
    print(f"\nFinding wrong labels ({100 * WRONG:.0f} %) among {NUM_TRAIN} digits\n")
    print(format_table(rows))
    first = jax.tree.map(lambda x: x[0], (data, scores))
    save_figure(draw(*first), figure)


def draw(data: Data, scores: Scores) -> Figure:
    """Most and least sensitive images of one seed, classes, and sensitivity beside the loss."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    above, below = halves
    order = np.argsort(-scores.sensitivity)
    pictures = {"Most": order[:PICTURES], "Least": order[-PICTURES:]}
    wrong = data.labels != data.true_labels
    for group, (name, rows) in zip(above.subfigures(2, 1), pictures.items(), strict=True):
        group.suptitle(f"{name} sensitive: “label”, sensitivity (red: wrong label)", fontsize=11)
        for ax, row in zip(group.subplots(1, PICTURES), rows, strict=True):
            ax.imshow(data.images[row, ..., 0], cmap="gray_r")
            color = COLORS["unfamiliar"] if wrong[row] else "black"
            title = f"“{data.labels[row]}”, {scores.sensitivity[row]:.2g}"
            ax.set_title(title, fontsize=10, color=color)
            ax.set_axis_off()
    bars, points = below.subplots(1, 2)
    digits, bottom = np.arange(NUM_CLASSES), np.zeros(NUM_CLASSES)
    for name, chosen, color in (
        ("right labels", ~wrong, COLORS["IVON"]),
        ("wrong labels", wrong, COLORS["unfamiliar"]),
    ):
        x, y = scores.loss[chosen], scores.sensitivity[chosen]
        # The sensitivity to a group of examples is the sum over its members.
        heights = np.bincount(data.labels[chosen], weights=y, minlength=NUM_CLASSES)
        bars.bar(digits, heights, bottom=bottom, color=color, label=name)
        bottom += heights
        points.scatter(x, y, s=14, color=color, alpha=0.6, linewidth=0, label=name)
    bars.set(xlabel="label", xticks=digits, ylabel="sensitivity, summed", title="Classes")
    points.set(xscale="log", yscale="log", xlabel="training loss", ylabel="sensitivity")
    points.set_title("Training images")
    points.legend(frameon=False)
    return figure


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
