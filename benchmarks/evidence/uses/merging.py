"""Merging by IVON's precisions against Fisher information by squared gradients.

`python benchmarks/evidence/uses/merging.py` trains the networks of examples/model_merging.py and
merges them by one rule more. Fisher informations take another pass over the data of every network,
also over the base's; IVON's precisions come with training. Every rule has one weight, what the
differences to the base are multiplied with, chosen on held-out images from the same eight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import parse
from benchmarks.evidence.uses.fisher import diagonal_fisher
from examples import model_merging as example
from examples._shared.reporting import cell, format_table
from examples.model_merging import NUM_TRAIN, WEIGHTS, Data, Models, accuracies
from ivon_jax import Posterior

FISHER_FLOOR = 1e-4  # per example of the base, as a weight decay


@dataclass
class Options:
    """The command line."""

    seeds: int = 5
    epochs: int = 120
    """Of each network."""


def with_fisher(models: Models, data: Data) -> Models:
    """The same means, with precisions H₀ = n(F₀ + floor) and P_t = H₀ + nF_t (one seed)."""

    def information(q: Posterior, kind: int) -> Any:
        fisher = diagonal_fisher(example.NETWORK.apply, q.mean, data.train[0][kind])
        return jax.tree.map(lambda f: NUM_TRAIN * f, fisher)

    h0 = jax.tree.map(lambda f: f + FISHER_FLOOR * NUM_TRAIN, information(models.base, 0))
    tasks = [
        Posterior(q.mean, jax.tree.map(jnp.add, h0, information(q, kind)))
        for kind, q in enumerate(models.tasks, start=1)
    ]
    return Models(Posterior(models.base.mean, h0), tasks, models.joint)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, merges and prints the table."""
    options = parse(Options, __doc__, argv)
    data = example.make_data(options.seeds)
    models = example.train_models(data, options.epochs)
    rules = {
        "IVON's precisions": (example.by_precision, models),
        "Fisher information": (example.by_precision, jax.jit(jax.vmap(with_fisher))(models, data)),
        "task arithmetic": (example.by_arithmetic, models),
    }
    found = {}
    for name, (rule, of) in rules.items():
        merged = [rule(of, weight) for weight in WEIGHTS]
        best = max(range(len(merged)), key=lambda i: accuracies(merged[i], *data.valid).mean())
        found[name, f"{WEIGHTS[best]:g}"] = accuracies(merged[best], *data.test)
    found["average", "0.5"] = accuracies(example.by_arithmetic(models, 0.5), *data.test)
    found["joint training", "-"] = accuracies(models.joint.mean, *data.test)
    ours = np.mean(next(iter(found.values())), axis=1)
    rows = [["test accuracy, %", "weight", *example.ANGLES, "mean", "minus IVON's"]]
    for (name, weight), by_kind in found.items():
        mean = np.mean(by_kind, axis=1)
        kinds = (cell(kind, 1) for kind in np.transpose(by_kind))
        rows.append([name, weight, *kinds, cell(mean, 1), cell(mean - ours, 1)])
    print(f"\n{format_table(rows)}")


if __name__ == "__main__":
    main()
