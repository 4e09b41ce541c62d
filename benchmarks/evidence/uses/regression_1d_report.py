"""The table and the figure of `regression_1d.py`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.uses.regression_1d_methods import EDGES, MEMBERS, Problem, regions
from examples._shared.reporting import COLORS, cell, format_table
from ivon_jax import Moments, metrics

BAND = 1.96  # standard deviations on either side hold 95 % of a Gaussian
ADAMW, ENSEMBLE, IVON, MIXTURE, NUTS = (
    "AdamW",
    f"AdamW, {MEMBERS} nets",
    "IVON",
    f"IVON, {MEMBERS} runs",
    "NUTS",
)
STYLES: dict[str, dict[str, Any]] = {
    ENSEMBLE: {"color": COLORS["AdamW"]},
    IVON: {"color": COLORS["IVON"]},
    MIXTURE: {"color": COLORS["IVON"], "linestyle": "--"},
    NUTS: {"color": COLORS["reference"]},
}


def table(methods: Mapping[str, Moments], problems: Problem) -> str:
    """Measures as rows, methods as columns; every array has the data sets on axis 0."""
    masks = {name: np.asarray(mask) for name, mask in regions(problems.test_x[0]).items()}
    masks["everywhere"] = np.ones_like(masks["gap"])
    measured = {
        (method, name): measure(moments, methods[NUTS], problems, where)
        for method, moments in methods.items()
        for name, where in masks.items()
    }
    rows = [["", *methods]]

    def add(label: str, name: str, measure: str, decimals: int) -> None:
        values = [measured[method, name][measure] for method in methods]
        rows.append([label, *(cell(value, decimals) for value in values)])

    for label, name, decimals in (("std of f", "std", 3), ("NLL", "nll", 2)):
        for region in regions(problems.test_x[0]):
            add(f"{label}, {region}", region, name, decimals)
    add("mean, RMS from NUTS", "everywhere", "mean_distance", 3)
    add("std, RMS from NUTS", "everywhere", "std_distance", 3)
    for region in regions(problems.test_x[0]):
        add(f"f in 95 % band, {region}, %", region, "coverage", 0)
    return format_table(rows)


def measure(
    moments: Moments, reference: Moments, problems: Problem, where: np.ndarray
) -> dict[str, np.ndarray]:
    """Every measure on the inputs selected by a mask, one entry per data set."""
    mean, variance, model_variance = (np.asarray(x)[:, where] for x in moments)
    std, reference_std = np.sqrt(model_variance), np.sqrt(reference.model_variance[:, where])
    targets = problems.test_y[:, where]
    nll = [metrics.gaussian_nll(*one) for one in zip(mean, variance, targets, strict=True)]
    truth = np.asarray(problems.test_f)[:, where]
    return {
        "std": std.mean(axis=1),
        "nll": np.array(nll),
        "mean_distance": _rms(mean - reference.mean[:, where]),
        "std_distance": _rms(std - reference_std),
        "coverage": 100 * covered(mean, std, truth),
    }


def covered(mean: np.ndarray, std: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share of true values inside the 95 % band, over the last axis."""
    return (np.abs(mean - truth) <= BAND * std).mean(axis=-1)


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(x**2, axis=1))


def draw(methods: Mapping[str, Moments], nets: np.ndarray, problems: Problem, title: str) -> Figure:
    """Draws the bands on the first data set, and the standard deviation averaged over all.

    Args:
      methods: moments by method, with the data sets on axis 0.
      nets: functions of the ensemble on the first data set, (MEMBERS, n).
      problems: the data sets.
      title: says which data set is shown.
    """
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    first = Problem(*(x[0] for x in problems))
    bands = dict(zip((ENSEMBLE, IVON, NUTS), axes.flat, strict=False))
    for method, ax in bands.items():
        moments = Moments(*(x[0] for x in methods[method]))
        _draw_band(ax, moments, first, STYLES[method]["color"])
        ax.set_title(f"{method}: {title}", fontsize=10)
    for net, label in zip(nets, ("the nets", *[None] * (len(nets) - 1)), strict=True):
        bands[ENSEMBLE].plot(first.test_x, net, color="#8A5A00", linewidth=0.7, label=label)
    low = min(ax.get_ylim()[0] for ax in bands.values())
    high = max(ax.get_ylim()[1] for ax in bands.values())
    for ax in bands.values():
        ax.set(xlabel="x", ylabel="y", ylim=(low, high))
        ax.legend(fontsize=8, frameon=False)
    _draw_deviations(axes[1, 1], methods, np.asarray(first.test_x))
    return figure


def _draw_band(ax: Axes, moments: Moments, problem: Problem, color: str) -> None:
    std = np.sqrt(moments.model_variance)
    ax.fill_between(
        problem.test_x,
        moments.mean - BAND * std,
        moments.mean + BAND * std,
        color=color,
        alpha=0.3,
        linewidth=0,
        label="95 % band of f",
    )
    ax.plot(problem.test_x, moments.mean, color=color, linewidth=2, label="mean")
    ax.plot(problem.test_x, problem.test_f, color="black", linewidth=1, ls=":", label="true f")
    ax.plot(problem.x, problem.y, "o", color="black", markersize=3, label="data")


def _draw_deviations(ax: Axes, methods: Mapping[str, Moments], x: np.ndarray) -> None:
    for method, style in STYLES.items():
        std = np.sqrt(methods[method].model_variance)
        ax.plot(x, std.mean(axis=0), label=method, linewidth=1.8, **style)
    for side in (-1, 1):
        ax.axvspan(side * EDGES[0], side * EDGES[1], color="0.9", linewidth=0)
    ax.set(xlabel="x", ylabel="std of f", ylim=(0, 1.3 * ax.get_ylim()[1]))
    ax.set_title(
        "Standard deviation of f, mean over data sets (shaded: where the data are)", fontsize=10
    )
    ax.legend(fontsize=8, framealpha=0.9, ncols=2, loc="upper center")
