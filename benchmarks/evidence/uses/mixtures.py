"""Mixtures of IVON's posteriors against ensembles of SGD and of AdamW, at equal numbers of runs.

`python benchmarks/evidence/uses/mixtures.py` trains the three methods of
examples/image_classification.py with twenty seeds, and averages the probabilities of one, two, five
and ten of them. For IVON that is a mixture of posteriors, of 64 samples each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment
from examples import image_classification as example
from examples._shared.datasets import load_small_digits
from examples._shared.reporting import cell, format_table
from ivon_jax import metrics

SIZES = (1, 2, 5, 10)
Array = jax.Array


@dataclass(frozen=True)
class Options:
    """The command line."""

    seeds: int = 20
    """Runs of each method."""
    epochs: int = 100

    def __post_init__(self) -> None:
        if self.seeds < max(SIZES):
            raise SystemExit(f"--seeds must be at least {max(SIZES)}: they are averaged in groups")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, averages groups of runs, and prints a row for each method and size."""
    options = parse(Options, __doc__, argv)
    print(environment())
    data = load_small_digits()
    predictions, _ = example.compare(data, options.seeds, options.epochs)
    labels = jnp.asarray(data.test_labels)
    measures = ["accuracy, %", "NLL", "ECE, %", *(f"AUROC, {name}" for name in example.SETS[1:])]
    rows = [["", "runs", *measures]]
    for column, sets in predictions.items():
        for size in SIZES:
            groups = [measured(group, labels) for group in grouped(sets, size)]
            values = np.array(groups).T
            cells = map(cell, values, (2, 4, 2, 4, 4))
            rows.append([column, str(size), *cells])
    print(f"\n{format_table(rows)}\n")
    print(
        f"Mean ± standard error over groups of runs, {options.seeds} in all. Probabilities are\n"
        "averaged over the runs of a group, and over 64 samples of each for IVON's last rows."
    )


def grouped(sets: dict[str, Array], size: int) -> list[dict[str, Array]]:
    """Log-probabilities averaged over disjoint groups of runs; an incomplete group is left out."""
    whole = len(sets[example.SETS[0]]) // size

    def average(x: Array, i: int) -> Array:
        return jax.nn.logsumexp(x[i * size : (i + 1) * size], axis=0) - jnp.log(size)

    return [{name: average(x, i) for name, x in sets.items()} for i in range(whole)]


def measured(sets: dict[str, Array], labels: Array) -> list[float]:
    """Metrics on the test images, and the detection of the other sets by entropy."""
    tests = sets[example.SETS[0]]
    entropies: dict[str, Any] = example.entropies_of(sets)
    known = entropies.pop(example.SETS[0])
    return [
        100 * float(metrics.accuracy(tests, labels)),
        float(metrics.nll(tests, labels)),
        100 * float(metrics.ece(tests, labels)),
        *(metrics.detection(known, x).auroc for x in entropies.values()),
    ]


if __name__ == "__main__":
    main()
