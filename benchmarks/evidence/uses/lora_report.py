"""Scores, table and figure of `lora_finetune.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples._shared.reporting import COLORS, cell, format_table, mean_and_error, save_figure
from ivon_jax import metrics

NUM_BINS = 15
MIN_BIN_COUNT = 100  # calibration of fewer predictions per seed is not drawn
COVERAGES = np.linspace(0.05, 1.0, 96)


class Scores(NamedTuple):
    """How well next characters were predicted by one fine-tuned network."""

    loss: float  # nats per character
    ece: float
    bins: metrics.CalibrationBins
    risk: np.ndarray  # error of the most confident predictions, by coverage
    area: float  # under the whole risk-coverage curve


@dataclass
class Column:
    """One way of predicting, with the scores of every seed."""

    label: str
    color: str
    scores: list[Scores] = field(default_factory=list)


@dataclass
class Curves:
    """Losses during the fine-tuning by one method, one entry per seed."""

    held_out_label: str
    training_label: str
    color: str
    training: list[np.ndarray] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)


def risk_coverage(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of errors among the k most confident predictions, for k = 1 … n.

    Confidence is the probability of the predicted class.
    """
    log_probs, labels = log_probs.reshape(-1, log_probs.shape[-1]), labels.ravel()
    wrong = log_probs.argmax(axis=-1) != labels
    order = np.argsort(-log_probs.max(axis=-1), kind="stable")
    return np.cumsum(wrong[order]) / np.arange(1, len(wrong) + 1)


def at_coverage(risk: np.ndarray, coverage: np.ndarray | float) -> np.ndarray:
    """The error when this share of the predictions is kept, rounded up to a whole number."""
    # Rounding first, as 0.7 · 10 is a little above 7 in floating point.
    kept = np.ceil(np.round(np.multiply(coverage, len(risk)), 6)).astype(int)
    return risk[kept - 1]


def score(log_probs: jax.Array, labels: jax.Array) -> Scores:
    """Scores of log-probabilities (..., K) against labels (...)."""
    loss, ece, bins = _measure(log_probs, labels)
    risk = risk_coverage(np.asarray(log_probs), np.asarray(labels))
    return Scores(
        loss=float(loss),
        ece=float(ece),
        bins=jax.tree.map(np.asarray, bins),
        risk=at_coverage(risk, COVERAGES),
        area=float(risk.mean()),
    )


@jax.jit
def _measure(log_probs: jax.Array, labels: jax.Array):
    return (
        metrics.nll(log_probs, labels),
        metrics.ece(log_probs, labels, NUM_BINS),
        metrics.calibration_bins(log_probs, labels, NUM_BINS),
    )


# --- Table ----------------------------------------------------------------------------------------


def score_table(columns: Sequence[Column]) -> str:
    """Scores as rows, ways of predicting as columns, mean and standard error over seeds."""
    rows = {
        "loss, nats per character": (lambda s: s.loss, 4),
        "ECE, %": (lambda s: 100 * s.ece, 2),
        "error, %": (lambda s: 100 * s.risk[-1], 2),
    }
    for percent in (90, 70, 50):
        index = int(np.argmin(np.abs(COVERAGES - percent / 100)))
        name = f"error at {percent} % coverage, %"
        rows[name] = (lambda s, index=index: 100 * s.risk[index], 2)
    rows["area under risk-coverage, %"] = (lambda s: 100 * s.area, 2)
    table = [["", *(column.label for column in columns)]]
    for name, (value, decimals) in rows.items():
        cells = [cell([value(s) for s in column.scores], decimals) for column in columns]
        table.append([name, *cells])
    return format_table(table)


# --- Figure ---------------------------------------------------------------------------------------


def write_figure(
    path: Path, columns: Sequence[Column], curves: Sequence[Curves], num_steps: int
) -> None:
    """Draws calibration, the risk-coverage curve and the loss during fine-tuning."""
    figure = Figure(figsize=(13.5, 4.3), layout="constrained")
    calibration, abstention, losses = figure.subplots(1, 3)
    _draw_calibration(calibration, columns)
    _draw_risk(abstention, columns)
    _draw_losses(losses, curves, num_steps)
    save_figure(figure, path)


def _band(ax: Axes, x: np.ndarray, values: np.ndarray, color: str, **style: Any) -> None:
    """A line of the mean over seeds in a band of one standard error."""
    mean, error = mean_and_error(values)
    ax.plot(x, mean, color=color, **style)
    ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def _draw_calibration(ax: Axes, columns: Sequence[Column]) -> None:
    ax.axhline(0.0, color=COLORS["reference"], linewidth=0.8, linestyle=":")
    for column in columns:
        bins = [s.bins for s in column.scores]
        shown = np.min([b.count for b in bins], axis=0) >= MIN_BIN_COUNT
        confidence = np.mean([b.confidence[shown] for b in bins], axis=0)
        gaps = np.array([b.accuracy[shown] - b.confidence[shown] for b in bins])
        _band(ax, confidence, 100 * gaps, column.color, label=column.label, marker="o", ms=3.5)
    ax.set(xlabel="confidence", ylabel="accuracy − confidence, %", xlim=(0, 1))
    ax.set_title("Reliability (below 0: overconfident)", fontsize=10)
    ax.legend(fontsize=8, frameon=False)


def _draw_risk(ax: Axes, columns: Sequence[Column]) -> None:
    for column in columns:
        risks = np.array([s.risk for s in column.scores])
        _band(ax, 100 * COVERAGES, 100 * risks, column.color, label=column.label)
    ax.set(xlabel="coverage: most confident predictions kept, %", ylabel="error, %")
    ax.set(xlim=(0, 100), ylim=(0, None))
    ax.set_title("Abstention (lower is better)", fontsize=10)
    ax.legend(fontsize=8, frameon=False)


def _draw_losses(ax: Axes, curves: Sequence[Curves], num_steps: int) -> None:
    for curve in curves:
        steps = np.linspace(0, num_steps, len(curve.held_out[0]) + 1)[1:]
        held_out, training = np.array(curve.held_out), np.array(curve.training)
        color = curve.color
        _band(ax, steps, held_out, color, label=curve.held_out_label, marker="o", ms=3)
        _band(ax, steps, training, color, label=curve.training_label, linestyle="--")
    ax.set(xlabel="steps of fine-tuning", ylabel="nats per character", xlim=(0, None))
    ax.set_title("Loss while adapting", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
