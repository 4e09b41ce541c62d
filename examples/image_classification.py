"""SGD, AdamW and IVON on images: accuracy, calibration, and inputs from elsewhere.

Run `python examples/image_classification.py`: scikit-learn's handwritten digits, ten seeds, below a
minute on two cores. Look at the two columns of IVON: its weights at the posterior mean are
overconfident, and the average over 64 networks drawn from the posterior is not. The loop to copy is
`train` in `examples/_shared/training.py`.

All methods share the network, the initial weights and batches of each seed, the schedule (linear
warmup, cosine to zero) and weight decay on every parameter. Their hyperparameters were chosen by
equally large searches on held-out training images.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples._shared.datasets import ImageData, load_small_digits
from examples._shared.networks import MLP
from examples._shared.reporting import COLORS, cell, draw_band, format_table, save_figure
from examples._shared.training import classification_loss, train, warmup_cosine
from examples._shared.unfamiliar import LETTERS, draw_entropies, letters, photo_patches
from ivon_jax import auto_sample, ivon, metrics, predict_at_mean, predict_samples

BATCH_SIZE = 50
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # of posterior samples
SETS: tuple[str, ...] = ("test images", "letters", "photo patches")
AVERAGED = f"IVON, {COUNTS[-1]} samples"

Array = jax.Array
Predictions = dict[str, dict[str, Array]]  # log-probabilities (seeds, n, 10) by column and set


def main(
    seeds: int = 10, epochs: int = 100, figure: Path = Path("image_classification.png")
) -> None:
    """Trains, predicts, prints the table and writes the figure."""
    data = load_small_digits()
    print(f"digits: {data.note}")
    predictions, averages = compare(data, seeds, epochs)
    labels = jnp.asarray(data.test_labels)
    print(f"\n{table(predictions, labels)}\n")
    print(
        "Mean ± standard error over seeds. Higher is better for accuracy and AUROC, lower for the\n"
        "rest. ECE: 15 bins of equal width. Brier: summed over classes. AUROC: predictive entropy\n"
        f"tells test images from rendered letters ({LETTERS}: unlike digits) or photo patches."
    )
    title = f"digits: {seeds} seeds, {epochs} epochs"
    save_figure(draw(predictions, averages, labels, title), figure)


def compare(data: ImageData, seeds: int, epochs: int) -> tuple[Predictions, Array]:
    """Log-probabilities of every column, and those on the test images for each of `COUNTS`."""
    x, y, test_x, test_y, _ = data
    sets = [test_x, letters(x.shape[1:]), photo_patches(x.shape[1:])]
    images, ends = jnp.concatenate(sets), np.cumsum([len(each) for each in sets])[:-1]
    num_steps = epochs * (len(y) // BATCH_SIZE)
    model = MLP()
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.arange(seeds))
    params = jax.jit(jax.vmap(lambda key: model.init(key, images[:1])))(keys[:, 0])

    def fit(method: str, params: Any, key: Array) -> tuple[Any, Any]:
        noise_key, key = jax.random.split(key)
        if method == "SGD":
            tx = optax.sgd(warmup_cosine(0.2, num_steps), momentum=0.9)
            tx = optax.chain(optax.add_decayed_weights(1e-3), tx)
        elif method == "AdamW":
            tx = optax.adamw(warmup_cosine(0.05, num_steps), weight_decay=0.3)
        else:
            rate, ess = warmup_cosine(1.0, num_steps), len(y) / 0.1  # a temperature of 0.1
            tx = ivon(rate, ess, hess_init=0.03, weight_decay=1e-4, b2=0.999)
            tx = auto_sample(tx, noise_key)
        run = partial(train, key=key, epochs=epochs, batch_size=BATCH_SIZE, label=method)
        return run(tx, classification_loss(model.apply), params, (jnp.asarray(x), jnp.asarray(y)))

    def log_probs(params: Any, images: Array) -> Array:
        return jax.nn.log_softmax(jnp.asarray(model.apply(params, images)))

    outputs = {}
    for method in ("SGD", "AdamW"):
        weights, _ = jax.vmap(partial(fit, method))(params, keys[:, 1])
        outputs[method] = jax.lax.map(partial(log_probs, images=images), weights)
    _, states = jax.vmap(partial(fit, "IVON"))(params, keys[:, 1])
    at_mean = predict_at_mean(log_probs, data_batch_size=500)
    outputs["IVON at the mean"] = jax.lax.map(lambda state: at_mean(state, images), states)
    at_samples = predict_samples(log_probs, COUNTS[-1], data_batch_size=500)
    samples = jax.lax.map(lambda x: at_samples(*x, images), (keys[:, 2], states))
    sums = jax.lax.cumlogsumexp(samples, axis=1)[:, np.array(COUNTS) - 1].swapaxes(0, 1)
    averages = sums - jnp.log(jnp.array(COUNTS))[:, None, None, None]
    outputs[AVERAGED] = averages[-1]
    predictions = {
        column: dict(zip(SETS, jnp.split(x, ends, axis=1), strict=True))
        for column, x in outputs.items()
    }
    return predictions, averages[:, :, : len(test_y)]


def table(predictions: Predictions, labels: Array) -> str:
    """Metrics as rows, mean and standard error over seeds."""
    rows = [["", *predictions]]
    tests = jnp.stack([sets["test images"] for sets in predictions.values()])
    for label, metric, factor, decimals in (
        ("accuracy, %", metrics.accuracy, 100, 2),
        ("NLL", metrics.nll, 1, 4),
        ("ECE, %", metrics.ece, 100, 2),
        ("Brier score", metrics.brier, 1, 4),
    ):
        values = factor * np.asarray(measure(metric, tests, labels))
        rows.append([label, *(cell(each, decimals) for each in values)])
    entropies = [entropies_of(sets) for sets in predictions.values()]
    for name in SETS[1:]:
        detected = [map(metrics.detection, x["test images"], x[name]) for x in entropies]
        cells = [cell([seed.auroc for seed in seeds], 4) for seeds in detected]
        rows.append([f"AUROC, {name}", *cells])
    return format_table(rows)


def entropies_of(sets: dict[str, Array]) -> dict[str, Array]:
    """Of the predictions on every set of images."""
    return {name: metrics.predictive_entropy(x) for name, x in sets.items()}


@partial(jax.jit, static_argnums=0)
def measure(metric: Any, log_probs: Array, labels: Array) -> Array:
    """A metric of log-probabilities (..., n, 10), for all leading axes."""
    values = jax.lax.map(lambda x: metric(x, labels), log_probs.reshape(-1, *log_probs.shape[-2:]))
    return values.reshape(log_probs.shape[:-2])


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
        draw_entropies(ax, column, entropies_of(predictions[column]))
    return figure


def draw_reliability(ax: Axes, tests: dict[str, Array], labels: Array) -> None:
    """Accuracy against confidence, pooled over seeds, in bins of at least 20 predictions."""
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":", label="perfect")
    for column, log_probs in tests.items():
        bins = metrics.calibration_bins(log_probs, jnp.tile(labels, (len(log_probs), 1)))
        count, confidence, accuracy = (np.asarray(x)[np.asarray(bins.count) >= 20] for x in bins)
        error = np.sqrt(accuracy * (1 - accuracy) / count)
        style: Any = {"color": COLORS.get(column, COLORS["IVON"]), "marker": "o", "markersize": 4}
        ax.errorbar(confidence, accuracy, yerr=error, label=column, elinewidth=0.8, **style)
    ax.set(xlabel="confidence", ylabel="accuracy", ylim=(None, 1.02), title="Reliability")


def draw_curve(ax: Axes, tests: dict, averages: Array, labels: Array, metric: Any, title: str):
    """One metric against the number of samples averaged; other columns are level lines."""
    levels = measure(metric, jnp.stack([*tests.values()]), labels)
    curve = measure(metric, averages, labels).T
    for column, level in zip(tests, levels, strict=True):
        if column == AVERAGED:
            draw_band(ax, COUNTS, curve, COLORS["IVON"], "o-", markersize=4, label=column)
        else:
            ends = np.stack([level, level], axis=1)
            draw_band(ax, (COUNTS[0], COUNTS[-1]), ends, COLORS[column], "--", label=column)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="posterior samples averaged by IVON", title=title)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
