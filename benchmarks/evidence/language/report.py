"""The tables and the figure of the language benchmark, made from its journal."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._shared.journal import Journal, write_tables
from examples._shared.reporting import COLORS, cell, save_figure

NAMES = {"AdamW": "AdamW", "Ivon": "IVON"}  # of the settings' classes
PUBLISHED = {"86c4e6aa9db7c042": 1.88}  # nanoGPT's README, by digest: Tiny Shakespeare
COLUMNS = {  # method, score, curve
    "AdamW": ("AdamW", "mean", "curve"),
    "IVON, mean": ("IVON", "mean", "curve"),
    "IVON, 16 samples": ("IVON", "averaged", "curve_averaged"),
}
STYLES: dict[str, dict[str, Any]] = {
    "AdamW": {"color": COLORS["AdamW"], "ls": "-"},
    "IVON, mean": {"color": COLORS["IVON"], "ls": "-"},
    "IVON, 16 samples": {"color": COLORS["SGD"], "ls": "", "marker": "D", "ms": 6, "mfc": "none"},
}
NOTES = """`python benchmarks/evidence/language/main.py --text {text}`, after the same with `--tune`

{steps:,} steps of 12 windows of 64 characters; mean ± standard error over {seeds}, \
which set the initial weights, the batches and IVON's noise. The last tenth of the text is for \
validation; the settings were chosen on the twentieth before it, in short runs with one seed each.

{settings}

Milliseconds are medians of interleaved blocks in one process. Wall time in the figure is steps \
times that: the machine was shared, so the duration of a single run says little. It excludes \
evaluation."""

Results = dict[str, list[dict[str, Any]]]
Runs = Sequence[tuple[dict, dict]]


def write_report(journal: Journal) -> None:
    """Writes the tables (.md) and, if there are final runs, the figure (.png)."""
    tables, notes = {}, ""
    sweep, finals = journal.select(part="tune"), journal.select(part="final")
    if finals:
        (run, _), results = finals[0], by_method(finals)
        timed = [x for other, x in journal.select(part="timing") if other["steps"] == run["steps"]]
        if not timed:
            raise SystemExit("the step has not been timed yet: let the command finish first")
        seconds, count = timed[-1]["seconds"], len(results["AdamW"])
        tables["Validation"] = validation(results, seconds, timed[-1]["ratio"])
        tables["Validation loss on the way"] = on_the_way(results)
        settings = "\n\n".join(f"`{shown(x)}`" for x in sorted({r["settings"] for r, _ in finals}))
        seeds = f"{count} seed{'s' * (count > 1)}"
        notes = NOTES.format(text=run["text"], steps=run["steps"], seeds=seeds, settings=settings)
        if published := PUBLISHED.get(run["digest"]):
            notes += "\n\nnanoGPT's published validation loss with this configuration: "
            notes += f"{published}."
        save_figure(draw(results, seconds), journal.path.with_suffix(".png"))
    if sweep:
        rows = [[shown(r["settings"]), f"{x['steps']:,}", f"{x['loss']:.4f}"] for r, x in sweep]
        tables["Choice of settings"] = [["settings", "steps", "loss on the tuning part"], *rows]
    title = f"Language modelling: {(finals or sweep)[0][0]['text']}"
    write_tables(journal, title, tables, notes)


def shown(settings: str) -> str:
    """Settings with short numbers."""
    short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):g}", settings)
    return short.replace("Ivon(", "IVON(").replace("e+", "e").replace("'", "")


def by_method(finals: Runs) -> Results:
    """Results of each method, one per seed that both have; leaves if they cannot be averaged."""
    found: dict[str, dict[int, dict]] = {name: {} for name in NAMES.values()}
    kinds = {(run["digest"], run["steps"]) for run, _ in finals}
    if len(kinds) > 1 or len({run["settings"] for run, _ in finals}) > len(NAMES):
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


def validation(
    results: Results, seconds: dict[str, float], ratio: Sequence[float]
) -> list[list[str]]:
    """The metrics of every way to predict, and the time per step."""
    columns = {k: [x[score] for x in results[m]] for k, (m, score, _) in COLUMNS.items()}

    def row(name: str, decimals: int, value: Callable[[dict[str, Any]], float]) -> list[str]:
        return [name, *(cell([value(x) for x in runs], decimals) for runs in columns.values())]

    base, *others = ([x["loss"] for x in runs] for runs in columns.values())
    lead = [cell(np.subtract(losses, base), 4) for losses in others]
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


def curves(results: Results) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps, and losses of shape (seeds, points)."""
    points = {k: np.array([x[c] for x in results[m]], float) for k, (m, _, c) in COLUMNS.items()}
    return {name: (x[0, :, 0], x[:, :, 1]) for name, x in points.items() if x.size}


def on_the_way(results: Results) -> list[list[str]]:
    """The validation loss at every fourth point."""
    found = curves(results)
    rows = [["step", *found]]
    for step in found["AdamW"][0][3::4]:
        cells = [cell(losses[:, at == step][:, 0], 3) for at, losses in found.values()]
        rows.append([f"{step:,.0f}", *cells])
    return rows


# --- Figure ---------------------------------------------------------------------------------------


def draw(results: Results, seconds: dict[str, float]) -> Figure:
    """Loss by steps and by time, and the reliability of the predictions."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_steps, by_time, reliability = figure.subplots(1, 3)
    draw_losses(by_steps, results, {"AdamW": 1.0, "IVON": 1.0}, "steps")
    draw_losses(by_time, results, {k: s / 60 for k, s in seconds.items()}, "minutes of training")
    draw_reliability(reliability, results)
    return figure


def draw_losses(ax: Axes, results: Results, scale: dict[str, float], label: str) -> None:
    """Mean over seeds, and their range."""
    for name, (steps, losses) in curves(results).items():
        style, x = STYLES[name], steps * scale[COLUMNS[name][0]]
        ax.plot(x, losses.mean(axis=0), label=name, **style)
        if style["ls"]:
            low, high = losses.min(axis=0), losses.max(axis=0)
            ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
    ax.set(xlabel=label, ylabel="validation loss (nats per character)")
    ax.legend(frameon=False)


def draw_reliability(ax: Axes, results: Results) -> None:
    """Accuracy less confidence: on the usual axes, calibrated curves all lie on the diagonal."""
    for name, (method, score, _) in COLUMNS.items():
        runs = [x[score] for x in results[method]]
        bins = {k: np.array([x["bins"][k] for x in runs], float) for k in runs[0]["bins"]}
        total = bins["count"].sum(axis=0)
        full = total >= 100 * len(runs)
        confidence, accuracy = (
            (bins[k] * bins["count"]).sum(axis=0)[full] / total[full]
            for k in ("confidence", "accuracy")
        )
        label = f"{name}: ECE {100 * np.mean([x['ece'] for x in runs]):.2f} %"
        style = {"marker": "o", "ms": 4, **STYLES[name]}
        ax.plot(confidence, 100 * (accuracy - confidence), label=label, **style)
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel="confidence", ylabel="accuracy - confidence (percentage points)", xlim=(0, 1))
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.35 * (high - low), high)  # room for the legend
    ax.legend(frameon=False, loc="lower center")
