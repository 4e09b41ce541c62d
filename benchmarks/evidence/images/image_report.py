"""The table and the figure of `image_classification.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.images.image_metrics import entropy, measure
from examples._shared import reporting
from examples._shared.reporting import cell, mean_and_error
from ivon_jax import metrics

COLORS = {"SGD": "#0072B2", "AdamW": "#E69F00", "IVON, mean": "#7FBFA4", "IVON": "#00785A"}
SET_COLORS = {"test": "#666666", "letters": "#CC3311", "patches": "#AA66CC"}
MIN_BIN_COUNT = 20  # accuracies of fewer predictions are not drawn


@dataclass
class Column:
    """What one way of predicting (a method, or IVON at the mean) gave, one entry per seed."""

    label: str
    style: str  # a key of COLORS
    log_probs: list[dict[str, np.ndarray]] = field(default_factory=list)  # by set of images
    seconds: list[float] = field(default_factory=list)  # of an epoch
    curves: list[dict[str, list]] = field(default_factory=list)  # by number of posterior samples

    def metrics(self, labels: np.ndarray) -> dict[str, list[float]]:
        """Every metric as a list over seeds."""
        measured = [measure(log_probs, labels) for log_probs in self.log_probs]
        return {name: [values[name] for values in measured] for name in measured[0]}


# --- Table ----------------------------------------------------------------------------------------

ROWS = {  # metric: label, factor, decimals
    "accuracy": ("accuracy, %", 100, 2),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE, %", 100, 2),
    "brier": ("Brier score", 1, 4),
    "auroc_letters": ("AUROC, letters", 1, 4),
    "auroc_patches": ("AUROC, photo patches", 1, 4),
}


def format_table(columns: Sequence[Column], labels: np.ndarray) -> str:
    """Metrics as rows, ways of predicting as columns, mean and standard error over seeds."""
    measured = [column.metrics(labels) for column in columns]
    rows = [["", *(column.label for column in columns)]]
    for name, (label, factor, decimals) in ROWS.items():
        cells = [cell(np.multiply(values[name], factor), decimals) for values in measured]
        rows.append([label, *cells])
    times = [cell(column.seconds, 4) for column in columns]
    rows.append(["seconds per epoch", *times])
    return reporting.format_table(rows)


# --- Figure ---------------------------------------------------------------------------------------


def write_figure(path: Path, columns: Sequence[Column], labels: np.ndarray, title: str) -> None:
    """Draws reliability, metrics against the number of samples, and entropies."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(title, fontsize=12)
    _draw_reliability(axes[0, 0], columns, labels)
    _draw_curves(axes[0, 1], columns, labels, "nll", "NLL", 1)
    _draw_curves(axes[0, 2], columns, labels, "accuracy", "accuracy, %", 100)
    shown = [column for column in columns if column.style != "IVON, mean"]
    top = max(_draw_entropies(ax, column) for ax, column in zip(axes[1], shown, strict=False))
    for ax in axes[1, : len(shown)]:
        ax.set_ylim(0, 1.05 * top)
    for ax in axes[1, len(shown) :]:
        ax.set_axis_off()
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_reliability(ax: Axes, columns: Sequence[Column], labels: np.ndarray) -> None:
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":", label="perfect")
    for column in columns:
        pooled = np.concatenate([log_probs["test"] for log_probs in column.log_probs])
        true = jnp.asarray(np.tile(labels, len(column.log_probs)))
        count, confidence, accuracy = map(
            np.asarray, metrics.calibration_bins(jnp.asarray(pooled), true)
        )
        shown = count >= MIN_BIN_COUNT
        count, confidence, accuracy = count[shown], confidence[shown], accuracy[shown]
        error = np.sqrt(accuracy * (1 - accuracy) / count)
        ax.errorbar(
            confidence,
            accuracy,
            yerr=error,
            color=COLORS[column.style],
            label=column.label,
            marker="o",
            markersize=4,
            linewidth=1.4,
            elinewidth=0.8,
        )
    ax.set(xlabel="confidence", ylabel="accuracy", ylim=(None, 1.02))
    ax.set_title(f"Reliability (bins of at least {MIN_BIN_COUNT} predictions)", fontsize=10)
    ax.legend(fontsize=8, frameon=False)


def _draw_curves(
    ax: Axes, columns: Sequence[Column], labels: np.ndarray, metric: str, label: str, factor: float
) -> None:
    """One metric against the number of samples averaged; other methods are level lines."""
    for column in columns:
        color = COLORS[column.style]
        if column.curves:
            values = factor * np.array([curves[metric] for curves in column.curves])
            counts = column.curves[0]["samples"]
            mean, error = mean_and_error(values)
            ax.plot(counts, mean, color=color, marker="o", markersize=4, label=column.label)
            ax.fill_between(counts, mean - error, mean + error, color=color, alpha=0.25, lw=0)
        else:
            mean, error = mean_and_error(factor * np.array(column.metrics(labels)[metric]))
            ax.axhline(float(mean), color=color, linewidth=1.4, linestyle="--", label=column.label)
            ax.axhspan(float(mean - error), float(mean + error), color=color, alpha=0.12, lw=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="posterior samples averaged by IVON", ylabel=label)
    better = "higher" if metric == "accuracy" else "lower"
    ax.set_title(f"{label} ({better} is better)", fontsize=10)
    ax.legend(fontsize=8, frameon=False)


def _draw_entropies(ax: Axes, column: Column) -> float:
    """Histograms of predictive entropy pooled over seeds; returns the tallest bar."""
    edges = np.linspace(0.0, np.log(10), 31)
    names = {"test": "test images", "letters": "letters", "patches": "photo patches"}
    top = 0.0
    for name, label in names.items():
        values = np.concatenate([entropy(log_probs[name]) for log_probs in column.log_probs])
        share = np.histogram(values, bins=edges)[0] / len(values)
        top = max(top, share.max())
        filled = name == "test"
        ax.stairs(
            share,
            edges,
            fill=filled,
            alpha=0.35 if filled else 1.0,
            linewidth=1.6,
            color=SET_COLORS[name],
            label=label,
        )
    ax.set(xlabel="predictive entropy, nats", ylabel="share of images")
    ax.set_title(f"Entropy: {column.label}", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    return top
