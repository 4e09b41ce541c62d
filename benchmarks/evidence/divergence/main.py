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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes

from benchmarks._shared import methods
from benchmarks._shared.journal import (
    Evidence,
    Journal,
    Runs,
    command,
    grouped,
    table,
    write_tables,
)
from benchmarks._shared.methods import Array, Carry, Values
from benchmarks._shared.tuning import settings
from benchmarks.evidence.uci.data import load_splits, standardise
from benchmarks.evidence.uci.methods import BATCH, Data, apply, half_square, init
from examples._shared.reporting import COLORS, save_figure
from ivon_jax import diagnostics, ivon

GRID = {
    "learning_rate": (0.1, 0.2, 0.3),
    "hess_init": (0.1, 0.5),
    "sharpness": (1.0, 4.0),  # ess/N
    "prior_precision": (2.0, 10.0),  # λδ
}
STEPS = 10_000
B2 = 0.999
CHECK = 50  # steps
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


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("divergence.jsonl")
    data: Path | None = None
    """Folder of a set as for uci; scikit-learn's diabetes without it."""
    seeds: int = 8


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """All settings with all guards, and one run step by step."""
    data = load(options.data)
    common = {"dataset": options.data.name if options.data else "diabetes", "steps": STEPS}
    tried = [{**v, "seed": seed} for v in settings(GRID) for seed in range(options.seeds)]
    journal = Journal(options.results, total=1 + len(GUARDS) * len(tried))
    for guard in GUARDS:
        runs = [{**common, "guard": guard, **values} for values in tried]
        journal.compute_all(runs, lambda missing: measure(missing, data))
    free = journal.select(**common, guard="none", anatomy=None)
    for run, result in diverged(free)[:1]:  # the first of them: no choice is made
        work = partial(anatomy, run, result["diverged"], data[0])
        journal.compute({**run, "anatomy": True}, work)


def load(folder: Path | None) -> Any:
    """Training and test rows, standardised by the former."""
    if folder is not None:
        split = load_splits(folder)[0]
    else:
        x, y = load_diabetes(return_X_y=True)
        test, train = np.split(np.random.default_rng(0).permutation(len(y)), [44])
        split = (x[train], y[train], x[test], y[test])
    part = standardise([split])
    return jax.tree.map(lambda a: jnp.asarray(a[0]), (part.train, part.test))


def arguments(runs: list[Any]) -> dict[str, Any]:
    """Settings of all runs, by name."""
    lanes = [{name: run[name] for name in GRID} | GUARDS[run["guard"]] | {"b2": B2} for run in runs]
    return {name: jnp.array([lane[name] for lane in lanes]) for name in lanes[0]}


