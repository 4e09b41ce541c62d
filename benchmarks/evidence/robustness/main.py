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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks._shared import methods
from benchmarks._shared.journal import Evidence, Journal, Runs, command, grouped, write_tables
from benchmarks._shared.methods import Array, Values
from benchmarks._shared.networks import Perceptron
from benchmarks._shared.tuning import settings
from examples._shared.datasets import load_small_digits
from examples._shared.reporting import cell, save_figure
from examples._shared.training import classification_loss
from ivon_jax import diagnostics, metrics, posterior, predict_log_probs, recipes

EPOCHS = 100
BATCH = 50
SAMPLES = 32  # of the posterior
NUM_TRAIN = 1000
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
HESS_INITS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TEMPERATURES = (1.0, 0.1, 0.01)
IVON_FIXED = {"b2": 0.999, "prior_precision": 1.0}  # λδ, the same at every temperature
FLOORS = (1e-6, 0.1)  # the default, and the guard
WIDTH = 64
RULE_WIDTHS, RULE_RATE = (16, 256), 1.0
ADAMW_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
ADAMW_DECAYS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
NEAR = 0.02  # nats: a setting this close to the best one of its method is a good one
SHOWN = 0.5  # NLL at which the colours of the heat maps end


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("robustness.jsonl")
    seeds: int = 3


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """All groups of settings; what is in a group is trained in one computation."""
    groups = [*grid_groups(), *rule_groups()]
    journal = Journal(options.results, total=options.seeds * sum(map(len, groups)))
    x, y, x_test, y_test = (jnp.asarray(array) for array in load_small_digits()[:4])
    for group in groups:
        runs = [
            {**values, "seed": seed, "epochs": EPOCHS}
            for values in group
            for seed in range(options.seeds)
        ]
        journal.compute_all(runs, lambda missing: measure(missing, (x, y), (x_test, y_test)))


def grid_groups() -> list[list[dict[str, Any]]]:
    """The grids of IVON and of AdamW, all learning rates of the other values in a group."""
    ivon = {"precision_floor": FLOORS, "temperature": TEMPERATURES, "hess_init": HESS_INITS}
    adamw = {"weight_decay": ADAMW_DECAYS}
    return [
        [{"method": method, "width": WIDTH, **values, "learning_rate": rate} for rate in rates]
        for method, grid, rates in (("ivon", ivon, LEARNING_RATES), ("adamw", adamw, ADAMW_RATES))
        for values in settings(grid)
    ]


def rule_groups() -> list[list[dict[str, Any]]]:
    """Several hess_init for one width and temperature, the last by the rule (of one seed)."""
    groups = []
    for width in RULE_WIDTHS:
        params = Perceptron(width).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        for temperature in TEMPERATURES:
            common = {"width": width, "learning_rate": RULE_RATE, "temperature": temperature}
            common["precision_floor"] = FLOORS[-1]
            by_rule = recipes.hess_init_for(params, NUM_TRAIN / temperature)
            tried = [*(("ivon", value) for value in HESS_INITS), ("rule", by_rule)]
            groups.append([{"method": method, "hess_init": h, **common} for method, h in tried])
    return groups


def measure(runs: list[Any], data: Any, test: Any) -> list[dict[str, Any]]:
    """Trains runs of one width in one computation."""
    first = runs[0]
    names = [name for name in first if name not in ("method", "seed", "epochs", "width")]
    values = {name: jnp.array([run[name] for run in runs]) for name in names}
    method = "adamw" if first["method"] == "adamw" else "ivon"
    if method == "ivon":
        values |= {name: jnp.full(len(runs), value) for name, value in IVON_FIXED.items()}
    seeds = jnp.array([run["seed"] for run in runs])
    lanes = train_lanes(method, first["epochs"], first["width"], values, seeds, data, test)
    lanes = jax.tree.map(np.asarray, lanes)
    return [summary({name: x[index] for name, x in lanes.items()}) for index in range(len(runs))]


