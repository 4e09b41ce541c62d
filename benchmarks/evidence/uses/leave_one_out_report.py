"""Choices, tables and figure of `leave_one_out.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import spearmanr

from examples._shared.reporting import COLORS, cell, format_table, mean_and_error, save_figure
from ivon_jax import Selection, select_by_leave_one_out


class Curves(NamedTuple):
    """NLLs of each seed at each epoch looked at, or under each prior.

    Attributes:
      train: of the training examples, at the posterior mean.
      valid: of images that were not learned, at the mean.
      test: of the test images, at the mean.
      averaged: of the test images, averaged over posterior samples.
      first: leave-one-out, to first order.
      second: leave-one-out, to second order, over the examples for which it is defined.
      undefined: share of the others.
    """

    train: Any
    valid: Any
    test: Any
    averaged: Any
    first: Any = np.nan
    second: Any = np.nan
    undefined: Any = np.nan


class Criterion(NamedTuple):
    """A way to choose: the curve looked at, the test NLL of that run, and of the run chosen for."""

    values: np.ndarray
    test: np.ndarray
    scored: np.ndarray


def criteria(full: Curves, split: Curves) -> dict[str, Criterion]:
    """All criteria, by label, from the runs on all images and on four fifths of them."""
    return {
        "leave-one-out": Criterion(full.first, full.test, full.test),
        "leave-one-out, second order": Criterion(full.second, full.test, full.test),
        "training NLL": Criterion(full.train, full.test, full.test),
        "a fifth held out": Criterion(split.valid, split.test, split.test),
        "a fifth held out, then all learned": Criterion(split.valid, split.test, full.test),
        "as many further images": Criterion(full.valid, full.test, full.test),
    }


def choose(nlls: np.ndarray, patience: int | None = None) -> Selection:
    """`select_by_leave_one_out`, of which index 0 is taken if no NLL is finite."""
    choice = select_by_leave_one_out(nlls.tolist(), patience)
    return choice._replace(best=choice.best or 0)


def stopping_point(nlls: np.ndarray, patience: int) -> int:
    """The look that is kept if training ends after `patience` looks without improvement."""
    best = 0
    for seen in range(1, len(nlls) + 1):
        best, stop = choose(nlls[:seen], patience)
        if stop:
            break
    return int(best or 0)


def rank_correlation(values: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each seed; NaN where there are fewer than three points."""
    if values.shape[1] < 3:
        return np.full(len(values), np.nan)
    pairs = zip(values, test, strict=True)
    return np.array([float(np.asarray(spearmanr(a, b))[0]) for a, b in pairs])


# --- Tables ---------------------------------------------------------------------------------------


def stopping_table(full: Curves, split: Curves, every: int, patience: int) -> str:
    """Which epoch each criterion keeps, and what that costs."""
    best = full.test.min(axis=1)
    epochs = (full.test.argmin(axis=1) + 1) * every
    rows = [
        ["", "epoch kept", "test NLL", "cost", "rank correlation"],
        ["best by the test set", cell(epochs, 0), cell(best, 3), "", ""],
    ]
    for label, criterion in criteria(full, split).items():
        kept = np.array([stopping_point(seed, patience) for seed in criterion.values])
        rows.append([label, cell((kept + 1) * every, 0), *_scored(criterion, kept, best)])
    last = full.test[:, -1]
    length = f"{full.test.shape[1] * every}"
    rows.append(["no stopping", length, cell(last, 3), cell(last - best, 3), ""])
    return format_table(rows)


def priors_table(full: Curves, decays: Sequence[float]) -> str:
    """The NLLs under each prior."""
    rows = [
        ["δ", "training", "leave-one-out", "second order", "undefined, %", "test", "test, averaged"]
    ]
    for index, decay in enumerate(decays):
        at = Curves(*(x[:, index] for x in full))
        rows.append(
            [
                format_decay(decay),
                *(cell(x, 3) for x in (at.train, at.first, at.second)),
                cell(100 * at.undefined, 1),
                *(cell(x, 3) for x in (at.test, at.averaged)),
            ]
        )
    return format_table(rows)


def choices_table(full: Curves, split: Curves, decays: Sequence[float]) -> str:
    """Which prior each criterion takes, and what that costs."""
    best = full.test.min(axis=1)
    rows = [
        ["", "test NLL", "cost", "rank correlation", "δ taken, number of seeds"],
        ["best by the test set", cell(best, 3), "", "", _taken(_choices(full.test), decays)],
    ]
    for label, criterion in criteria(full, split).items():
        taken = _choices(criterion.values)
        rows.append([label, *_scored(criterion, taken, best), _taken(taken, decays)])
    return format_table(rows)


def _choices(values: np.ndarray) -> np.ndarray:
    return np.array([choose(seed).best for seed in values])


