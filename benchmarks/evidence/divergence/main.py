"""How a run of IVON blows up, what warns of it, and what prevents it.

    python benchmarks/divergence.py                                       # scikit-learn's diabetes
    python benchmarks/divergence.py --data-dir DIR --dataset concrete     # as for uci.py
    python benchmarks/divergence.py --report                              # tables and figure

A network of 50 ReLUs and half the mean squared error, 10,000 steps of 32 rows, over rate ×
hess_init × ess/N × prior precision λδ, eight seeds each, without a guard and with several. A run
has diverged when, after the warmup, the training loss at the mean is worse than that of a
constant (looked at every 50 steps), or not a number. The first run that diverged is then
repeated and written down step by step.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_diabetes

from benchmarks._shared.journal import Journal, evidence_parser, read_journal
from benchmarks.evidence.divergence import report as divergence_report
from benchmarks.evidence.divergence.training import CHECK, Run, trace, train_lanes
from benchmarks.evidence.uci.data import DataError, load_splits, standardise

STEPS, SEEDS = 10_000, 8
RATES = (0.1, 0.2, 0.3)
HESS_INITS = (0.1, 0.5)
SHARPNESS = (1.0, 4.0)  # ess/N
PRIOR_PRECISIONS = (2.0, 10.0)  # λδ
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


def main() -> None:
    """Parses the command line and computes, or reports."""
    parser = evidence_parser("Divergence and its guards; about 10 minutes.", "divergence")
    parser.add_argument("--data-dir", type=Path, help="folder with a folder for each set")
    parser.add_argument("--dataset", default="diabetes", help="name of that folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    if args.report:
        divergence_report.report(read_journal(args.results))
        return
    if args.seeds < 1 or args.steps < 2 * CHECK or args.steps % CHECK:
        parser.error(f"--seeds must be at least 1 and --steps a multiple of {CHECK}, above it")
    try:
        data = load(args.data_dir, args.dataset)
    except DataError as error:
        parser.error(str(error))
    settings = [
        dict(zip(("learning_rate", "hess_init", "sharpness", "prior_precision"), x, strict=True))
        for x in itertools.product(RATES, HESS_INITS, SHARPNESS, PRIOR_PRECISIONS)
    ]
    common = {"dataset": args.dataset, "steps": args.steps}
    journal = Journal(args.results, total=1 + len(GUARDS) * len(settings) * args.seeds)
    for guard in GUARDS:
        runs = [
            {**common, "guard": guard, **values, "seed": seed}
            for values in settings
            for seed in range(args.seeds)
        ]
        journal.compute_all(runs, lambda missing: measure(missing, data))
    diverged = [
        (run, x)
        for run, x in journal.select(**common, guard="none")
        if x.get("diverged") is not None
    ]
    if diverged:
        # The first of them: no choice is made.
        run, result = diverged[0]
        journal.compute({**run, "anatomy": True}, lambda: anatomy(run, result["diverged"], data))
    divergence_report.report(journal)


def load(data_dir: Path | None, dataset: str) -> Any:
    """Training and test rows, standardised by the former."""
    if data_dir is not None:
        split = load_splits(data_dir / dataset)[0]
    elif dataset == "diabetes":
        x, y = load_diabetes(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(y))
        train, test = order[44:], order[:44]
        split = (x[train], y[train], x[test], y[test])
    else:
        raise DataError(f"{dataset} is read from files: give --data-dir")
    part = standardise([split])
    return jax.tree.map(lambda a: jnp.asarray(a[0]), (part.train, part.test))


def arguments(runs: list[Any]) -> dict[str, jax.Array]:
    """Settings of all lanes, by name."""
    names = ("learning_rate", "hess_init", "sharpness", "prior_precision")
    return {name: jnp.array([float(run[name]) for run in runs]) for name in names}


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
    steps = Run(run["steps"], ())
    seen = jax.tree.map(np.asarray, trace(steps, values, jnp.array(run["seed"]), *data))
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


if __name__ == "__main__":
    main()
