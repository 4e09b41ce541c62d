"""The tables and the figure of the language benchmark, made from its journal."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks._shared.journal import Journal, write_tables
from examples._shared.reporting import COLORS, cell, save_figure

NAMES = {"AdamW": "AdamW", "Ivon": "IVON"}  # of the settings' classes
PUBLISHED = {"86c4e6aa9db7c042": 1.88}  # nanoGPT's README, by digest: Tiny Shakespeare
WAYS = {  # method, score, curve
    "AdamW": ("AdamW", "mean", "curve"),
    "IVON, mean": ("IVON", "mean", "curve"),
    "IVON, 16 samples": ("IVON", "averaged", "curve_averaged"),
}
STYLES: dict[str, dict[str, Any]] = {
    "AdamW": {"color": COLORS["AdamW"]},
    "IVON, mean": {"color": COLORS["IVON"]},
    "IVON, 16 samples": {"color": COLORS["SGD"], "ls": "", "marker": "D", "ms": 6, "mfc": "none"},
}
NOTES = """`python benchmarks/evidence/language/main.py --text {text}`

{steps:,} steps of 12 windows of 64 characters; mean ± standard error over {seeds}, \
which set the initial weights, the batches and IVON's noise. The last tenth of the text is for \
validation; the settings were chosen on the twentieth before it, in short runs with one seed each.

{settings}

Milliseconds are medians of interleaved blocks in one process, without evaluation."""

Results = dict[str, list[dict[str, Any]]]  # by method, one per seed
Rows = list[Sequence[str]]


def write_report(journal: Journal) -> None:
    """Writes the tables (.md) and the figure (.png)."""
    finals, timed = journal.select(part="final"), journal.select(part="timing")
    if not finals or not timed:
        raise SystemExit("there is nothing to compare yet: let the command finish first")
    (run, _), results = finals[0], by_method(finals)
    tables = {
        "Validation": validation(results, **timed[-1][1]),
        "Validation loss on the way": on_the_way(results),
    }
    if sweep := journal.select(part="tune"):
        rows = [[shown(r["settings"]), f"{x['steps']:,}", f"{x['loss']:.4f}"] for r, x in sweep]
        tables["Choice of settings"] = [["settings", "steps", "loss on the tuning part"], *rows]
    settings = "\n\n".join(f"`{shown(x)}`" for x in sorted({r["settings"] for r, _ in finals}))
    count, figure = len(results["AdamW"]), journal.path.with_suffix(".png")
    seeds = f"{count} seed{'s' * (count > 1)}"
    notes = NOTES.format(text=run["text"], steps=run["steps"], seeds=seeds, settings=settings)
    if published := PUBLISHED.get(run["digest"]):
        notes += f"\n\nnanoGPT's published validation loss with this configuration: {published}."
    notes += f"\n\n![Figure]({figure.name})"
    write_tables(journal, f"Language modelling: {run['text']}", tables, notes)
    save_figure(draw(results), figure)


def shown(settings: str) -> str:
    """Settings with short numbers."""
    short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):g}", settings)
    return short.replace("Ivon(", "IVON(").replace("e+", "e").replace("'", "")


def by_method(finals: Sequence[tuple[dict, dict]]) -> Results:
    """Results of the seeds that both methods have; leaves if they cannot be averaged."""
    found: dict[str, dict[int, dict]] = {name: {} for name in NAMES.values()}
    texts = {(run["digest"], run["steps"]) for run, _ in finals}
    if len(texts) > 1 or len({run["settings"] for run, _ in finals}) > len(NAMES):
        raise SystemExit("the results hold several texts, lengths or settings: one file for each")
    for run, result in finals:
        found[NAMES[run["settings"].split("(")[0]]][run["seed"]] = result
    seeds = sorted(set.intersection(*(set(x) for x in found.values())))
    if not seeds:
        raise SystemExit("no seed has been run with both optimizers yet")
    return {name: [x[seed] for seed in seeds] for name, x in found.items()}


def validation(results: Results, seconds: dict[str, float], ratio: Sequence[float]) -> Rows:
    """The metrics of every way to predict, and the time per step."""
    ways = {name: [x[score] for x in results[m]] for name, (m, score, _) in WAYS.items()}

    def row(name: str, decimals: int, value: Callable[[dict[str, Any]], float]) -> list[str]:
        return [name, *(cell([value(x) for x in runs], decimals) for runs in ways.values())]

    base, *others = ([x["loss"] for x in runs] for runs in ways.values())
    lead = [cell(np.subtract(losses, base), 4) for losses in others]
    ivon = f"{1e3 * seconds['IVON']:.1f}"
    median, low, high = ratio
    return [
        ["", *ways],
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
    points = {k: np.array([x[c] for x in results[m]], float) for k, (m, _, c) in WAYS.items()}
    return {name: (x[0, :, 0], x[:, :, 1]) for name, x in points.items() if x.size}


def on_the_way(results: Results) -> Rows:
    """The validation loss at every fourth point."""
    found = curves(results)
    rows: Rows = [["step", *found]]
    for step in found["AdamW"][0][3::4]:
        cells = [cell(losses[:, at == step][:, 0], 3) for at, losses in found.values()]
        rows.append([f"{step:,.0f}", *cells])
    return rows


def draw(results: Results) -> Figure:
    """The validation loss by steps: mean over seeds, and their range."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, (steps, losses) in curves(results).items():
        style = STYLES[name]
        ax.plot(steps, losses.mean(axis=0), label=name, **style)
        if "marker" not in style:
            low, high = losses.min(axis=0), losses.max(axis=0)
            ax.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
    ax.set(xlabel="steps", ylabel="validation loss (nats per character)")
    ax.legend(frameon=False)
    return figure
