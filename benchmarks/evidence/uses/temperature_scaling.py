"""Calibration by one number: temperature scaling of SGD's and AdamW's logits against IVON.

`python benchmarks/evidence/uses/temperature_scaling.py` trains the three methods of
examples/image_classification.py on 800 of the 1,000 digits and chooses, for each network, the
temperature T of its log-probabilities that has the lowest NLL on the other 200 (Guo et al. 2017).
The networks that were trained on all 1,000 are then scaled by the T of their seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment
from examples import image_classification as example
from examples._shared.datasets import ImageData, load_small_digits, stratified_split
from examples._shared.reporting import cell, format_table
from ivon_jax import metrics

HELD_OUT = 200
TEMPERATURES = jnp.geomspace(0.25, 4.0, 161)  # 1 is the one in the middle
Array = jax.Array


@dataclass(frozen=True)
class Options:
    """The command line."""

    seeds: int = 20
    epochs: int = 100


def scaled(log_probs: Array, temperature: Array) -> Array:
    """Log-probabilities (n, K) with their logits divided by a temperature."""
    return jax.nn.log_softmax(log_probs / temperature)


@jax.jit
def chosen(log_probs: Array, labels: Array) -> Array:
    """The temperature with the lowest NLL."""
    nll = jax.lax.map(lambda t: metrics.nll(scaled(log_probs, t), labels), TEMPERATURES)
    return TEMPERATURES[jnp.argmin(nll)]


@jax.jit
def scores(log_probs: Array, labels: Array) -> tuple[Array, Array, Array]:
    """NLL, ECE in % and Brier score."""
    ece = 100 * metrics.ece(log_probs, labels)
    return metrics.nll(log_probs, labels), ece, metrics.brier(log_probs, labels)


def temperatures(data: ImageData, options: Options) -> dict[str, Array]:
    """T of every column and seed, from networks that have not seen the held-out images."""
    parts = stratified_split(data.train_images, data.train_labels, HELD_OUT, 0)
    predictions, _ = example.compare(ImageData(*parts, data.note), options.seeds, options.epochs)
    labels = jnp.asarray(parts[3])
    return {
        column: jnp.stack([chosen(x, labels) for x in sets["test images"]])
        for column, sets in predictions.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, scales, and prints two rows for each column."""
    options = parse(Options, __doc__, argv)
    print(environment())
    data = load_small_digits()
    found = temperatures(data, options)
    predictions, _ = example.compare(data, options.seeds, options.epochs)
    labels = jnp.asarray(data.test_labels)
    rows: list[Sequence[str]] = [["", "T", "NLL", "ECE, %", "Brier score"]]
    for column, sets in predictions.items():
        for ts in (jnp.ones(options.seeds), found[column]):
            pairs = zip(sets["test images"], ts, strict=True)
            values = np.array([scores(scaled(x, t), labels) for x, t in pairs]).T
            shown = cell(np.asarray(ts), 2) if ts is found[column] else "1"
            rows.append([column, shown, *map(cell, values, (4, 2, 4))])
    print(f"\n{format_table(rows)}\n")
    print(
        f"Mean ± standard error over {options.seeds} seeds. T divides the logits, and was chosen\n"
        f"for each seed on {HELD_OUT} held-out images, with a network trained on the others."
    )


if __name__ == "__main__":
    main()
