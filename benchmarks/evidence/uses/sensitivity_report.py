"""Tables and figure of `sensitivity.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr

from examples._shared.reporting import COLORS, cell, format_table, mean_and_error, save_figure

PICTURES = 12  # in a row
SCORES = {  # score of an example: colour
    "sensitivity": COLORS["IVON"],
    "training loss": COLORS["AdamW"],
    "prediction error": COLORS["SGD"],
    "prediction variance": "#AAAAAA",
}

LEARNED = "wrong labels predicted, %"


class Pictures(NamedTuple):
    """The training images of one seed.

    Attributes:
      images: (N, 8, 8).
      labels: (N,) the labels learned.
      predicted: (N,) classes predicted at the posterior mean.
      score: (N,) sensitivities.
      classes: (10,) sums over the images of each class.
    """

    images: Any
    labels: Any
    predicted: Any
    score: Any
    classes: Any


class Agreement(NamedTuple):
    """M examples that were left out, arrays (M, K).

    Attributes:
      estimate: change of the output by the estimate.
      truth: change of the output by retraining.
      floor: change that has nothing to do with the removal.
      error: the prediction error e of the examples.
    """

    estimate: Any
    truth: Any
    floor: Any
    error: Any


def size(vectors: np.ndarray) -> np.ndarray:
    """Norms of the rows."""
    return np.linalg.norm(vectors, axis=-1)


def summarise(found: Agreement) -> dict[str, float]:
    """How well estimate and truth agree, over the examples of one seed."""
    estimate, truth = size(found.estimate), size(found.truth)
    cosine = np.sum(found.estimate * found.truth, axis=-1) / np.maximum(estimate * truth, 1e-30)
    return {
        "Spearman": _correlation(spearmanr, estimate, truth),
        "Pearson": _correlation(pearsonr, estimate, truth),
        "Spearman of e": _correlation(spearmanr, size(found.error), truth),
        "Pearson of e": _correlation(pearsonr, size(found.error), truth),
        "cosine": float(np.median(cosine)),
        "true / est.": float(np.median(truth / np.maximum(estimate, 1e-30))),
        "change": float(np.median(truth)),
        "floor": float(np.median(size(found.floor))),
    }


def _correlation(measure: Any, a: np.ndarray, b: np.ndarray) -> float:
    return float(np.asarray(measure(a, b))[0])


# --- Tables ---------------------------------------------------------------------------------------


def classes_table(pictures: Pictures) -> str:
    """Number, summed and mean sensitivity, and share of all, of each digit."""
    counts = np.bincount(pictures.labels, minlength=len(pictures.classes))
    means = pictures.classes / np.maximum(counts, 1)
    shares = 100 * pictures.classes / pictures.classes.sum()
    return format_table(
        [
            ["digit", *(str(digit) for digit in range(len(counts)))],
            ["images", *(str(count) for count in counts)],
            ["sensitivity, mean", *(f"{x:.2f}" for x in means)],
            ["share of the sum, %", *(f"{x:.1f}" for x in shares)],
        ]
    )


def agreement_table(seeds: Sequence[Mapping[str, Agreement]]) -> str:
    """Models and ways of retraining as rows."""
    rows = []
    for name in seeds[0]:
        summaries = [summarise(seed[name]) for seed in seeds]
        if not rows:
            rows.append(["", *summaries[0]])
        cells = (
            cell([summary[key] for summary in summaries], 4 if key == "floor" else 2)
            for key in summaries[0]
        )
        rows.append([name, *cells])
    return format_table(rows)


def detection_table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Scores as rows, settings as columns."""
    rows = [["", *found]]
    for score in SCORES:
        rows.append(
            [score, *(cell([seed[score] for seed in seeds], 3) for seeds in found.values())]
        )
    learned = (cell([seed[LEARNED] for seed in seeds], 1) for seeds in found.values())
    rows.append([f"({LEARNED})", *learned])
    return format_table(rows)


