"""Tasks learned one after the other: yesterday's posterior is today's prior.

`ivon(prior=posterior(state))` is all it takes: parameters that earlier tasks are sure of stay, the
others are free to learn. No image of an earlier task is seen again. Look at the figure: where the
pixels of every task come in another order (above), AdamW forgets the first tasks, and IVON half as
much. Where every task is to tell another pair of digits apart as even or odd (below), they are
level, and both are far from training on all tasks at once.

    python examples/continual_learning.py
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

from examples._shared.datasets import load_small_digits
from examples._shared.networks import NETWORK, accuracies
from examples._shared.reporting import COLORS, cell, format_table, mean_and_error, save_figure
from examples._shared.training import classification_loss, train, warmup_cosine
from ivon_jax import Eigenbasis, Posterior, auto_sample, ivon, posterior

NUM_TASKS = 5
BATCH_SIZE = 50
TASK_COLORS = ("#332288", "#0072B2", "#00785A", "#E69F00", "#CC3311")


class Tasks(NamedTuple):
    """Images (tasks, n, 64) and labels (tasks, n), perhaps with an axis of seeds in front."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]


def permuted(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All digits in every task, each task with its pixels in an order of its own."""
    rng = np.random.default_rng(seed)
    orders = [np.arange(64), *(rng.permutation(64) for _ in range(NUM_TASKS - 1))]
    return np.stack([images[:, order] for order in orders]), np.tile(labels, (NUM_TASKS, 1))


def split(images: np.ndarray, labels: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits 0 and 1, then 2 and 3, ..., as even (0) or odd (1); equally many of each pair."""
    members = [np.flatnonzero(labels // 2 == task) for task in range(NUM_TASKS)]
    rows = np.stack([each[: min(map(len, members))] for each in members])
    return images[rows], labels[rows] % 2


def make_tasks(make: Any, seeds: int) -> Tasks:
    """The tasks of every seed, of which an order of pixels is drawn."""
    x, y, test_x, test_y, _ = load_small_digits()
    x, test_x = (2 * images.reshape(-1, 64) - 1 for images in (x, test_x))
    stacked = [Tasks(make(x, y, seed), make(test_x, test_y, seed)) for seed in range(seeds)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)


class Setting(NamedTuple):
    """How a task is learned; AdamW has no use for the last two."""

    learning_rate: float  # the peak
    weight_decay: float
    hess_init: float = 0.0
    temperature: float = 0.0


# Chosen on held-out training images, from grids of equal size.
SETTINGS = {
    ("Permuted digits", permuted): {
        "AdamW": Setting(3e-4, 0.01),
        "IVON": Setting(0.02, 1e-3, hess_init=0.03, temperature=0.3),
        "all tasks at once, AdamW": Setting(0.03, 0.1),
    },
    ("Split digits", split): {
        "AdamW": Setting(1e-4, 0.0),
        "IVON": Setting(0.005, 1e-4, hess_init=0.1, temperature=0.1),
        "all tasks at once, AdamW": Setting(1e-3, 1.0),
    },
}


def learn(
    setting: Setting,
    steps: int,
    key: jax.Array,
    data: tuple,
    params: Any,
    prior: Posterior,
    basis: Eigenbasis | None = None,
) -> tuple[Any, Posterior]:
    """Learns a task from where the last one ended; returns parameters and the next prior."""
    num_examples = len(data[1])
    noise_key, data_key = jax.random.split(key)
    rate = warmup_cosine(setting.learning_rate, steps)
    if setting.temperature:
        ess, h0 = num_examples / setting.temperature, setting.hess_init
        # Without rescaling the rate is a share of a Newton step, however sharp the prior.
        more = {"rescale_lr": False, "basis": basis}
        tx = auto_sample(ivon(rate, ess, hess_init=h0, b2=0.999, prior=prior, **more), noise_key)
    else:
        tx = optax.adamw(rate, weight_decay=setting.weight_decay)
    loss_fn = classification_loss(NETWORK.apply)
    epochs = max(1, steps // (num_examples // BATCH_SIZE))
    how = {"key": data_key, "epochs": epochs, "batch_size": BATCH_SIZE, "progress": False}
    params, state = train(tx, loss_fn, params, data, **how)
    if not setting.temperature:
        return params, prior
    q = posterior(state)
    return q.mean, q


def learn_in_turn(
    setting: Any, tasks: Tasks, steps: int, bar: tqdm, learn: Callable[..., Any] = learn
) -> np.ndarray:
    """Accuracies in %, (seeds, after task, on task)."""
    images, labels = tasks.train
    keys = jax.vmap(jax.random.key)(jnp.arange(len(labels)))
    params = jax.jit(jax.vmap(NETWORK.init))(keys, images[:, 0, :1])
    # N(0, 1/(λδ)), the prior of the first task.
    decay = setting.weight_decay * labels.shape[2] / (setting.temperature or 1.0)
    prior = Posterior(optax.tree.zeros_like(params), optax.tree.full_like(params, decay))
    fit = jax.jit(jax.vmap(partial(learn, setting, steps)))
    found = []
    for task in range(labels.shape[1]):
        task_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, task)
        params, prior = fit(task_keys, (images[:, task], labels[:, task]), params, prior)
        found.append(np.asarray(accuracies(params, *tasks.test)))
        bar.update()
    return np.stack(found, axis=1)


def main(seeds: int = 5, steps: int = 600, figure: Path = Path("continual_learning.png")) -> None:
    """Learns every task for `steps` steps, prints the table and writes the figure."""
    rows = [["test accuracy, %", "all tasks at the end", "each when new", "forgotten"]]
    found = {}
    with tqdm(total=len(SETTINGS) * (2 * NUM_TASKS + 1), unit="task") as bar:
        for (title, make), settings in SETTINGS.items():
            tasks = make_tasks(make, seeds)
            for name, setting in settings.items():
                joint = name not in ("AdamW", "IVON")
                if joint:  # the tasks become one, for as many steps
                    together = (x.reshape(len(x), 1, -1, *x.shape[3:]) for x in tasks.train)
                    tasks = tasks._replace(train=tuple(together))
                length = steps * (NUM_TASKS if joint else 1)
                matrix = found[title, name] = learn_in_turn(setting, tasks, length, bar)
                row = [f"{title}: {name}", cell(matrix[:, -1].mean(axis=1), 1)]
                new = np.diagonal(matrix, axis1=1, axis2=2)
                lost = (new - matrix[:, -1])[:, :-1].mean(axis=1)
                row += ["-", "-"] if joint else [cell(new.mean(axis=1), 1), cell(lost, 1)]
                rows.append(row)
    print("\n" + format_table(rows))
    save_figure(draw(found), figure)


def draw(found: dict[tuple[str, str], np.ndarray]) -> Figure:
    """Accuracy on every task after each task: a row per kind of tasks, a column per method."""
    figure = Figure(figsize=(9, 6.8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, (title, _) in zip(axes, SETTINGS, strict=True):
        for ax, name in zip(row, ("AdamW", "IVON"), strict=True):
            matrix, learned = found[title, name], np.arange(1, NUM_TASKS + 1)
            for task, color in enumerate(TASK_COLORS):
                mean, error = mean_and_error(matrix[:, task:, task])
                label = f"task {task + 1}"
                ax.errorbar(learned[task:], mean, error, color=color, marker="o", ms=4, label=label)
            so_far = [matrix[:, t, : t + 1].mean() for t in range(NUM_TASKS)]
            ax.plot(learned, so_far, color="black", linewidth=2.6, label="mean so far")
            level = found[title, "all tasks at once, AdamW"].mean()
            ax.axhline(level, color=COLORS["reference"], linestyle="--", label="all at once")
            ax.set(title=f"{title}, {name}", xticks=learned)
        row[0].set_ylabel("test accuracy, %")
    for ax in axes[-1]:
        ax.set_xlabel("tasks learned")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return figure


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