@partial(jax.jit, static_argnums=(0, 1, 2))
def train_lanes(
    method: str, epochs: int, width: int, values: Values, seeds: Array, data: Any, test: Any
) -> dict[str, Array]:
    """Test results, and what was seen on the way after each epoch.

    Each lane has a setting and a seed of its own, along axis 0.
    """
    model: Any = Perceptron(width)
    variational = method == "ivon"
    num_steps, num_train = epochs * (len(data[1]) // BATCH), len(data[1])
    loss = classification_loss(model.apply)

    def train(values: Values, seed: Array) -> dict[str, Array]:
        tx = methods.optimizer(method, values, num_steps, num_train)
        step = methods.step_of(method, loss, tx)
        settings = methods.ivon_settings(values, num_steps, num_train)

        def epoch(carry: Any, key: Array) -> tuple:
            params, state = methods.scan_epoch(step, BATCH, data, carry, key)
            seen = {"loss": loss(params, data)}
            if variational:
                seen["risk"] = diagnostics(state, settings)["update/risk"]
            return (params, state), seen

        init_key, epochs_key, predict_key = methods.seed_keys(seed)
        params = model.init(init_key, data[0][:1])
        carry = start = (params, tx.init(params))
        (params, state), seen = jax.lax.scan(epoch, carry, jax.random.split(epochs_key, epochs))
        if variational:
            seen["start"] = diagnostics(start[1], settings)["signal_to_noise/p50"]
            predict = predict_log_probs(model.apply, SAMPLES)
            log_probs = predict(predict_key, posterior(state), test[0])
        else:
            log_probs = jax.nn.log_softmax(model.apply(params, test[0]))
        return seen | {"nll": metrics.nll(log_probs, test[1])}

    return jax.vmap(train)(values, seeds)


def summary(lane: dict[str, Any]) -> dict[str, Any]:
    """Test NLL; the epoch of divergence and, for IVON, of the first warning, or None."""
    bad = ~(lane["loss"] < math.log(10.0))  # also where it is not a number
    bad[: math.ceil(methods.WARMUP_SHARE * len(bad))] = False
    nll = float(lane["nll"]) if np.isfinite(lane["nll"]) else None
    result = {"nll": nll, "diverged": first_epoch(bad)}
    if "risk" in lane:
        result["noisy_start"] = bool(lane["start"] < 0.5)  # as `learning_status` says it
        result["warned"] = first_epoch(~(lane["risk"] <= 1.0))
    return result


def first_epoch(epochs: np.ndarray) -> int | None:
    """The first that is true."""
    return int(np.argmax(epochs)) if epochs.any() else None


# --- Report ---------------------------------------------------------------------------------------


class HeatMap(NamedTuple):
    """Median NLL and the number of diverged runs, by another hyperparameter and the rate."""

    other: str
    rates: list[float]
    others: list[float]
    nll: np.ndarray
    diverged: np.ndarray


def heat_map(runs: Runs, other: str) -> HeatMap:
    """Over the seeds of each setting."""
    cells = grouped(runs, other, "learning_rate")
    others, rates = (sorted(set(values)) for values in zip(*cells, strict=True))
    nll = [[score(cells[value, rate]) for rate in rates] for value in others]
    bad = [[len(diverged(cells[value, rate])) for rate in rates] for value in others]
    return HeatMap(other, rates, others, np.array(nll), np.array(bad))


def score(runs: Runs) -> float:
    """Median NLL over seeds, infinite where it is not a number."""
    return float(np.median([np.inf if x["nll"] is None else x["nll"] for _, x in runs]))


def diverged(runs: Runs) -> list[dict]:
    """Results of those that did."""
    return [x for _, x in runs if x["diverged"] is not None]


def report(journal: Journal) -> None:
    """Writes all tables and the figure."""
    by_grid = grouped(journal.select(method="ivon", width=WIDTH), "precision_floor", "temperature")
    maps = {
        f"IVON, precision_floor {floor:g}, temperature {temperature:g}": heat_map(runs, "hess_init")
        for (floor, temperature), runs in by_grid.items()
    }
    maps["AdamW"] = heat_map(journal.select(method="adamw"), "weight_decay")
    tables = {
        "How wide the good region is": widths(maps),
        "Divergence": divergence(journal),
        "hess_init by the rule, on other networks": rule(journal),
        **{name: heat_table(heat) for name, heat in maps.items()},
    }
    notes = (
        "Median test NLL over seeds; IVON averaged over 32 samples. `near the best`: within "
        f"{NEAR:g} nats of the lowest median of the method. `x`: a run of these settings diverged."
    )
    write_tables(journal, "Robustness of the hyperparameters", tables, notes)
    shown = {name: heat for name, heat in maps.items() if "precision_floor 1e-06" not in name}
    save_figure(figure(shown), journal.path.with_suffix(".png"))


def heat_table(heat: HeatMap) -> Sequence[Sequence[str]]:
    """Median NLL by learning rate and one other hyperparameter."""
    rows = [(f"{heat.other} \\ learning_rate", *(f"{rate:g}" for rate in heat.rates))]
    for value, nll, bad in zip(heat.others, heat.nll, heat.diverged, strict=True):
        cells = (f"{v:.3f}" + (" x" if n else "  ") for v, n in zip(nll, bad, strict=True))
        rows.append((f"{value:g}", *cells))
    return rows


def widths(maps: dict[str, HeatMap]) -> Sequence[Sequence[str]]:
    """The best value, the share of good settings, and how many decades they span at the best."""
    rows: list[Sequence[str]] = [
        ("", "settings", "best NLL", "near the best", "NLL below 0.1", "rates", "the other")
    ]
    best_of_ivon = min(heat.nll.min() for name, heat in maps.items() if name != "AdamW")
    for name, heat in maps.items():
        nll, best = heat.nll, heat.nll.min()
        good = nll <= NEAR + (best if name == "AdamW" else best_of_ivon)
        row, column = np.unravel_index(np.argmin(nll), nll.shape)
        shares = (f"{100 * share.mean():.0f} %" for share in (good, nll < 0.1))
        spans = span(heat.rates, good[row]), span(heat.others, good[:, column])
        rows.append((name, f"{nll.size}", f"{best:.3f}", *shares, *spans))
    return rows


def span(values: list[float], good: np.ndarray) -> str:
    """The range of good values in one row or column."""
    chosen = [v for v, g in zip(values, good, strict=True) if g]
    return f"{chosen[0]:g} to {chosen[-1]:g}" if chosen else "none"


def divergence(journal: Journal) -> Sequence[Sequence[str]]:
    """Diverged runs, and how many of them were warned of in an earlier epoch."""
    rows = [("", "runs", "diverged", "warned of before", "warned, but did not diverge")]
    for floor in FLOORS:
        every = journal.select(method="ivon", width=WIDTH, precision_floor=floor)
        largest = max(run["learning_rate"] for run, _ in every)
        below = [(r, x) for r, x in every if r["learning_rate"] < largest]
        calm = [(r, x) for r, x in below if not x["noisy_start"]]
        rows += [
            (f"all, precision_floor {floor:g}", *counts(every)),
            (f"  rates below {largest:g}", *counts(below)),
            ("  of these, started with |m|/σ above 0.5", *counts(calm)),
        ]
    adamw = journal.select(method="adamw")
    return [*rows, ("AdamW", f"{len(adamw)}", f"{len(diverged(adamw))}", "", "")]


def counts(runs: Runs) -> list[str]:
    """Runs, diverged ones, those of them with a warning before, and the others with one."""
    bad = diverged(runs)
    good = [x for _, x in runs if x["diverged"] is None]
    before = [x for x in bad if warned_before(x, x["diverged"])]
    false = [x for x in good if warned_before(x, math.inf)]
    return [f"{len(found)}" for found in (runs, bad, before, false)]


def warned_before(result: dict, epoch: float) -> bool:
    """At the start, or by the risk of a step."""
    return result["noisy_start"] or (result["warned"] is not None and result["warned"] < epoch)


def rule(journal: Journal) -> Sequence[Sequence[str]]:
    """NLL at `hess_init_for` beside the best of the grid, by width and temperature."""
    rows = [("width, temperature", "hess_init by rule", "NLL", "best of the grid", "its NLL")]
    by_rule = grouped(journal.select(method="rule"), "width", "temperature", "hess_init")
    for (width, temperature, chosen), runs in by_rule.items():
        place = {"width": width, "temperature": temperature, "learning_rate": RULE_RATE}
        tried = journal.select(method="ivon", precision_floor=FLOORS[-1], **place)
        ((best,), best_runs) = min(grouped(tried, "hess_init").items(), key=lambda x: score(x[1]))
        cells = f"{chosen:g}", nll_cell(runs), f"{best:g}", nll_cell(best_runs)
        rows.append((f"{width}, {temperature:g}", *cells))
    return rows


def nll_cell(runs: Runs) -> str:
    """Mean and standard error."""
    return cell([np.nan if x["nll"] is None else x["nll"] for _, x in runs], 3)


def figure(maps: dict[str, HeatMap]) -> Figure:
    """All heat maps in a row."""
    fig = Figure(figsize=(13, 3.9), layout="constrained")
    axes = fig.subplots(1, len(maps))
    image: Any = None
    for ax, (name, heat) in zip(axes, maps.items(), strict=True):
        shown = np.clip(heat.nll, None, SHOWN)
        image = ax.imshow(shown, origin="lower", aspect="auto", cmap="viridis", vmax=SHOWN)
        image.set_clim(0.05, SHOWN)
        for (row, column), value in np.ndenumerate(heat.nll):
            text = f"{value:.2f}" if value < 10 else "∞"
            mark = "×" if heat.diverged[row, column] else ""
            color = "white" if shown[row, column] < 0.3 else "black"
            ax.text(column, row, text + mark, ha="center", va="center", fontsize=7, color=color)
        ax.set_xticks(range(len(heat.rates)), [f"{v:g}" for v in heat.rates])
        ax.set_yticks(range(len(heat.others)), [f"{v:g}" for v in heat.others])
        ax.tick_params(axis="x", labelsize=8, rotation=45)
        ax.set_xlabel("learning rate")
        ax.set_ylabel(heat.other.replace("weight_", "weight "))
        ax.set_title(name.replace("precision_floor 0.1, ", ""), fontsize=10)
    fig.colorbar(image, ax=axes, label="test NLL (median; ×: a run diverged)", extend="max")
    return fig


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
