"""SGD, AdamW and IVON on images: accuracy, calibration, and inputs from elsewhere.

Run `python examples/image_classification.py`: scikit-learn's handwritten digits, ten seeds, below a
minute on two cores. Look at the two columns of IVON: its weights at the posterior mean are
overconfident, and the average over 64 networks drawn from the posterior is not. The loop to copy is
`train` in `examples/_shared/training.py`.

All methods share the network, the initial weights and batches of each seed, the schedule (linear
warmup, cosine to zero) and weight decay on every parameter. On digits and MNIST their
hyperparameters were chosen by equally large searches on held-out training images.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples._shared.datasets import DataError, ImageData, load_dataset
from examples._shared.networks import MLP, ConvNet
from examples._shared.reporting import (
    COLORS,
    cell,
    draw_band,
    draw_entropies,
    format_table,
    save_figure,
)
from examples._shared.training import classification_loss, train, warmup_cosine
from examples._shared.unfamiliar import LETTERS, letters, photo_patches
from ivon_jax import auto_sample, ivon, metrics, predict_at_mean, predict_samples

BATCH_SIZE = 50
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # of posterior samples
SETS: tuple[str, ...] = ("test images", "letters", "photo patches")
AT_MEAN, AVERAGED = "IVON at the mean", f"IVON, {COUNTS[-1]} samples"
COLUMN_COLORS = {
    "SGD": COLORS["SGD"],
    "AdamW": COLORS["AdamW"],
    AT_MEAN: COLORS["IVON, mean"],
    AVERAGED: COLORS["IVON"],
}
EPOCHS = {"digits": 100, "mnist": 20, "cifar10": 30}
HYPERPARAMETERS: dict[str, dict[str, dict[str, float]]] = {
    "digits": {
        "SGD": dict(learning_rate=0.2, weight_decay=1e-3),
        "AdamW": dict(learning_rate=0.05, weight_decay=0.3),
        "IVON": dict(
            learning_rate=1.0, hess_init=0.03, weight_decay=1e-4, b2=0.999, temperature=0.1
        ),
    },
    "mnist": {
        "SGD": dict(learning_rate=0.05, weight_decay=3e-3),
        "AdamW": dict(learning_rate=3e-3, weight_decay=0.3),
        "IVON": dict(
            learning_rate=0.25, hess_init=1.0, weight_decay=1e-3, b2=0.999, temperature=1.0
        ),
    },
    "cifar10": {  # not tuned: common values for SGD and AdamW, the published ones for IVON
        "SGD": dict(learning_rate=0.05, weight_decay=5e-4),
        "AdamW": dict(learning_rate=2e-3, weight_decay=0.1),
        "IVON": dict(
            learning_rate=0.2, hess_init=0.5, weight_decay=2e-4, b2=0.99999, temperature=1.0
        ),
    },
}

Array = jax.Array
PyTree = Any
Predictions = dict[str, dict[str, Array]]  # log-probabilities (seeds, n, 10) by column and set


@dataclass(frozen=True)
class Options:
    """SGD, AdamW and IVON on images."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    data_dir: Path | None = None  # folder with the files of mnist or cifar10
    seeds: int = 10
    epochs: int | None = None  # by default 100, 20 or 30
    figure: Path = Path("image_classification.png")


def main(options: Options) -> None:
    """Trains, predicts, prints the table and writes the figure."""
    data = load_dataset(options.dataset, options.data_dir)
    epochs = options.epochs or EPOCHS[options.dataset]
    print(f"{options.dataset}: {data.note}")
    predictions, averages = compare(data, HYPERPARAMETERS[options.dataset], options.seeds, epochs)
    labels = jnp.asarray(data.test_labels)
    print(f"\n{table(predictions, labels)}\n")
    print(
        "Mean ± standard error over seeds. Higher is better for accuracy and AUROC, lower for the\n"
        "rest. ECE: 15 bins of equal width. Brier: summed over classes. AUROC: predictive entropy\n"
        f"tells test images from rendered letters ({LETTERS}: unlike digits) or photo patches."
    )
    title = f"{options.dataset}: {options.seeds} seeds, {epochs} epochs"
    save_figure(draw(predictions, averages, labels, title), options.figure)


# --- Training and predictions ---------------------------------------------------------------------


def make_optimizer(
    method: str, schedule: optax.Schedule, num_examples: int, key: Array, values: dict[str, float]
) -> optax.GradientTransformation:
    """One of the three optimizers; only IVON uses the key."""
    if method == "SGD":
        decay = optax.add_decayed_weights(values["weight_decay"])
        return optax.chain(decay, optax.sgd(schedule, momentum=0.9))
    if method == "AdamW":
        return optax.adamw(schedule, weight_decay=values["weight_decay"])
    settings: dict[str, Any] = {name: values[name] for name in ("hess_init", "weight_decay", "b2")}
    return auto_sample(ivon(schedule, num_examples / values["temperature"], **settings), key)


