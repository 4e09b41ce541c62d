"""The tables and the figure of the language benchmark, made from its journal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks._shared.comparing import chosen_by
from benchmarks._shared.journal import Journal, Result, Run, Runs, write_tables
from examples._shared.reporting import COLORS, cell, save_figure

PUBLISHED = {"86c4e6aa9db7c042": 1.88}  # nanoGPT's README, by digest: Tiny Shakespeare
WAYS = {  # method, way, curve
    "AdamW": ("AdamW", "point", "curve"),
    "signs": ("signs", "point", "curve"),
    "IVON, mean": ("IVON", "point", "curve"),
    "IVON, 8 samples": ("IVON", "samples", "averages"),
    "Muon": ("Muon", "point", "curve"),
    "eigenbasis, mean": ("IVON, eigenbasis", "point", "curve"),
    "eigenbasis, 8 samples": ("IVON, eigenbasis", "samples", "averages"),
}
SAMPLED: dict[str, Any] = {"ls": "", "marker": "D", "ms": 6, "mfc": "none"}
STYLES: dict[str, dict[str, Any]] = {
    "AdamW": {"color": COLORS["AdamW"]},
    "signs": {"color": "0.5"},
    "IVON, mean": {"color": COLORS["IVON at the mean"]},
    "IVON, 8 samples": {"color": COLORS["IVON at the mean"], **SAMPLED},
    "Muon": {"color": COLORS["SGD"]},
    "eigenbasis, mean": {"color": COLORS["IVON"]},
    "eigenbasis, 8 samples": {"color": COLORS["IVON"], **SAMPLED},
}
NOTES = (
    "{steps:,} steps of 12 windows of 64 characters; mean ± standard error over {count}, which set "
    "the initial weights, the batches and IVON's noise. `Validation` is on the last tenth. "
    "{how}\n\n"
    "Milliseconds are medians of interleaved blocks in one process, without evaluation. Runs at "
    "equal time have as many steps, with a schedule of that length, as take AdamW's time; settings "
    "are those chosen for all steps. Of the settings, `longest` is "
    "α(h₀+δ)ξ, the longest step of a weight, and `turnover` (1−β₂)T; `clipped` is the share of "
    "weights whose step is at the clip radius, after a quarter of the run and at its end, h/h₀ are "
    "the quartiles at the end, and `inflated` is the share of weights whose h the noise of its own "
    "estimate would hold up. `signs`: steps of one length along the signs of the momentum."
)
SEARCHED = (
    "Settings are chosen by the loss on 5 % of the text with the first seed. IVON's nine were "
    "placed by 17 others, tried by hand for 500 steps on the same 5 %, those in the eigenbasis by "
    "13 and by one another, AdamW's by nine earlier ones; Muon has five, so that it may do better "
    "than this."
)
TAKEN_OVER = "Settings are those that were chosen on another text; none was tried on this one."

Results = dict[str, list[dict[str, Any]]]  # by method, one per seed
Rows = list[Sequence[str]]


def tuning_loss(result: Result) -> float:
    """What chooses a setting: of samples, where there are samples."""
    return chosen_by(result["tuning"])


def steps_in_time(times: Result, method: str, steps: int) -> int:
    """How many steps of a method take as long as so many of AdamW."""
    return round(steps / times["ratio"][method][0])


def write_report(journal: Journal) -> None:
    """Writes the tables (.md) and the figure (.png)."""
    timed = journal.select(part="timing")
    if not timed:
        raise SystemExit("there is nothing to compare yet: let the command finish first")
    identity, times = timed[-1]
    named = {name: identity[name] for name in ("text", "digest", "steps")}
    chosen = identity["chosen"]

    def of_chosen(**which: Any) -> Results:
        return {
            method: [x for _, x in journal.select(**named, **which, method=method, values=values)]
            for method, values in chosen.items()
        }

    runs, results = journal.select(part="run", **named), of_chosen(part="run")
    in_time = {"AdamW": results["AdamW"]}
    for method, values in chosen.items():
        shorter = steps_in_time(times, method, named["steps"])
        which = {"part": "equal time", "method": method, "values": values, "shorter": shorter}
        in_time.setdefault(method, [x for _, x in journal.select(**named, **which)])
    tables = {
        "Validation, at equal steps": validation(results, times),
        "Validation, at equal time": validation(in_time),
        "Validation loss on the way": on_the_way(results),
    } | {f"Settings of {name}": settings_of(name, runs, chosen) for name in chosen}
    count, figure = len(results["AdamW"]), journal.path.with_suffix(".png")
    with_first_seed = [run["method"] for run, _ in runs if run["seed"] == 0]
    searched = len(with_first_seed) > len(set(with_first_seed))
    how = SEARCHED if searched else TAKEN_OVER
    seeds = f"{count} seed{'s' * (count > 1)}"
    notes = NOTES.format(steps=named["steps"], count=seeds, how=how)
    if published := PUBLISHED.get(named["digest"]):
        notes += (
            f"\n\nnanoGPT's published validation loss with this configuration is {published}, "
            "after training on the 5 % as well, in which the play of the last tenth begins."
        )
    notes += f"\n\n![Figure]({figure.name})"
    write_tables(journal, f"Language modelling: {named['text']}", tables, notes)
    save_figure(draw(results), figure)


def validation(results: Results, times: Result | None = None) -> Rows:
    """The metrics of every way to predict, and with `times` the time per step."""
    base = [x["validation"]["point"]["nll"] for x in results["AdamW"]]
    last = ["ms per step", "of AdamW's [quartiles]"] if times else ["steps"]
    rows: Rows = [["", "loss", "less AdamW's, same seed", "accuracy, %", "ECE, %", "Brier", *last]]
    for name, (method, way, _) in WAYS.items():
        runs = results.get(method, [])
        found = [x["validation"][way] for x in runs]
        if not found:
            continue

        def of(metric: str, decimals: int, scale: float, found: Any = found) -> str:
            return cell([scale * x[metric] for x in found], decimals)

        losses = [x["nll"] for x in found]
        less = "" if method == "AdamW" else cell(np.subtract(losses, base), 4)
        row = [name, of("nll", 4, 1), less, of("accuracy", 2, 100), of("ece", 2, 100)]
        row.append(of("brier", 4, 1))
        if times:
            median, low, high = times["ratio"][method]
            row.append(f"{1e3 * times['seconds'][method]:.1f}")
            row.append("1" if method == "AdamW" else f"{median:.2f} [{low:.2f}, {high:.2f}]")
        else:
            row.append(f"{runs[0]['curve'][-1][0]:,}")
        rows.append(row)
    return rows


def settings_of(method: str, runs: Runs, chosen: Mapping[str, Any]) -> Rows:
    """What a method has tried with the first seed, and what became of h."""
    tried = [(run, x) for run, x in runs if run["method"] == method and run["seed"] == 0]
    rows: Rows = []
    for run, result in tried:
        row = _setting(run, result)
        rows = rows or [[*row, ""]]
        rows.append([*row.values(), "chosen" if run["values"] == chosen[method] else ""])
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
    points = {
        k: np.array([x[c] for x in results.get(m, [])], float) for k, (m, _, c) in WAYS.items()
    }
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
