"""The tables and the figure of the language benchmark, made from its journal."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks._shared.comparing import chosen_by
from benchmarks._shared.journal import Journal, Result, Run, Runs, write_tables
from examples._shared.reporting import COLORS, cell, save_figure

PUBLISHED = {"86c4e6aa9db7c042": 1.88}  # nanoGPT's README, by digest: Tiny Shakespeare
WAYS = {  # method, way, curve
    "AdamW": ("AdamW", "point", "curve"),
    "IVON, mean": ("IVON", "point", "curve"),
    "IVON, 8 samples": ("IVON", "samples", "averages"),
    "signs": ("signs", "point", "curve"),
}
STYLES: dict[str, dict[str, Any]] = {
    "AdamW": {"color": COLORS["AdamW"]},
    "IVON, mean": {"color": COLORS["IVON"]},
    "IVON, 8 samples": {"color": COLORS["SGD"], "ls": "", "marker": "D", "ms": 6, "mfc": "none"},
    "signs": {"color": "0.5"},
}
NOTES = (
    "{steps:,} steps of 12 windows of 64 characters; mean ± standard error over {count}, which set "
    "the initial weights, the batches and IVON's noise. Settings are chosen by the loss on 5 % of "
    "the text with the first seed; `Validation` is on the last tenth. IVON's nine settings were "
    "placed by 17 others, tried by hand for 500 steps on the same 5 %; AdamW's by nine earlier "
    "ones.\n\nMilliseconds are medians "
    "of interleaved blocks in one process, without evaluation. Of the settings, `longest` is "
    "α(h₀+δ)ξ, the longest step of a weight, and `turnover` (1−β₂)T; `clipped` is the share of "
    "weights whose step is at the clip radius, after a quarter of the run and at its end, h/h₀ are "
    "the quartiles at the end, and `inflated` is the share of weights whose h the noise of its own "
    "estimate would hold up. `signs`: steps of one length along the signs of the momentum."
)

Results = dict[str, list[dict[str, Any]]]  # by method, one per seed
Rows = list[Sequence[str]]


def tuning_loss(result: Result) -> float:
    """What chooses a setting: of samples, where there are samples."""
    return chosen_by(result["tuning"])


def write_report(journal: Journal) -> None:
    """Writes the tables (.md) and the figure (.png)."""
    timed = journal.select(part="timing")
    if not timed:
        raise SystemExit("there is nothing to compare yet: let the command finish first")
    identity, times = timed[-1]
    named = {name: identity[name] for name in ("text", "digest", "steps")}
    runs = journal.select(part="run", **named)
    results = {
        method: [x for run, x in runs if run["method"] == method and run["values"] == values]
        for method, values in identity["both"].items()
    }
    tables = {
        "Validation": validation(results, **times),
        "Validation loss on the way": on_the_way(results),
    } | {f"Settings of {name}": settings_of(name, runs, identity["both"]) for name in results}
    count, figure = len(results["AdamW"]), journal.path.with_suffix(".png")
    notes = NOTES.format(steps=named["steps"], count=f"{count} seed{'s' * (count > 1)}")
    if published := PUBLISHED.get(named["digest"]):
        notes += (
            f"\n\nnanoGPT's published validation loss with this configuration is {published}, "
            "after training on the 5 % as well, in which the play of the last tenth begins."
        )
    notes += f"\n\n![Figure]({figure.name})"
    write_tables(journal, f"Language modelling: {named['text']}", tables, notes)
    save_figure(draw(results), figure)


def validation(results: Results, seconds: dict[str, float], ratio: Sequence[float]) -> Rows:
    """The metrics of every way to predict, and the time per step."""
    ways = {
        name: [x["validation"][way] for x in results[method]]
        for name, (method, way, _) in WAYS.items()
    }

    def row(name: str, decimals: int, value: Callable[[dict[str, Any]], float]) -> list[str]:
        return [name, *(cell([value(x) for x in runs], decimals) for runs in ways.values())]

    base, *others = ([x["nll"] for x in runs] for runs in ways.values())
    lead = [cell(np.subtract(losses, base), 4) for losses in others]
    ivon = f"{1e3 * seconds['IVON']:.1f}"
    median, low, high = ratio
    return [
        ["", *ways],
        row("loss (nats per character)", 4, lambda x: x["nll"]),
        ["loss less AdamW's, same seed", "", *lead],
        row("perplexity", 3, lambda x: math.exp(x["nll"])),
        row("accuracy (%)", 2, lambda x: 100 * x["accuracy"]),
        row("ECE (%)", 2, lambda x: 100 * x["ece"]),
        row("Brier score", 4, lambda x: x["brier"]),
        ["milliseconds per step", f"{1e3 * seconds['AdamW']:.1f}", ivon, ivon, ""],
        ["as a ratio [quartiles]", "1", f"{median:.2f} [{low:.2f}, {high:.2f}]", "", ""],
    ]


def settings_of(method: str, runs: Runs, both: Mapping[str, Any]) -> Rows:
    """What a method has tried with the first seed, and what became of h."""
    tried = [(run, x) for run, x in runs if run["method"] == method and run["seed"] == 0]
    rows: Rows = []
    for run, result in tried:
        row = _setting(run, result)
        rows = rows or [[*row, ""]]
        rows.append([*row.values(), "chosen" if run["values"] == both[method] else ""])
    return rows


def _setting(run: Run, result: Result) -> dict[str, str]:
    varied = {k: x for k, x in run["values"].items() if k not in ("b1", "b2")}
    row = {name.replace("_", " "): f"{x:g}" for name, x in varied.items()}
    row["tuning loss"] = f"{result['tuning']['point']['nll']:.4f}"
    if "h" not in result:
        return row
    early, late = (result["h"][place][1] for place in (0, -1))
    quartiles = " ".join(f"{late[f'h/h₀ p{p}']:.2g}" for p in (25, 50, 75))
    return row | {
        "of 8 samples": f"{result['tuning']['samples']['nll']:.4f}",
        "clipped": f"{early['clipped']:.2f} {late['clipped']:.2f}",
        "h/h₀": quartiles,
        "inflated": f"{late['inflated']:.2f}",
    }


def curves(results: Results) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps, and losses of shape (seeds, points)."""
    points = {k: np.array([x[c] for x in results[m]], float) for k, (m, _, c) in WAYS.items()}
    return {name: (x[0, :, 0], x[:, :, 1]) for name, x in points.items() if x.size}


def on_the_way(results: Results) -> Rows:
    """The validation loss at every fifth point."""
    found = curves(results)
    rows: Rows = [["step", *found]]
    for step in found["AdamW"][0][4::5]:
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