def compare(
    data: ImageData, hyperparameters: dict[str, dict[str, float]], seeds: int, epochs: int
) -> tuple[Predictions, Array]:
    """Log-probabilities of every column, and those on the test images for each of `COUNTS`."""
    shape = data.train_images.shape[1:]
    sets = [data.test_images, letters(shape), photo_patches(shape)]
    images, ends = jnp.concatenate(sets), np.cumsum([len(each) for each in sets])[:-1]
    train_data = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
    num_steps = epochs * (len(data.train_labels) // BATCH_SIZE)
    model = MLP() if shape[-1] == 1 else ConvNet()
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.arange(seeds))
    params = jax.vmap(lambda key: model.init(key, images[:1]))(keys[:, 0])

    def log_probs(params: PyTree, images: Array) -> Array:
        return jax.nn.log_softmax(jnp.asarray(model.apply(params, images)))

    def trained(method: str) -> tuple[PyTree, PyTree]:
        values = hyperparameters[method]
        schedule = warmup_cosine(values["learning_rate"], num_steps)

        def fit(params: PyTree, key: Array) -> tuple[PyTree, PyTree]:
            noise_key, key = jax.random.split(key)
            tx = make_optimizer(method, schedule, len(data.train_labels), noise_key, values)
            run = partial(train, key=key, epochs=epochs, batch_size=BATCH_SIZE, label=method)
            return run(tx, classification_loss(model.apply), params, train_data)

        return jax.vmap(fit)(params, keys[:, 1])

    at = partial(log_probs, images=images)
    outputs = {method: jax.lax.map(at, trained(method)[0]) for method in ("SGD", "AdamW")}
    _, states = trained("IVON")
    at_mean = predict_at_mean(log_probs, data_batch_size=500)
    outputs[AT_MEAN] = jax.lax.map(lambda state: at_mean(state, images), states)
    at_samples = predict_samples(log_probs, COUNTS[-1], data_batch_size=500)
    samples = jax.lax.map(lambda x: at_samples(*x, images), (keys[:, 2], states))
    sums = [jax.nn.logsumexp(samples[:, :count], axis=1) for count in COUNTS]
    averages = jnp.stack(sums) - jnp.log(jnp.array(COUNTS))[:, None, None, None]
    outputs[AVERAGED] = averages[-1]
    predictions = {
        column: dict(zip(SETS, jnp.split(x, ends, axis=1), strict=True))
        for column, x in outputs.items()
    }
    return predictions, averages[:, :, : len(data.test_labels)]


# --- Table and figure -----------------------------------------------------------------------------


def table(predictions: Predictions, labels: Array) -> str:
    """Metrics as rows, mean and standard error over seeds."""
    rows = [["", *predictions]]
    for label, metric, factor, decimals in (
        ("accuracy, %", metrics.accuracy, 100, 2),
        ("NLL", metrics.nll, 1, 4),
        ("ECE, %", metrics.ece, 100, 2),
        ("Brier score", metrics.brier, 1, 4),
    ):
        tests = jnp.stack([sets["test images"] for sets in predictions.values()])
        values = factor * measure(metric, tests, labels)
        rows.append([label, *(cell(each, decimals) for each in values)])
    for name in SETS[1:]:
        cells = [cell(aurocs(sets["test images"], sets[name]), 4) for sets in predictions.values()]
        rows.append([f"AUROC, {name}", *cells])
    return format_table(rows)


def measure(metric: Any, log_probs: Array, labels: Array) -> np.ndarray:
    """A metric of log-probabilities (..., n, 10), for all leading axes."""
    values = jax.lax.map(lambda x: metric(x, labels), log_probs.reshape(-1, *log_probs.shape[-2:]))
    return np.asarray(values).reshape(log_probs.shape[:-2])


def aurocs(familiar: Array, unfamiliar: Array) -> list[float]:
    """How well the entropy of predictions tells two sets of images apart, for every seed."""
    entropies = map(metrics.predictive_entropy, (familiar, unfamiliar))
    return [metrics.detection(*seed).auroc for seed in zip(*entropies, strict=True)]


def draw(predictions: Predictions, averages: Array, labels: Array, title: str) -> Figure:
    """Reliability, metrics against the number of samples, and entropies of three columns."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    figure.suptitle(f"{title}; bands and bars: one standard error", fontsize=12)
    axes = figure.subplots(2, 3)
    tests = {column: sets["test images"] for column, sets in predictions.items()}
    draw_reliability(axes[0, 0], tests, labels)
    draw_curve(axes[0, 1], tests, averages, labels, metrics.nll, "NLL (lower is better)")
    draw_curve(axes[0, 2], tests, averages, labels, metrics.accuracy, "accuracy (higher is better)")
    for ax in axes[0]:
        ax.legend(fontsize=8, frameon=False)
    for ax, column in zip(axes[1], ("SGD", "AdamW", AVERAGED), strict=True):
        sets = predictions[column]
        draw_entropies(ax, column, {n: metrics.predictive_entropy(x) for n, x in sets.items()})
    return figure


def draw_reliability(ax: Axes, tests: dict[str, Array], labels: Array) -> None:
    """Accuracy against confidence, pooled over seeds, in bins of at least 20 predictions."""
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":", label="perfect")
    for column, log_probs in tests.items():
        bins = metrics.calibration_bins(log_probs, jnp.tile(labels, (len(log_probs), 1)))
        count, confidence, accuracy = (np.asarray(x)[np.asarray(bins.count) >= 20] for x in bins)
        error = np.sqrt(accuracy * (1 - accuracy) / count)
        style: Any = {"color": COLUMN_COLORS[column], "marker": "o", "markersize": 4}
        ax.errorbar(confidence, accuracy, yerr=error, label=column, elinewidth=0.8, **style)
    ax.set(xlabel="confidence", ylabel="accuracy", ylim=(None, 1.02), title="Reliability")


def draw_curve(ax: Axes, tests: dict, averages: Array, labels: Array, metric: Any, title: str):
    """One metric against the number of samples averaged; other columns are level lines."""
    for column, log_probs in tests.items():
        at, line = (COUNTS, "o-") if column == AVERAGED else (COUNTS[:: len(COUNTS) - 1], "--")
        values = measure(metric, averages if column == AVERAGED else log_probs[None], labels)
        values = np.broadcast_to(values.T, (values.shape[1], len(at)))
        draw_band(ax, at, values, COLUMN_COLORS[column], line, markersize=4, label=column)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="posterior samples averaged by IVON", title=title)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except DataError as error:
        sys.exit(f"error: {error}")