# --- Figure ---------------------------------------------------------------------------------------


def write_figure(
    path: Path,
    pictures: Pictures,
    agreements: Sequence[Mapping[str, Agreement]],
    detections: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Images, classes, estimate against truth, and AUROCs."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(0.9, 1))
    above, below = halves
    _draw_pictures(above, pictures)
    axes = below.subplots(1, 4, width_ratios=(0.8, 1, 1, 1.1))
    _draw_classes(axes[0], pictures)
    names = ("network, IVON again", "network, at the mean")
    for ax, name in zip(axes[1:3], names, strict=True):
        _draw_scatter(ax, name, [seed[name] for seed in agreements])
    _draw_detection(axes[3], detections)
    save_figure(figure, path)


def _draw_pictures(figure: Any, pictures: Pictures) -> None:
    """The images of the largest and of the smallest sensitivities, in two rows each."""
    order = np.argsort(-pictures.score)
    groups = figure.subfigures(2, 1)
    titles = "Most sensitive training images", "Least sensitive training images"
    for group, title, rows in zip(
        groups, titles, (order[:PICTURES], order[-PICTURES:]), strict=True
    ):
        group.suptitle(f"{title} (label, prediction if another, sensitivity)", fontsize=11)
        for ax, row in zip(group.subplots(1, PICTURES), rows, strict=True):
            label, predicted = pictures.labels[row], pictures.predicted[row]
            ax.imshow(pictures.images[row], cmap="gray_r")
            name = f"{label}" if label == predicted else f"{label}, says {predicted}"
            ax.set_title(f"{name}\n{pictures.score[row]:.2g}", fontsize=9)
            ax.set_axis_off()


def _draw_classes(ax: Axes, pictures: Pictures) -> None:
    counts = np.bincount(pictures.labels, minlength=len(pictures.classes))
    ax.bar(np.arange(len(counts)), pictures.classes / np.maximum(counts, 1), color=COLORS["IVON"])
    ax.set(xlabel="digit", ylabel="mean sensitivity", xticks=np.arange(len(counts)))
    ax.set_title("Sensitivity by class", fontsize=10)


def _draw_scatter(ax: Axes, name: str, seeds: Sequence[Agreement]) -> None:
    estimate = np.concatenate([size(seed.estimate) for seed in seeds])
    truth = np.concatenate([size(seed.truth) for seed in seeds])
    floor = float(np.median(np.concatenate([size(seed.floor) for seed in seeds])))
    ax.scatter(estimate, truth, s=14, color=COLORS["IVON"], alpha=0.6, linewidth=0)
    ends = [max(estimate.min(), truth.min()), min(estimate.max(), truth.max())]
    ax.plot(ends, ends, color=COLORS["reference"], linestyle=":", label="equal")
    if floor > truth.min() / 10:  # otherwise there is nothing to beware of, and much white
        ax.axhline(floor, color=COLORS["unfamiliar"], linestyle="--", label="other noise alone")
    ax.set(xscale="log", yscale="log", xlabel="sensitivity (estimate)")
    ax.set_ylabel("change of the output by retraining")
    ax.set_title(f"{name[0].upper()}{name[1:]}", fontsize=10)
    ax.legend(fontsize=8, frameon=False)


def _draw_detection(ax: Axes, found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    width = 0.8 / len(SCORES)
    for index, (name, color) in enumerate(SCORES.items()):
        values = [mean_and_error([seed[name] for seed in seeds]) for seeds in found.values()]
        means, errors = np.array(values).T
        places = np.arange(len(found)) + (index - (len(SCORES) - 1) / 2) * width
        ax.bar(places, means, width, yerr=errors, color=color, label=name, capsize=2)
    ax.axhline(0.5, color=COLORS["reference"], linestyle=":", linewidth=1)
    ax.set(xticks=np.arange(len(found)), xticklabels=list(found), ylim=(0, 1.35), ylabel="AUROC")
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.set_title("Finding wrong labels", fontsize=10)
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