def _scored(criterion: Criterion, chosen: np.ndarray, best: np.ndarray) -> list[str]:
    """Test NLL and cost of a choice, and the rank correlation."""
    reached = criterion.scored[np.arange(len(chosen)), chosen]
    correlation = rank_correlation(criterion.values, criterion.test)
    return [cell(reached, 3), cell(reached - best, 3), cell(correlation, 2)]


def _taken(choices: np.ndarray, decays: Sequence[float]) -> str:
    """How many seeds take each prior that is taken at all: `0.001 (3), 0.0032 (2)`."""
    indices, counts = np.unique(choices, return_counts=True)
    pairs = zip(indices, counts, strict=True)
    return ", ".join(f"{format_decay(decays[index])} ({count})" for index, count in pairs)


def format_decay(decay: float) -> str:
    """A short number: 0.001, 0.00032."""
    return f"{float(f'{decay:.1e}'):g}"


# --- Figure ---------------------------------------------------------------------------------------

STYLES = {  # curve: label, colour, line
    "train": ("training", COLORS["SGD"], "-"),
    "first": ("leave-one-out", COLORS["IVON"], "-"),
    "second": ("leave-one-out, second order", COLORS["IVON, mean"], "--"),
    "test": ("test, at the mean", COLORS["unfamiliar"], "-"),
    "averaged": ("test, averaged over samples", COLORS["unfamiliar"], ":"),
}


def write_figure(
    path: Path,
    cases: Mapping[str, Curves],
    priors: Curves,
    decays: Sequence[float],
    every: int,
    patience: int,
) -> None:
    """NLLs over epochs with the epochs chosen, over priors, and estimate against test NLL."""
    figure = Figure(figsize=(12.5, 9.4), layout="constrained")
    (above, below) = figure.subplots(2, 2)
    figure.suptitle("Leave-one-out NLL from the training set, and test NLL (mean ± s.e. of seeds)")
    for ax, (name, curves) in zip(above, cases.items(), strict=True):
        epochs = every * np.arange(1, curves.test.shape[1] + 1)
        _draw_curves(ax, epochs, curves)
        _mark_choices(ax, epochs, curves, patience)
        ax.set(xlabel="epoch", title=f"Which epoch to keep? {name.capitalize()}")
    _draw_curves(below[0], np.array(decays), priors)
    wrong = list(cases)[-1]
    below[0].set(xlabel="weight decay δ", xscale="log", title=f"Which prior to take? {wrong}")
    _draw_scatter(below[1], priors, decays)
    for ax in (*above, below[0]):
        ax.legend(fontsize=8, framealpha=0.8, edgecolor="none")
    save_figure(figure, path)


def _draw_curves(ax: Axes, x: np.ndarray, curves: Curves) -> None:
    for name, (label, color, line) in STYLES.items():
        mean, error = mean_and_error(getattr(curves, name))
        ax.plot(x, mean, color=color, linestyle=line, label=label, linewidth=1.6)
        if name != "second":  # whose error is as large as the panel
            ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    shown = [getattr(curves, name).mean(axis=0) for name in STYLES if name != "second"]
    low, high = np.min(shown), np.max(shown)
    if high > 10 * low:
        ax.set(yscale="log", ylim=(0.8 * low, 1.5 * high))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    ax.set_ylabel("NLL")


def _mark_choices(ax: Axes, epochs: np.ndarray, curves: Curves, patience: int) -> None:
    """Marks on the test NLL of each seed the epochs that the estimate and the test set keep."""
    kept = np.array([stopping_point(seed, patience) for seed in curves.first])
    for chosen, marker, color, label in (
        (kept, "v", COLORS["IVON"], "kept by leave-one-out (a seed)"),
        (curves.test.argmin(axis=1), "o", COLORS["unfamiliar"], "best by the test set (a seed)"),
    ):
        height = curves.test[np.arange(len(chosen)), chosen]
        style: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.6, "zorder": 3, "s": 34}
        ax.scatter(epochs[chosen], height, marker=marker, color=color, label=label, **style)


def _draw_scatter(ax: Axes, priors: Curves, decays: Sequence[float]) -> None:
    """One dot per seed and prior; the brighter, the larger the weight decay."""
    color = np.broadcast_to(np.log10(decays), priors.test.shape)
    points = ax.scatter(priors.test, priors.first, c=color, cmap="viridis", s=26)
    low = min(priors.test.min(), priors.first.min())
    high = max(priors.test.max(), priors.first.max())
    ax.plot([low, high], [low, high], color=COLORS["reference"], linestyle=":", label="equal")
    ax.set(xlabel="test NLL", ylabel="leave-one-out NLL")
    ax.set_title("One dot per seed and prior")
    ax.legend(fontsize=8, frameon=False)
    figure = ax.get_figure()
    if figure is not None:
        figure.colorbar(points, ax=ax, label="log₁₀ δ")