def measure(runs: list[Any], data: Any) -> list[dict[str, Any]]:
    """Trains runs with one guard at once."""
    steps = runs[0]["steps"]
    seeds = jnp.array([run["seed"] for run in runs])
    lanes = jax.tree.map(np.asarray, train_lanes(steps, arguments(runs), seeds, *data))
    bad = ~(lanes["loss"] < WORSE)  # also where it is not a number
    bad[:, : -(-methods.warmup_steps(steps) // CHECK)] = False
    warned = ~(lanes["risk"] <= 1)
    return [
        {
            "test": float(f"{test:.5g}") if np.isfinite(test) else None,
            "diverged": first_step(bad[lane]),
            "warned": first_step(warned[lane]),
        }
        for lane, test in enumerate(lanes["test"])
    ]


def first_step(checks: np.ndarray) -> int | None:
    """The step of the first check that is true."""
    return CHECK * (int(np.argmax(checks)) + 1) if checks.any() else None


def anatomy(run: Any, diverged: int, data: Any) -> dict[str, Any]:
    """The steps before the first mean that is worse than a constant, and the course of the run."""
    values = {name: x[0] for name, x in arguments([run]).items()}
    seen = jax.tree.map(np.asarray, trace(run["steps"], values, jnp.array(run["seed"]), data))
    bad = ~(seen["loss"] < WORSE)
    bad[: methods.warmup_steps(run["steps"])] = False
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


# --- Training, watched at every check or at every step --------------------------------------------


def loss_at(params: Any, data: Data) -> Array:
    """Half the mean squared error."""
    return half_square(apply(params, data[0]), data[1])


def begin(steps: int, settings: Any, seed: Array, data: Data) -> tuple[methods.Step, Carry, Array]:
    """The step, parameters and state, and the keys of all steps.

    The state keeps the norm of the last gradient.
    """
    tx = optax.chain(optax.snapshot("gradient", optax.tree.norm), ivon(**settings))
    init_key, steps_key = jax.random.split(jax.random.key(seed))
    params = init(init_key, data[0].shape[1])
    keys = jax.random.split(steps_key, steps)
    return methods.ivon_step(loss_at, tx), (params, tx.init(params)), keys


@partial(jax.jit, static_argnums=0)
def train_lanes(
    steps: int, values: Values, seeds: Array, data: Data, test: Data
) -> dict[str, Array]:
    """Loss and risk at every check, and the test loss of the mean at the end.

    Each run has settings and a seed of its own, along axis 0.
    """

    def watched(values: Values, seed: Array) -> dict[str, Array]:
        settings = methods.ivon_settings(values, steps, len(data[1]))
        step, carry, keys = begin(steps, settings, seed, data)

        def check(carry: Carry, keys: Array) -> tuple:
            carry, _ = methods.scan_random_batches(step, BATCH, data, carry, keys)
            risk = diagnostics(carry[1], settings)["update/risk"]
            return carry, {"risk": risk, "loss": loss_at(carry[0], data)}

        carry, seen = jax.lax.scan(check, carry, keys.reshape(-1, CHECK))
        return seen | {"test": loss_at(carry[0], test)}

    return jax.vmap(watched)(values, seeds)


@partial(jax.jit, static_argnums=0)
def trace(steps: int, values: Values, seed: Array, data: Data) -> dict[str, Array]:
    """One run, step by step: the weight that moves furthest, and what it belongs to.

    `move` and `sigma` are of that weight, `gain` is (h₀+δ)/(h+δ) there, `active` the share of the
    training rows in which the unit of that weight is active, before the step.
    """
    settings = methods.ivon_settings(values, steps, len(data[1]))
    step, carry, keys = begin(steps, settings, seed, data)
    delta, h0 = settings["weight_decay"], settings["hess_init"]

    def watched(carry: Carry, key: Array) -> tuple:
        before = carry[0]
        active = jnp.mean(data[0] @ before["w1"] + before["b1"] > 0, axis=0)
        carry, _ = methods.scan_random_batches(step, BATCH, data, carry, key[None])
        moves = by_unit(optax.tree.sub(carry[0], before))
        place = jnp.argmax(jnp.abs(moves))
        here = by_unit(carry[1][1].hess).ravel()[place] + delta
        unit = place // moves.shape[1]
        return carry, {
            "loss": loss_at(carry[0], data),
            "gradient": optax.tree.get(carry[1], "gradient"),
            "unit": unit,
            "move": moves.ravel()[place],
            "sigma": jax.lax.rsqrt(settings["ess"] * here),
            "gain": (h0 + delta) / here,
            "active": active[unit],
        }

    return jax.lax.scan(watched, carry, keys)[1]


def by_unit(params: Any) -> Array:
    """A row per hidden unit: its incoming weights, bias and outgoing weight."""
    return jnp.concatenate([params["w1"], params["b1"][None], params["w2"].T]).T


# --- Report ---------------------------------------------------------------------------------------


def report(journal: Journal) -> None:
    """Writes the counts, the warnings and the anatomy of one run."""
    tables = {}
    for (name,), runs in grouped(journal.select(anatomy=None), "dataset").items():
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


def diverged(runs: Runs) -> Runs:
    """Those that did."""
    return [(r, x) for r, x in runs if x["diverged"] is not None]


def guards(runs: Runs) -> Sequence[Sequence[str]]:
    """Counts by guard, and what the guard costs where nothing diverges without it."""
    by_guard = grouped(runs, "guard")
    spoiled = grouped(diverged(by_guard["none",]), *GRID)
    columns = {
        "guard": lambda group: group[0][0]["guard"],
        "runs": lambda group: f"{len(group)}",
        "diverged": lambda group: f"{len(diverged(group))}",
        "test loss, median": median,
        "where none diverged without a guard": lambda group: median(
            [(r, x) for r, x in group if tuple(r[name] for name in GRID) not in spoiled]
        ),
    }
    return table(by_guard.values(), columns)


def median(runs: Runs) -> str:
    """Of the test loss."""
    values = [np.inf if x["test"] is None else x["test"] for _, x in runs]
    return f"{np.median(values):.3f}" if values else ""


def places(runs: Runs) -> Sequence[Sequence[str]]:
    """Diverged runs without a guard, by setting."""
    free = grouped(runs, "guard")["none",]
    fields = ("sharpness", "prior_precision", "hess_init", "learning_rate")
    counts = {
        place: f"{len(diverged(here))} of {len(here)}"
        for place, here in grouped(free, *fields).items()
    }
    columns = sorted({place[2:] for place in counts})
    rows = [("sharpness, λδ", *(f"h₀ {h:g}, rate {a:g}" for h, a in columns))]
    for left in dict.fromkeys(place[:2] for place in counts):
        rows.append(("{:g}, {:g}".format(*left), *(counts[left + column] for column in columns)))
    return rows


def warnings(runs: Runs) -> Sequence[Sequence[str]]:
    """How early the warning came, and how often for nothing."""
    rows = [
        ("guard", "diverged", "warned before", "steps ahead, median", "others", "of these warned")
    ]
    for (guard,), group in grouped(runs, "guard").items():
        bad = [x for _, x in diverged(group)]
        leads = [x["diverged"] - x["warned"] for x in bad if x["warned"] is not None]
        ahead = [lead for lead in leads if lead > 0]
        good = [x for _, x in group if x["diverged"] is None]
        false = sum(x["warned"] is not None for x in good)
        lead = f"{np.median(ahead):.0f}" if ahead else ""
        rows.append((guard, f"{len(bad)}", f"{len(ahead)}", lead, f"{len(good)}", f"{false}"))
    return rows


def steps_of(seen: dict) -> Sequence[Sequence[str]]:
    """The steps around the divergence; in each, the weight that moved furthest."""
    columns = {
        "step": lambda at: f"{at['step']}",
        "loss at the mean": lambda at: f"{at['loss']:.2f}",
        "|gradient|": lambda at: f"{at['gradient']:.1f}",
        "unit": lambda at: f"{at['unit']:.0f}",
        "active in": lambda at: f"{100 * at['active']:.0f} %",
        "move": lambda at: f"{at['move']:+.2f}",
        "σ": lambda at: f"{at['sigma']:.2f}",
        "gain": lambda at: f"{at['gain']:.0f}",
    }
    names = [name for name in seen if name != "course"]
    steps = zip(*(seen[name] for name in names), strict=True)
    return table((dict(zip(names, step, strict=True)) for step in steps), columns)


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


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
