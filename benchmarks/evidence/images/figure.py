"""The figure of `images.py`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.evidence.images.claims import Results
from examples._shared.reporting import mean_and_error

COLORS = {
    "sgd": "#0072B2",
    "adamw": "#E69F00",
    "dropout": "#CC79A7",
    "swag": "#56B4E9",
    "ensemble": "#444444",
    "ivon": "#00785A",
    "ivon_bayes": "#D55E00",
}
VARIATIONAL = ("ivon", "ivon_bayes")
PANELS = {"nll": ("NLL", 1), "accuracy": ("accuracy, %", 100), "ece": ("ECE, %", 100)}
BARS = {
    "nll": ("NLL", 1),
    "ece": ("ECE, %", 100),
    "auroc_letters": ("AUROC, letters", 1),
}


def draw(
    title: str, labels: Mapping[str, str], usual: Results, overlong: Results, epochs: int
) -> Figure:
    """Metrics against the number of samples, over-long training, and all methods."""
    figure = Figure(figsize=(14, 12 if overlong else 8.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(3 if overlong else 2, 3)
    for ax, (name, (label, factor)) in zip(axes[0], PANELS.items(), strict=True):
        draw_samples(ax, usual, labels, name, factor)
        ax.set(title="Number of posterior samples", xlabel="samples", ylabel=label)
    axes[0, 0].legend(fontsize=8, frameon=False)
    for ax, (name, (label, factor)) in zip(axes[1], BARS.items(), strict=True):
        draw_methods(ax, usual, labels, name, factor)
        ax.set(xlabel=label, title="All methods")
    if overlong:
        draw_overlong(axes[2], overlong, labels, epochs)
    return figure


def draw_samples(
    ax: Axes, usual: Results, labels: Mapping[str, str], name: str, factor: float
) -> None:
    """IVON's curves with its mean (dashed) and SGD (dotted)."""
    for method in VARIATIONAL:
        if method not in usual:
            continue
        results, color = list(usual[method].values()), COLORS[method]
        counts = results[0]["curve"]["samples"]
        mean, error = mean_and_error([np.multiply(r["curve"][name], factor) for r in results])
        ax.errorbar(
            counts, mean, np.nan_to_num(error), color=color, marker="o", ms=4, label=labels[method]
        )
        level = float(factor * np.mean([r["mean"][name] for r in results]))
        ax.axhline(level, color=color, ls="--", lw=1.2, label=f"{labels[method]}: mean")
    for method in ("sgd", "ensemble"):
        if method in usual:
            level = float(factor * np.mean([r["metrics"][name] for r in usual[method].values()]))
            ax.axhline(level, color=COLORS[method], ls=":", lw=1.6, label=labels[method])
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ScalarFormatter())


def draw_methods(
    ax: Axes, usual: Results, labels: Mapping[str, str], name: str, factor: float
) -> None:
    """A row per way of predicting, with its standard error; open circles are IVON's mean."""
    rows: list[str] = []
    for method, results in usual.items():
        points: dict[str, Any] = {labels[method]: [r["metrics"] for r in results.values()]}
        if method in VARIATIONAL:
            points[f"{labels[method]}: mean"] = [r["mean"] for r in results.values()]
        for label, measured in points.items():
            mean, error = mean_and_error([factor * each[name] for each in measured])
            face = "white" if label.endswith("mean") else COLORS[method]
            style: dict[str, Any] = {"color": COLORS[method], "markerfacecolor": face}
            ax.errorbar(mean, len(rows), xerr=np.nan_to_num(error), fmt="o", **style)
            rows.append(label)
    ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", lw=0.4)
    ax.margins(x=0.08)


def draw_overlong(
    axes: np.ndarray, overlong: Results, labels: Mapping[str, str], epochs: int
) -> None:
    """NLL of test and training images along the way, and where the usual run ends."""
    titles = ("test images", "training images, at the mean", "test images, at the mean")
    paths = ("test_nll", "train_nll", "mean_test_nll")
    for ax, title, path in zip(axes, titles, paths, strict=True):
        for method, results in overlong.items():
            shown = path if method in VARIATIONAL or path == "train_nll" else "test_nll"
            found = list(results.values())
            mean, error = mean_and_error([result[shown] for result in found])
            ax.plot(found[0]["epoch"], mean, color=COLORS[method], label=labels[method])
            low, high = mean - np.nan_to_num(error), mean + np.nan_to_num(error)
            ax.fill_between(found[0]["epoch"], low, high, color=COLORS[method], alpha=0.2, lw=0)
        ax.axvline(epochs, color="#999999", ls=":", lw=1.2)
        ax.set(title=f"Over-long: {title}", xlabel="epoch", ylabel="NLL")
        if path == "train_nll":
            ax.set_yscale("log")
    axes[0].legend(fontsize=8, frameon=False)
