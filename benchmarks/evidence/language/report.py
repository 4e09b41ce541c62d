"""The tables and the figure of `language.py`."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._shared.journal import Journal, write_tables
from examples._shared.reporting import COLORS, cell, save_figure

NAMES = {"AdamW": "AdamW", "Ivon": "IVON"}  # of the settings' classes
PUBLISHED = {"86c4e6aa9db7c042": 1.88}  # nanoGPT's README, by digest: Tiny Shakespeare

Results = dict[str, list[dict[str, Any]]]


def report(journal: Journal) -> None:
    """Writes the tables (.md) and, if there are final runs, the figure (.png)."""
    tables, notes = {}, ""
    sweep = journal.select(part="tune")
    finals = journal.select(part="final")
    if finals:
        timed = [x for run, x in journal.select(part="timing") if run["steps"] == _steps(finals)]
        if not timed:
            raise SystemExit("the step has not been timed yet: let the command finish first")
        results, seconds = _by_method(finals), timed[-1]["seconds"]
        tables["Validation"] = _validation(results, seconds, timed[-1]["ratio"])
        tables["Validation loss on the way"] = _on_the_way(results)
        notes = _notes(finals, len(results["AdamW"]))
        _figure(journal, results, seconds)
    if sweep:
        tables["Choice of settings"] = _choice(sweep)
    write_tables(journal, f"Language modelling: {_text(finals or sweep)}", tables, notes)


def _text(runs: Sequence[tuple[dict, dict]]) -> str:
    return runs[0][0]["text"]


def _steps(runs: Sequence[tuple[dict, dict]]) -> int:
    return runs[0][0]["steps"]


def _shown(settings: str) -> str:
    """Settings with short numbers."""
    short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):g}", settings)
    return short.replace("Ivon(", "IVON(").replace("e+", "e").replace("'", "")


def _by_method(finals: Sequence[tuple[dict, dict]]) -> Results:
    """Results of each method, one per seed that both have.

    Raises:
      SystemExit: if the runs cannot be averaged.
    """
    found: dict[str, dict[int, dict]] = {name: {} for name in NAMES.values()}
    kinds = {(run["digest"], run["steps"]) for run, _ in finals}
    settings = {run["settings"] for run, _ in finals}
    if len(kinds) > 1 or len(settings) > len(NAMES):
        raise SystemExit(
            "the results hold runs of several texts, lengths or settings: keep each in a file "
            "of its own"
        )
    for run, result in finals:
        found[NAMES[run["settings"].split("(")[0]]][run["seed"]] = result
    seeds = sorted(set.intersection(*(set(x) for x in found.values())))
    if not seeds:
        raise SystemExit("no seed has been run with both optimizers yet")
    return {name: [x[seed] for seed in seeds] for name, x in found.items()}


def _columns(results: Results) -> dict[str, list[dict[str, Any]]]:
    return {
        "AdamW": [x["mean"] for x in results["AdamW"]],
        "IVON, mean": [x["mean"] for x in results["IVON"]],
        "IVON, 16 samples": [x["averaged"] for x in results["IVON"]],
    }


def _validation(
    results: Results, seconds: dict[str, float], ratio: Sequence[float]
) -> list[list[str]]:
    columns = _columns(results)

    def row(name: str, decimals: int, value: Callable[[dict[str, Any]], float]) -> list[str]:
        return [name, *(cell([value(x) for x in runs], decimals) for runs in columns.values())]

    base = [x["loss"] for x in columns["AdamW"]]
    lead = [
        cell([x["loss"] - b for x, b in zip(runs, base, strict=True)], 4)
        for runs in list(columns.values())[1:]
    ]
    ivon = f"{1e3 * seconds['IVON']:.1f}"
    median, low, high = ratio
    return [
        ["", *columns],
        row("loss (nats per character)", 4, lambda x: x["loss"]),
        ["loss less AdamW's, same seed", "", *lead],
        row("perplexity", 3, lambda x: math.exp(x["loss"])),
        row("accuracy (%)", 2, lambda x: 100 * x["accuracy"]),
        row("ECE (%)", 2, lambda x: 100 * x["ece"]),
        row("Brier score", 4, lambda x: x["brier"]),
        ["milliseconds per step", f"{1e3 * seconds['AdamW']:.1f}", ivon, ivon],
        ["as a ratio [quartiles]", "1", f"{median:.2f} [{low:.2f}, {high:.2f}]", ""],
    ]


def _curves(results: Results) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps, and losses of shape (seeds, points)."""
    sources = {
        "AdamW": ("AdamW", "curve"),
        "IVON, mean": ("IVON", "curve"),
        "IVON, 16 samples": ("IVON", "curve_averaged"),
    }
    curves = {}
    for name, (method, field) in sources.items():
        points = np.array([x[field] for x in results[method]], dtype=float)
        if points.size:
            curves[name] = points[0, :, 0], points[:, :, 1]
    return curves


