"""Early stopping without held-out data: the leave-one-out loss, estimated from the training set.

`leave_one_out` estimates what the loss of every training example would be if the network had been
trained without it (Nickl et al., arXiv:2310.19273). Here a network learns 500 digits, a fifth of
which have a wrong label, for too long. Look at the figure: the estimate (green) turns upwards as
the test loss (red) does, but later, while the training loss keeps falling. The table compares the
epoch that it keeps with that of a held-out fifth, which leaves fewer images to learn from.

    python examples/leave_one_out.py
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
from tqdm import tqdm

from examples._shared.datasets import load_small_digits, with_wrong_labels
from examples._shared.networks import MLP
from examples._shared.reporting import COLORS, cell, draw_band, format_table, save_figure
from examples._shared.training import classification_loss, shuffled_rows
from ivon_jax import auto_sample, ivon, leave_one_out, posterior

NUM_TRAIN = 500
HELD_OUT = 100  # of them, for the choice by a validation set
BATCH_SIZE = 50
WRONG = 0.2  # share of the labels, in the training and the test set
EVERY = 5  # epochs between two looks
PATIENCE = 8  # looks

Pair = tuple[jax.Array, jax.Array]  # images and labels
Network = partial(MLP, width=16)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def draw_data(key: jax.Array, held_out: int) -> tuple[Pair, Pair, Pair]:
    """Images and labels to learn, to validate on (none if none are held out) and to test on."""
    images, labels, test_images, test_labels = map(jnp.asarray, load_small_digits()[:4])
    rows_key, train_key, test_key = jax.random.split(key, 3)
    rows = jax.random.permutation(rows_key, len(labels))[:NUM_TRAIN]
    images = images[rows]
    labels = with_wrong_labels(jax.random.split(train_key), labels[rows], WRONG)
    cut = NUM_TRAIN - held_out
    test = test_images, with_wrong_labels(jax.random.split(test_key), test_labels, WRONG)
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:]), test


class Losses(NamedTuple):
    """NLLs at the posterior mean, at every look at the network."""

    train: Any
    leave_one_out: Any
    valid: Any
    test: Any


def measure(apply: Callable[..., Any], state: Any, train: Pair, valid: Pair, test: Pair) -> Losses:
    """What is known of the network at one time in training."""
    q = posterior(state)  # after training with another ess λ: temperature=λ/N

    def nll(images, labels):
        return cross_entropy(apply(q.mean, images), labels).mean()

    estimates = leave_one_out(apply, cross_entropy)(q, train[0], targets=train[1])
    return Losses(nll(*train), estimates.loss.mean(), nll(*valid), nll(*test))


def train_and_measure(held_out: int, looks: int, key: jax.Array) -> Losses:
    """Trains by IVON and measures after every `EVERY` epochs; arrays (looks,)."""
    data_key, init_key, noise_key, shuffle_key = jax.random.split(key, 4)
    train, valid, test = draw_data(data_key, held_out)
    network = Network()
    params = network.init(init_key, train[0][:1])
    tx = ivon(0.1, ess=len(train[1]), hess_init=0.1, b2=0.999, weight_decay=1e-4)
    tx = auto_sample(tx, noise_key)
    grad = jax.grad(classification_loss(network.apply))

    def step(carry, rows):
        params, state = carry
        grads = grad(params, (train[0][rows], train[1][rows]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def look(carry, keys):
        rows = jax.vmap(lambda key: shuffled_rows(key, train, BATCH_SIZE))(keys)
        carry, _ = jax.lax.scan(step, carry, jnp.concatenate(rows))
        return carry, measure(network.apply, carry[1], train, valid, test)

    keys = jax.random.split(shuffle_key, (looks, EVERY))
    return jax.lax.scan(look, (params, tx.init(params)), keys)[1]


def run(seeds: int, epochs: int, held_out: int) -> Losses:
    """Losses of all seeds (seeds, looks)."""
    keys = jax.random.split(jax.random.key(0), seeds)
    follow = jax.jit(jax.vmap(partial(train_and_measure, held_out, epochs // EVERY)))
    return jax.device_get(follow(keys))


def kept(losses: np.ndarray) -> np.ndarray:
    """The best look of each seed, which stops after `PATIENCE` looks without an improvement."""
    best = np.zeros(len(losses), int)
    for look in range(losses.shape[1]):
        better = losses[:, look] < losses[np.arange(len(best)), best]
        best = np.where(better & (look - best <= PATIENCE), look, best)
    return best


def main(seeds: int = 8, epochs: int = 200, figure: Path = Path("leave_one_out.png")) -> None:
    """Trains, prints the table and writes the figure."""
    whole, part = (run(seeds, epochs, held_out) for held_out in tqdm((0, HELD_OUT), unit="run"))
    best = whole.test.min(axis=1)
    last = np.full(seeds, whole.test.shape[1] - 1)
    rows = [["", "epoch kept", "test NLL", "above the best"]]
    for name, looks, test in (
        ("best epoch by the test set", whole.test.argmin(axis=1), whole.test),
        ("leave-one-out", kept(whole.leave_one_out), whole.test),
        ("a fifth held out", kept(part.valid), part.test),
        ("never stopping", last, whole.test),
    ):
        nlls = test[np.arange(len(test)), looks]
        rows.append([name, cell((looks + 1) * EVERY, 0), cell(nlls, 3), cell(nlls - best, 3)])
    print(f"\nWhich epoch to keep: {NUM_TRAIN} digits, {100 * WRONG:.0f} % of the labels wrong\n")
    print(format_table(rows))
    save_figure(draw(whole), figure)


def draw(losses: Losses) -> Figure:
    """The losses over epochs, mean and standard error of the seeds, and the epochs kept."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    ax = figure.subplots()
    epochs = EVERY * np.arange(1, losses.test.shape[1] + 1)
    for name, values, color in (
        ("test", losses.test, COLORS["unfamiliar"]),
        ("leave-one-out, from the training set", losses.leave_one_out, COLORS["IVON"]),
        ("training", losses.train, COLORS["SGD"]),
    ):
        draw_band(ax, epochs, values, color, label=name)
    looks = kept(losses.leave_one_out)
    chosen = losses.test[np.arange(len(looks)), looks]
    style = {"marker": "v", "color": COLORS["IVON"], "edgecolor": "black", "zorder": 3}
    ax.scatter(epochs[looks], chosen, label="kept by leave-one-out (a seed)", **style)
    ax.set(xlabel="epoch", ylabel="NLL at the posterior mean")
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
