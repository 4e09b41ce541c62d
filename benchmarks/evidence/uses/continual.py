"""Continual learning in an eigenbasis, and by EWC, beside the methods of the example.

`python benchmarks/evidence/uses/continual.py` learns the tasks of examples/continual_learning.py by
its methods, by IVON with `basis=Eigenbasis(decay=0.99)`, and by elastic weight consolidation, which
weighs the Fisher information of old tasks by a tuned strength; IVON with the posterior as prior has
no such factor: every task counts once, as Bayes' rule has it. EWC's settings are the best of 16,
tried on held-out training images as for the other methods; in the eigenbasis those of IVON are
taken, which were the best of 18 there on permuted digits as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks._shared.journal import parse
from benchmarks._shared.methods import warmup_cosine
from benchmarks.evidence.uses.fisher import diagonal_fisher
from examples import continual_learning as example
from examples._shared.reporting import cell, format_table
from examples._shared.training import classification_loss, train
from examples.continual_learning import BATCH_SIZE, NETWORK, NUM_TASKS
from ivon_jax import Eigenbasis, Posterior


@dataclass
class Options:
    """The command line."""

    seeds: int = 5
    steps: int = 600
    """Of each task."""


class Consolidation(NamedTuple):
    """The settings of EWC."""

    learning_rate: float
    strength: float
    weight_decay: float = 1e-4  # of the first task
    temperature: float = 1.0


BASIS = Eigenbasis(decay=0.99)
CHOSEN = {
    "Permuted digits": Consolidation(3e-3, strength=3.0),
    "Split digits": Consolidation(3e-3, strength=1e5),
}


def learn(
    setting: Consolidation, steps: int, key: jax.Array, data: Any, params: Any, prior: Posterior
) -> tuple[Any, Posterior]:
    """Learns a task by EWC (Kirkpatrick et al. 2017), in its form for several tasks.

    Adam with the penalty ½ Σ s (θ − m)² / N for the mean m and precision s of the prior, to which
    every task adds `strength` times its Fisher information.
    """
    images, labels = data
    plain = classification_loss(NETWORK.apply)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        squares = jax.tree.map(
            lambda x, m, s: jnp.sum(s * (x - m) ** 2), params, prior.mean, prior.precision
        )
        return plain(params, batch) + 0.5 * optax.tree.sum(squares) / len(labels)

    options: Any = {"batch_size": BATCH_SIZE, "progress": False}
    epochs = max(1, steps // (len(labels) // BATCH_SIZE))
    tx = optax.adam(warmup_cosine(setting.learning_rate, steps))
    params, _ = train(tx, loss_fn, params, data, key=key, epochs=epochs, **options)
    factor = setting.strength * len(labels)
    fisher = diagonal_fisher(NETWORK.apply, params, images)
    precision = jax.tree.map(lambda s, f: s + factor * f, prior.precision, fisher)
    return params, Posterior(params, precision)


def main(argv: Sequence[str] | None = None) -> None:
    """Learns the tasks and prints the table."""
    options = parse(Options, __doc__, argv)
    rows = [["test accuracy, %", "all tasks at the end", "each when new", "forgotten"]]
    turned = partial(example.learn, basis=BASIS)
    with tqdm(total=4 * len(example.SETTINGS) * NUM_TASKS, unit="task") as bar:
        for (title, make), settings in example.SETTINGS.items():
            tasks = example.make_tasks(make, options.seeds)
            methods = {
                "AdamW": (settings["AdamW"], example.learn),
                "IVON": (settings["IVON"], example.learn),
                "IVON, eigenbasis": (settings["IVON"], turned),
                "EWC": (CHOSEN[title], learn),
            }
            for name, (setting, how) in methods.items():
                matrix = example.learn_in_turn(setting, tasks, options.steps, bar, how)
                rows.append(summary(f"{title}: {name}", matrix))
    print(f"\n{format_table(rows)}")
    print(
        """
Forgotten: the most that a task's accuracy ever was minus what is left of it at the end, mean over
all tasks but the last. What hardly learns hardly forgets: read the last two columns together."""
    )


def summary(label: str, matrix: np.ndarray) -> list[str]:
    """The row of a method with accuracies (seeds, after task, on task)."""
    last = matrix[:, -1]
    new = np.diagonal(matrix, axis1=1, axis2=2).mean(axis=1)
    lost = [matrix[:, t:, t].max(axis=1) - last[:, t] for t in range(NUM_TASKS - 1)]
    return [label, cell(last.mean(axis=1), 1), cell(new, 1), cell(np.mean(lost, axis=0), 1)]


if __name__ == "__main__":
    main()