def _on_the_way(results: Results) -> list[list[str]]:
    curves = _curves(results)
    steps = [int(s) for s in curves["AdamW"][0]][3::4]
    rows = [["step", *curves]]
    for step in steps:
        cells = [cell(losses[:, at == step][:, 0], 3) for at, losses in curves.values()]
        rows.append([f"{step:,}", *cells])
    return rows


def _choice(sweep: Sequence[tuple[dict, dict]]) -> list[list[str]]:
    rows = [[_shown(run["settings"]), f"{x['steps']:,}", f"{x['loss']:.4f}"] for run, x in sweep]
    return [["settings", "steps", "loss on the tuning part"], *rows]


def _notes(finals: Sequence[tuple[dict, dict]], seeds: int) -> str:
    chosen = sorted({run["settings"] for run, _ in finals})
    published = PUBLISHED.get(finals[0][0]["digest"])
    lines = [
        f"{_steps(finals):,} steps of 12 windows of 64 characters; mean ± standard error over "
        f"{seeds} seed{'s' * (seeds > 1)}, which set the initial weights, the batches and IVON's "
        "noise. The last tenth of the text is for validation; the settings were chosen on the "
        "twentieth before it, in short runs with one seed each.",
        *(f"`{_shown(x)}`" for x in chosen),
        "Milliseconds are medians of interleaved blocks in one process. Wall time in the figure is "
        "steps times that: the machine was shared, so the duration of a single run says little. It "
        "excludes evaluation.",
    ]
    if published:
        lines.append(f"nanoGPT's published validation loss with this configuration: {published}.")
    return "\n\n".join(lines)


STYLES: dict[str, dict[str, Any]] = {
    "AdamW": {"color": COLORS["AdamW"], "ls": "-"},
    "IVON, mean": {"color": COLORS["IVON"], "ls": "-"},
    "IVON, 16 samples": {"color": COLORS["SGD"], "ls": "", "marker": "D", "ms": 6, "mfc": "none"},
}


def _figure(journal: Journal, results: Results, seconds: dict[str, float]) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_steps, by_time, reliability = figure.subplots(1, 3)
    _draw_losses(by_steps, results, {"AdamW": 1.0, "IVON": 1.0}, "steps")
    _draw_losses(by_time, results, {k: s / 60 for k, s in seconds.items()}, "minutes of training")
    _draw_reliability(reliability, results)
    save_figure(figure, journal.path.with_suffix(".png"))


def _draw_losses(ax: Axes, results: Results, scale: dict[str, float], label: str) -> None:
    for name, (steps, losses) in _curves(results).items():
        style = STYLES[name]
        x, mean = steps * scale[name.split(",")[0]], losses.mean(axis=0)
        ax.plot(x, mean, label=name, **style)
        if style["ls"]:
            low, high = losses.min(axis=0), losses.max(axis=0)
            ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
    ax.set(xlabel=label, ylabel="validation loss (nats per character)")
    ax.legend(frameon=False)


def _draw_reliability(ax: Axes, results: Results) -> None:
    """Accuracy less confidence: on the usual axes, calibrated curves all lie on the diagonal."""
    for name, runs in _columns(results).items():
        bins = {k: np.array([x["bins"][k] for x in runs], float) for k in runs[0]["bins"]}
        total = bins["count"].sum(axis=0)
        full = total >= 100 * len(runs)
        confidence, accuracy = (
            (bins[k] * bins["count"]).sum(axis=0)[full] / total[full]
            for k in ("confidence", "accuracy")
        )
        label = f"{name}: ECE {100 * np.mean([x['ece'] for x in runs]):.2f} %"
        gap = 100 * (accuracy - confidence)
        ax.plot(confidence, gap, label=label, **{"marker": "o", "ms": 4, **STYLES[name]})
    ax.axhline(0, color=mpl.rcParams["axes.edgecolor"], lw=0.8)
    ax.set(xlabel="confidence", ylabel="accuracy - confidence (percentage points)", xlim=(0, 1))
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.35 * (high - low), high)  # room for the legend
    ax.legend(frameon=False, loc="lower center")
