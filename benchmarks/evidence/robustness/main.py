"""How wide the good region of the hyperparameters is, and how many runs diverge.

    python benchmarks/evidence/robustness/main.py             # digits; about 15 minutes, two cores
    python benchmarks/evidence/robustness/main.py --report    # tables and heat maps

IVON over learning rate × hess_init × temperature (N/ess), with and without the guard
`precision_floor`, and AdamW over learning rate × weight decay; three seeds of 100 epochs each. Then
`recipes.hess_init_for`, whose quarter was read off that grid, against the same values of hess_init
on networks of other widths. A run has diverged when, at any epoch after the warmup, its training
loss at the mean is worse than that of guessing evenly, or not a number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks._shared.journal import Evidence, Journal, parse, read_journal, write_tables
from benchmarks._shared.methods import WARMUP_SHARE
from benchmarks._shared.networks import Perceptron
from benchmarks._shared.tuning import settings
from benchmarks.evidence.robustness.training import Run, train_lanes
from examples._shared.datasets import load_small_digits
from examples._shared.reporting import cell, save_figure
from ivon_jax import recipes

NUM_TRAIN = 1000
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
HESS_INITS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TEMPERATURES = (1.0, 0.1, 0.01)
PRIOR_PRECISION = 1.0  # λδ, the same at every temperature
FLOORS = (1e-6, 0.1)  # the default, and the guard
WIDTH = 64
RULE_WIDTHS, RULE_RATE = (16, 256), 1.0
ADAMW_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
ADAMW_DECAYS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
NEAR = 0.02  # nats: a setting this close to the best one of its method is a good one
SHOWN = 0.5  # NLL at which the colours of the heat maps end

Runs = list[tuple[dict, dict]]


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("robustness.jsonl")
    epochs: int = 100
    seeds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 2 or self.seeds < 1:
            raise SystemExit("--epochs must be at least 2 and --seeds at least 1")


def main(argv: Sequence[str] | None = None) -> None:
    """Computes what is missing, and reports."""
    options = parse(Options, __doc__, argv)
    if not options.report:
        compute(options)
    report(read_journal(options.results))


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """All groups of settings; what is in a group is trained in one computation."""
    groups = [*ivon_groups(), *adamw_groups(), *rule_groups()]
    journal = Journal(options.results, total=options.seeds * sum(map(len, groups)))
    arrays = [jnp.asarray(x) for x in load_small_digits()[:4]]
    data, test = tuple(arrays[:2]), tuple(arrays[2:])
    for group in groups:
        runs = [
            {**values, "seed": seed, "epochs": options.epochs}
            for values in group
            for seed in range(options.seeds)
        ]
        journal.compute_all(runs, lambda missing: measure(missing, data, test))


def ivon_groups() -> list[list[dict[str, Any]]]:
    """Settings of one floor, temperature and hess_init in a group."""
    outer = {"precision_floor": FLOORS, "temperature": TEMPERATURES, "hess_init": HESS_INITS}
    return [
        [{"method": "ivon", "width": WIDTH, **values, "learning_rate": r} for r in LEARNING_RATES]
        for values in settings(outer)
    ]


def adamw_groups() -> list[list[dict[str, Any]]]:
    """Settings of one weight decay in a group."""
    return [
        [
            {"method": "adamw", "width": WIDTH, "learning_rate": rate, "weight_decay": decay}
            for rate in ADAMW_RATES
        ]
        for decay in ADAMW_DECAYS
    ]


def rule_groups() -> list[list[dict[str, Any]]]:
    """Several hess_init for one width and temperature, the last by the rule (of one seed)."""
    groups = []
    for width in RULE_WIDTHS:
        params = Perceptron(width).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        for temperature in TEMPERATURES:
            by_rule = recipes.hess_init_for(params, NUM_TRAIN / temperature)
            common = {
                "width": width,
                "learning_rate": RULE_RATE,
                "temperature": temperature,
                "precision_floor": FLOORS[-1],
            }
            tried = [{"method": "ivon", "hess_init": value, **common} for value in HESS_INITS]
            groups.append([*tried, {"method": "rule", "hess_init": by_rule, **common}])
    return groups


def measure(runs: list[Any], data: Any, test: Any) -> list[dict[str, Any]]:
    """Trains runs of one width in one computation."""
    first = runs[0]
    names = [n for n in first if n not in ("method", "seed", "epochs", "width")]
    values = {name: jnp.array([run[name] for run in runs]) for name in names}
    optimizer = "adamw" if first["method"] == "adamw" else "ivon"
    if optimizer == "ivon":
        values["weight_decay"] = PRIOR_PRECISION * values["temperature"] / len(data[1])
    run = Run(optimizer, first["epochs"], first["width"])
    seeds = jnp.array([run["seed"] for run in runs])
    lanes = jax.tree.map(np.asarray, train_lanes(run, values, seeds, data, test))
    return [summary({name: x[index] for name, x in lanes.items()}) for index in range(len(runs))]


def summary(lane: dict[str, Any]) -> dict[str, Any]:
    """Final results; the epoch of divergence and, for IVON, of the first warning, or None."""
    loss = lane["loss"]
    start = math.ceil(WARMUP_SHARE * len(loss))
    result = {
        name: float(lane[name]) if np.isfinite(lane[name]) else None
        for name in ("nll", "accuracy", "nll_mean")
        if name in lane
    }
    result["diverged"] = _first(~(loss[start:] < math.log(10.0)), start)
    if "risk" in lane:
        result["noisy_start"] = bool(lane["start"] < 0.5)  # as `learning_status` says it
        result["warned"] = _first(~(lane["risk"] <= 1.0), 0)
        result["largest_risk"] = float(np.nan_to_num(np.nanmax(lane["risk"]), posinf=1e30))
        result["largest_gain"] = float(np.nan_to_num(np.nanmax(lane["gain"]), posinf=1e30))
    return result


def _first(flags: np.ndarray, offset: int) -> int | None:
    """Index of the first true element."""
    return int(np.argmax(flags)) + offset if flags.any() else None


# --- Report ---------------------------------------------------------------------------------------


def report(journal: Journal) -> None:
    """Writes all tables and the figure."""
    width = min(run["width"] for run, _ in journal.select(method="adamw"))
    grids = {
        f"IVON, precision_floor {floor:g}, temperature {temperature:g}": journal.select(
            method="ivon", width=width, precision_floor=floor, temperature=temperature
        )
        for floor in (1e-6, 0.1)
        for temperature in (1.0, 0.1, 0.01)
    }
    adamw = journal.select(method="adamw", width=width)
    tables: dict[str, Sequence[Sequence[str]]] = {
        "How wide the good region is": widths({**grids, "AdamW": adamw}),
        "Divergence": divergence(journal, width),
        "hess_init by the rule, on other networks": rule(journal),
    }
    for name, runs in grids.items():
        tables[name] = heat_table(runs, "hess_init")
    tables["AdamW"] = heat_table(adamw, "weight_decay")
    notes = (
        "Median test NLL over seeds; IVON averaged over 32 samples. `near the best`: within "
        f"{NEAR:g} nats of the lowest median of the method. `x`: a run of these settings diverged."
    )
    write_tables(journal, "Robustness of the hyperparameters", tables, notes)
    save_figure(
        figure({name: x for name, x in grids.items() if "floor 0.1" in name}, adamw),
        journal.path.with_suffix(".png"),
    )


def score(runs: Runs) -> float:
    """Median NLL over seeds, infinite where it is not a number."""
    values = [np.inf if x["nll"] is None else x["nll"] for _, x in runs]
    return float(np.median(values))


def medians(runs: Runs, name: str) -> tuple[list[float], list[float], np.ndarray, np.ndarray]:
    """Rates, values of another hyperparameter, and by both the NLL and the divergences."""
    rates = sorted({run["learning_rate"] for run, _ in runs})
    others = sorted({run[name] for run, _ in runs})
    nll, diverged = np.full((len(others), len(rates)), np.inf), np.zeros((len(others), len(rates)))
    for row, other in enumerate(others):
        for column, rate in enumerate(rates):
            same = [(r, x) for r, x in runs if r["learning_rate"] == rate and r[name] == other]
            nll[row, column] = score(same)
            diverged[row, column] = sum(x["diverged"] is not None for _, x in same)
    return rates, others, nll, diverged


def heat_table(runs: Runs, name: str) -> Sequence[Sequence[str]]:
    """Median NLL by learning rate and one other hyperparameter."""
    rates, others, nll, diverged = medians(runs, name)
    rows = [(f"{name} \\ learning_rate", *(f"{rate:g}" for rate in rates))]
    for other, values, bad in zip(others, nll, diverged, strict=True):
        cells = (f"{v:.3f}" + (" x" if n else "  ") for v, n in zip(values, bad, strict=True))
        rows.append((f"{other:g}", *cells))
    return rows


def widths(grids: dict[str, Runs]) -> Sequence[Sequence[str]]:
    """The best value, the share of good settings, and how many decades they span at the best."""
    rows = [
        ("", "settings", "best NLL", "near the best", "NLL below 0.1", "rates", "the other"),
    ]
    ivon_best = min(
        medians(runs, "hess_init")[2].min() for name, runs in grids.items() if name != "AdamW"
    )
    for name, runs in grids.items():
        other = "weight_decay" if name == "AdamW" else "hess_init"
        rates, others, nll, _ = medians(runs, other)
        best = nll.min() if name == "AdamW" else ivon_best
        good = nll <= best + NEAR
        row, column = np.unravel_index(np.argmin(nll), nll.shape)
        rows.append(
            (
                name,
                str(nll.size),
                f"{nll.min():.3f}",
                f"{100 * good.mean():.0f} %",
                f"{100 * (nll < 0.1).mean():.0f} %",
                span(rates, good[row]),
                span(others, good[:, column]),
            )
        )
    return rows


def span(values: list[float], good: np.ndarray) -> str:
    """The range of good values in one row or column."""
    chosen = [v for v, g in zip(values, good, strict=True) if g]
    return f"{chosen[0]:g} to {chosen[-1]:g}" if chosen else "none"


def divergence(journal: Journal, width: int) -> Sequence[Sequence[str]]:
    """Diverged runs, and how many of them were warned of in an earlier epoch."""
    rows = [("", "runs", "diverged", "warned of before", "warned, but did not diverge")]
    for floor in (1e-6, 0.1):
        every = journal.select(method="ivon", width=width, precision_floor=floor)
        largest = max(run["learning_rate"] for run, _ in every)
        parts: dict[str, Any] = {
            f"all, precision_floor {floor:g}": every,
            f"  rates below {largest:g}": [
                (r, x) for r, x in every if r["learning_rate"] < largest
            ],
            "  of these, started with |m|/σ above 0.5": [
                (r, x) for r, x in every if r["learning_rate"] < largest and not x["noisy_start"]
            ],
        }
        for name, runs in parts.items():
            bad = [x for _, x in runs if x["diverged"] is not None]
            before = [
                x
                for x in bad
                if x["noisy_start"] or (x["warned"] is not None and x["warned"] < x["diverged"])
            ]
            false = [
                x
                for _, x in runs
                if x["diverged"] is None and (x["noisy_start"] or x["warned"] is not None)
            ]
            rows.append((name, str(len(runs)), str(len(bad)), str(len(before)), str(len(false))))
    adamw = journal.select(method="adamw", width=width)
    bad = sum(x["diverged"] is not None for _, x in adamw)
    rows.append(("AdamW", str(len(adamw)), str(bad), "", ""))
    return rows


def rule(journal: Journal) -> Sequence[Sequence[str]]:
    """NLL at `hess_init_for` beside the best of the grid, by width and temperature."""
    rows = [("width, temperature", "hess_init by rule", "NLL", "best of the grid", "its NLL")]
    chosen = journal.select(method="rule")
    for width, temperature in dict.fromkeys((r["width"], r["temperature"]) for r, _ in chosen):
        mine = [(r, x) for r, x in chosen if (r["width"], r["temperature"]) == (width, temperature)]
        grid = journal.select(
            method="ivon", width=width, temperature=temperature, precision_floor=0.1
        )
        grid = [(r, x) for r, x in grid if r["learning_rate"] == mine[0][0]["learning_rate"]]
        by_value = {
            value: [x for x in grid if x[0]["hess_init"] == value]
            for value in sorted({r["hess_init"] for r, _ in grid})
        }
        best = min(by_value, key=lambda value: score(by_value[value]))
        rows.append(
            (
                f"{width}, {temperature:g}",
                f"{mine[0][0]['hess_init']:g}",
                _cell(mine),
                f"{best:g}",
                _cell(by_value[best]),
            )
        )
    return rows


def _cell(runs: Runs) -> str:
    return cell([np.nan if x["nll"] is None else x["nll"] for _, x in runs], 3)


def figure(grids: dict[str, Runs], adamw: Runs) -> Figure:
    """A heat map for each grid."""
    fig = Figure(figsize=(13, 3.9), layout="constrained")
    axes = fig.subplots(1, len(grids) + 1)
    image = None
    for ax, (name, runs) in zip(axes, [*grids.items(), ("AdamW", adamw)], strict=True):
        other = "weight_decay" if name == "AdamW" else "hess_init"
        rates, others, nll, diverged = medians(runs, other)
        shown = np.clip(nll, None, SHOWN)
        image = ax.imshow(shown, origin="lower", aspect="auto", cmap="viridis", vmax=SHOWN)
        image.set_clim(0.05, SHOWN)
        for (row, column), value in np.ndenumerate(nll):
            text = f"{value:.2f}" if value < 10 else "∞"
            mark = "×" if diverged[row, column] else ""
            color = "white" if shown[row, column] < 0.3 else "black"
            ax.text(column, row, text + mark, ha="center", va="center", fontsize=7, color=color)
        ax.set_xticks(range(len(rates)), [f"{v:g}" for v in rates])
        ax.set_yticks(range(len(others)), [f"{v:g}" for v in others])
        ax.tick_params(axis="x", labelsize=8, rotation=45)
        ax.set_xlabel("learning rate")
        ax.set_ylabel("weight decay" if name == "AdamW" else "hess_init")
        ax.set_title(name.replace("precision_floor 0.1, ", ""), fontsize=10)
    assert image is not None
    fig.colorbar(image, ax=axes, label="test NLL (median; ×: a run diverged)", extend="max")
    return fig


if __name__ == "__main__":
    main()
