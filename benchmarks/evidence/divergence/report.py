"""Tables and figure of `divergence.py` from its JSON lines."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks._shared.journal import Journal, write_tables
from examples._shared.reporting import COLORS, save_figure


def report(journal: Journal) -> None:
    """Writes the counts, the warnings and the anatomy of one run."""
    names = list(dict.fromkeys(run["dataset"] for run, _ in journal.select()))
    tables = {}
    for name in names:
        runs = [(r, x) for r, x in journal.select(dataset=name) if "anatomy" not in r]
        tables[f"{name}: diverged runs and guards"] = guards(runs)
        tables[f"{name}: where they diverge without a guard"] = places(runs)
        tables[f"{name}: warnings"] = warnings(runs)
        traced = journal.select(dataset=name, anatomy=True)
        if traced:
            run, seen = traced[0]
            where = ", ".join(
                f"{k} {run[k]:g}"
                for k in ("learning_rate", "hess_init", "sharpness", "prior_precision", "seed")
            )
            tables[f"{name}: one run, step by step ({where})"] = anatomy(seen)
    notes = (
        "Half the mean squared error of standardised targets; a constant has 0.5. `gain` is "
        "(h₀+δ)/(h+δ), `sharpness` is ess/N. The warning is `update/risk` above one, "
        "looked at every 50 steps."
    )
    write_tables(journal, "Divergence, its warning and its guards", tables, notes)
    traced = journal.select(anatomy=True)
    if traced:
        save_figure(figure(*traced[0]), journal.path.with_suffix(".png"))


def guards(runs: list[tuple[dict, dict]]) -> Sequence[Sequence[str]]:
    """Counts by guard, and what the guard costs where nothing diverges without it."""
    rows = [
        ("guard", "runs", "diverged", "test loss, median", "where none diverged without a guard")
    ]
    identity = ("learning_rate", "hess_init", "sharpness", "prior_precision")
    spoiled = {
        tuple(r[k] for k in identity)
        for r, x in runs
        if r["guard"] == "none" and x["diverged"] is not None
    }
    for guard in dict.fromkeys(r["guard"] for r, _ in runs):
        mine = [(r, x) for r, x in runs if r["guard"] == guard]
        calm = [x for r, x in mine if tuple(r[k] for k in identity) not in spoiled]
        bad = sum(x["diverged"] is not None for _, x in mine)
        rows.append((guard, str(len(mine)), str(bad), _median([x for _, x in mine]), _median(calm)))
    return rows


def places(runs: list[tuple[dict, dict]]) -> Sequence[Sequence[str]]:
    """Diverged runs without a guard, by setting."""
    free = [(r, x) for r, x in runs if r["guard"] == "none"]
    columns = list(dict.fromkeys((r["hess_init"], r["learning_rate"]) for r, _ in free))
    rows = [("sharpness, λδ", *(f"h₀ {h:g}, rate {a:g}" for h, a in sorted(columns)))]
    for pair in dict.fromkeys((r["sharpness"], r["prior_precision"]) for r, _ in free):
        cells = []
        for column in sorted(columns):
            here = [
                x
                for r, x in free
                if (r["sharpness"], r["prior_precision"]) == pair
                and (r["hess_init"], r["learning_rate"]) == column
            ]
            cells.append(f"{sum(x['diverged'] is not None for x in here)} of {len(here)}")
        rows.append((f"{pair[0]:g}, {pair[1]:g}", *cells))
    return rows


def warnings(runs: list[tuple[dict, dict]]) -> Sequence[Sequence[str]]:
    """How early the warning came, and how often for nothing."""
    rows = [
        ("guard", "diverged", "warned before", "steps ahead, median", "others", "of these warned")
    ]
    for guard in dict.fromkeys(r["guard"] for r, _ in runs):
        mine = [x for r, x in runs if r["guard"] == guard]
        bad = [x for x in mine if x["diverged"] is not None]
        ahead = [
            x["diverged"] - x["warned"]
            for x in bad
            if x["warned"] is not None and x["warned"] < x["diverged"]
        ]
        good = [x for x in mine if x["diverged"] is None]
        false = sum(x["warned"] is not None for x in good)
        lead = f"{np.median(ahead):.0f}" if ahead else ""
        rows.append((guard, str(len(bad)), str(len(ahead)), lead, str(len(good)), str(false)))
    return rows


def anatomy(seen: dict) -> Sequence[Sequence[str]]:
    """The steps around the divergence; in each, the weight that moved furthest."""
    rows = [
        ("step", "loss at the mean", "|gradient|", "unit", "active in", "move", "σ", "gain"),
    ]
    names = ("step", "loss", "gradient", "unit", "active", "move", "sigma", "gain")
    for step, loss, norm, unit, active, move, sigma, gain in zip(
        *(seen[name] for name in names), strict=True
    ):
        rows.append(
            (
                str(step),
                f"{loss:.2f}",
                f"{norm:.1f}",
                f"{unit:.0f}",
                f"{100 * active:.0f} %",
                f"{move:+.2f}",
                f"{sigma:.2f}",
                f"{gain:.0f}",
            )
        )
    return rows


def figure(run: dict, seen: dict) -> Figure:
    """The loss of the run, and the steps of the weights that set it off."""
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    left.semilogy(seen["course"]["step"], seen["course"]["loss"], color=COLORS["IVON"])
    left.axhline(0.5, color=COLORS["reference"], linestyle=":", label="a constant")
    left.set(xlabel="step", ylabel="training loss at the mean", title="One run that diverges")
    left.legend(frameon=False)
    ratio = np.abs(seen["move"]) / np.array(seen["sigma"])
    right.plot(seen["step"], ratio, "o-", color=COLORS["IVON"], label="largest move / its σ")
    right.plot(seen["step"], seen["loss"], "s-", color=COLORS["unfamiliar"], label="loss")
    right.set_yscale("log")
    right.set(xlabel="step", title="The steps before it")
    right.legend(frameon=False)
    return fig


def _median(results: list[dict]) -> str:
    values = [np.inf if x["test"] is None else x["test"] for x in results]
    return f"{np.median(values):.3f}" if values else ""
