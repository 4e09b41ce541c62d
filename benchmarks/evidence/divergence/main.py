"""How a run of IVON blows up, what warns of it, and what prevents it.

    python benchmarks/evidence/divergence/main.py                         # scikit-learn's diabetes
    python benchmarks/evidence/divergence/main.py --data DIR/concrete     # as for uci
    python benchmarks/evidence/divergence/main.py --report                # tables and figure

A network of 50 ReLUs and half the mean squared error, 10,000 steps of 32 rows, over rate ×
hess_init × ess/N × prior precision λδ, eight seeds each, without a guard and with several. A run
has diverged when, after the warmup, the training loss at the mean is worse than that of a
constant (looked at every 50 steps), or not a number. The first run that diverged is then
repeated and written down step by step. About 10 minutes on two cores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes

from benchmarks._shared.journal import Evidence, Journal, parse, read_journal, write_tables
from benchmarks._shared.tuning import settings
from benchmarks.evidence.divergence.training import CHECK, Run, trace, train_lanes
from benchmarks.evidence.uci.data import load_splits, standardise
from examples._shared.reporting import COLORS, save_figure

GRID = {
    "learning_rate": (0.1, 0.2, 0.3),
    "hess_init": (0.1, 0.5),
    "sharpness": (1.0, 4.0),  # ess/N
    "prior_precision": (2.0, 10.0),  # λδ
}
WORSE = 0.5  # half the variance of standardised targets
GUARDS: dict[str, dict[str, float]] = {
    "none": {},
    "precision_floor 0.03": {"precision_floor": 0.03},
    "precision_floor 0.1": {"precision_floor": 0.1},
    "precision_floor 0.25": {"precision_floor": 0.25},
    "clip_radius 1": {"clip_radius": 1.0},
    "clip_radius 0.3": {"clip_radius": 0.3},
}
SHOWN = 14  # steps before the divergence that are written down
EVERY = 20  # steps between two points of the course

Runs = list[tuple[dict, dict]]


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("divergence.jsonl")
    data: Path | None = None
    """Folder of a set as for uci; scikit-learn's diabetes without it."""
    steps: int = 10_000
    seeds: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1 or self.steps < 2 * CHECK or self.steps % CHECK:
            raise SystemExit(
                f"--seeds must be at least 1 and --steps a multiple of {CHECK}, above it"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Computes what is missing, and reports."""
    options = parse(Options, __doc__, argv)
    if not options.report:
        compute(options)
    report(read_journal(options.results))


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """All settings with all guards, and one run step by step."""
    data = load(options.data)
    common = {
        "dataset": options.data.name if options.data else "diabetes",
        "steps": options.steps,
    }
    tried = settings(GRID)
    journal = Journal(options.results, total=1 + len(GUARDS) * len(tried) * options.seeds)
    for guard in GUARDS:
        runs = [
            {**common, "guard": guard, **values, "seed": seed}
            for values in tried
            for seed in range(options.seeds)
        ]
        journal.compute_all(runs, lambda missing: measure(missing, data))
    for run, result in journal.select(**common, guard="none"):
        if result.get("diverged") is not None:  # the first of them: no choice is made
            work = partial(anatomy, run, result["diverged"], data)
            journal.compute({**run, "anatomy": True}, work)
            break


def load(folder: Path | None) -> Any:
    """Training and test rows, standardised by the former."""
    if folder is not None:
        split = load_splits(folder)[0]
    else:
        x, y = load_diabetes(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(y))
        train, test = order[44:], order[:44]
        split = (x[train], y[train], x[test], y[test])
    part = standardise([split])
    return jax.tree.map(lambda a: jnp.asarray(a[0]), (part.train, part.test))


def arguments(runs: list[Any]) -> dict[str, jax.Array]:
    """Settings of all lanes, by name."""
    return {name: jnp.array([float(run[name]) for run in runs]) for name in GRID}


def measure(runs: list[Any], data: Any) -> list[dict[str, Any]]:
    """Trains runs with one guard at once."""
    run = Run(runs[0]["steps"], tuple(GUARDS[runs[0]["guard"]].items()))
    seeds = jnp.array([r["seed"] for r in runs])
    lanes = jax.tree.map(np.asarray, train_lanes(run, arguments(runs), seeds, *data))
    start = math.ceil(run.warmup / CHECK)
    results = []
    for index in range(len(runs)):
        lane = {name: x[index] for name, x in lanes.items()}
        bad = ~(lane["loss"] < WORSE)
        warned = ~(lane["risk"] <= 1)
        test = float(lane["test"])
        results.append(
            {
                "test": float(f"{test:.5g}") if np.isfinite(test) else None,
                "diverged": _first(bad[start:], start),
                "warned": _first(warned, 0),
                "gain": float(f"{np.nanmax(lane['gain']):.4g}"),
            }
        )
    return results


def anatomy(run: Any, diverged: int, data: Any) -> dict[str, Any]:
    """The steps before the first mean that is worse than a constant, and the course of the run."""
    values = {name: x[0] for name, x in arguments([run]).items()}
    steps = Run(run["steps"])
    seen = jax.tree.map(np.asarray, trace(steps, values, jnp.array(run["seed"]), data[0]))
    bad = ~(seen["loss"] < WORSE)
    bad[: steps.warmup] = False
    last = int(np.argmax(bad))
    window = slice(max(0, last - SHOWN + 1), last + 3)
    course = seen["loss"][: diverged + 20 * CHECK : EVERY]
    return {
        "step": list(range(run["steps"]))[window],
        **{name: [float(f"{v:.4g}") for v in x[window]] for name, x in seen.items()},
        "course": {
            "step": list(range(0, EVERY * len(course), EVERY)),
            "loss": [float(f"{x:.4g}") for x in course],
        },
    }


def _first(flags: np.ndarray, offset: int) -> int | None:
    """The step of the first true element."""
    return CHECK * (int(np.argmax(flags)) + offset + 1) if flags.any() else None


# --- Report ---------------------------------------------------------------------------------------


def report(journal: Journal) -> None:
    """Writes the counts, the warnings and the anatomy of one run."""
    tables = {}
    for name in dict.fromkeys(run["dataset"] for run, _ in journal.select()):
        runs = [(r, x) for r, x in journal.select(dataset=name) if "anatomy" not in r]
        tables[f"{name}: diverged runs and guards"] = guards(runs)
        tables[f"{name}: where they diverge without a guard"] = places(runs)
        tables[f"{name}: warnings"] = warnings(runs)
        for run, seen in journal.select(dataset=name, anatomy=True)[:1]:
            where = ", ".join(f"{k} {run[k]:g}" for k in (*GRID, "seed"))
            tables[f"{name}: one run, step by step ({where})"] = steps_of(seen)
    notes = (
        "Half the mean squared error of standardised targets; a constant has 0.5. `gain` is "
        "(h₀+δ)/(h+δ), `sharpness` is ess/N. The warning is `update/risk` above one, "
        "looked at every 50 steps."
    )
    write_tables(journal, "Divergence, its warning and its guards", tables, notes)
    for _, seen in journal.select(anatomy=True)[:1]:
        save_figure(figure(seen), journal.path.with_suffix(".png"))


def by_guard(runs: Runs) -> dict[str, Runs]:
    """The runs of each guard, in order."""
    names = dict.fromkeys(r["guard"] for r, _ in runs)
    return {name: [(r, x) for r, x in runs if r["guard"] == name] for name in names}


def diverged(runs: Runs) -> list[dict]:
    """Results of those that did."""
    return [x for _, x in runs if x["diverged"] is not None]


def guards(runs: Runs) -> Sequence[Sequence[str]]:
    """Counts by guard, and what the guard costs where nothing diverges without it."""

    def identity(run: dict) -> tuple:
        return tuple(run[name] for name in GRID)

    rows = [
        ("guard", "runs", "diverged", "test loss, median", "where none diverged without a guard")
    ]
    groups = by_guard(runs)
    spoiled = {identity(r) for r, x in groups["none"] if x["diverged"] is not None}
    for guard, mine in groups.items():
        calm = [(r, x) for r, x in mine if identity(r) not in spoiled]
        counts = str(len(mine)), str(len(diverged(mine)))
        rows.append((guard, *counts, _median(mine), _median(calm)))
    return rows


def places(runs: Runs) -> Sequence[Sequence[str]]:
    """Diverged runs without a guard, by setting."""
    free = by_guard(runs)["none"]
    columns = sorted({(r["hess_init"], r["learning_rate"]) for r, _ in free})
    rows = [("sharpness, λδ", *(f"h₀ {h:g}, rate {a:g}" for h, a in columns))]
    for sharpness, prior in dict.fromkeys((r["sharpness"], r["prior_precision"]) for r, _ in free):
        cells = []
        for hess_init, rate in columns:
            place = {
                "sharpness": sharpness,
                "prior_precision": prior,
                "hess_init": hess_init,
                "learning_rate": rate,
            }
            here = [(r, x) for r, x in free if place.items() <= r.items()]
            cells.append(f"{len(diverged(here))} of {len(here)}")
        rows.append((f"{sharpness:g}, {prior:g}", *cells))
    return rows


def warnings(runs: Runs) -> Sequence[Sequence[str]]:
    """How early the warning came, and how often for nothing."""
    rows = [
        ("guard", "diverged", "warned before", "steps ahead, median", "others", "of these warned")
    ]
    for guard, mine in by_guard(runs).items():
        bad = diverged(mine)
        ahead = [
            x["diverged"] - x["warned"]
            for x in bad
            if x["warned"] is not None and x["warned"] < x["diverged"]
        ]
        good = [x for _, x in mine if x["diverged"] is None]
        false = sum(x["warned"] is not None for x in good)
        lead = f"{np.median(ahead):.0f}" if ahead else ""
        rows.append((guard, str(len(bad)), str(len(ahead)), lead, str(len(good)), str(false)))
    return rows


def steps_of(seen: dict) -> Sequence[Sequence[str]]:
    """The steps around the divergence; in each, the weight that moved furthest."""
    columns = {
        "step": ("step", "d", 1),
        "loss at the mean": ("loss", ".2f", 1),
        "|gradient|": ("gradient", ".1f", 1),
        "unit": ("unit", ".0f", 1),
        "active in": ("active", ".0f", 100),
        "move": ("move", "+.2f", 1),
        "σ": ("sigma", ".2f", 1),
        "gain": ("gain", ".0f", 1),
    }
    rows = [tuple(columns)]
    for index in range(len(seen["step"])):
        cells = [format(k * seen[name][index], form) for name, form, k in columns.values()]
        cells[4] += " %"
        rows.append(tuple(cells))
    return rows


def figure(seen: dict) -> Figure:
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


def _median(runs: Runs) -> str:
    values = [np.inf if x["test"] is None else x["test"] for _, x in runs]
    return f"{np.median(values):.3f}" if values else ""


if __name__ == "__main__":
    main()
