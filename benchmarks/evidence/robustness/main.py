"""How wide the good region of the hyperparameters is, and how many runs diverge.

    python benchmarks/robustness.py             # digits; about 15 minutes on two cores
    python benchmarks/robustness.py --report    # tables and heat maps

IVON over learning rate × hess_init × temperature (N/ess), with and without the guard
`precision_floor`, and AdamW over learning rate × weight decay; three seeds of 100 epochs each. Then
`recipes.hess_init_for`, whose quarter was read off that grid, against the same values of hess_init
on networks of other widths. A run has diverged when, at any epoch after the warmup, its training
loss at the mean is worse than that of guessing evenly, or not a number.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Journal, evidence_parser, read_journal
from benchmarks.evidence.images.image_training import MLP
from benchmarks.evidence.robustness import report as robustness_report
from benchmarks.evidence.robustness.training import WARMUP_SHARE, Run, train_lanes
from examples._shared.datasets import load_small_digits
from ivon_jax import recipes

EPOCHS, SEEDS = 100, 3
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


def main() -> None:
    """Parses the command line and computes, or reports."""
    parser = evidence_parser("Robustness of the hyperparameters on digits.", "robustness")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    if args.report:
        robustness_report.report(read_journal(args.results))
        return
    if args.epochs < 2 or args.seeds < 1:
        parser.error("--epochs must be at least 2 and --seeds at least 1")
    groups = [*ivon_groups(), *adamw_groups(), *rule_groups()]
    journal = Journal(args.results, total=args.seeds * sum(map(len, groups)))
    arrays = [jnp.asarray(x) for x in load_small_digits()[:4]]
    data, test = tuple(arrays[:2]), tuple(arrays[2:])
    for group in groups:
        runs = [
            {**values, "seed": seed, "epochs": args.epochs}
            for values in group
            for seed in range(args.seeds)
        ]
        journal.compute_all(runs, lambda missing: measure(missing, data, test))
    robustness_report.report(journal)


def ivon_groups() -> list[list[dict[str, Any]]]:
    """Settings that are trained together: those of one temperature, floor and hess_init."""
    return [
        [
            {
                "method": "ivon",
                "width": WIDTH,
                "learning_rate": rate,
                "hess_init": hess_init,
                "temperature": temperature,
                "precision_floor": floor,
            }
            for rate in LEARNING_RATES
        ]
        for floor, temperature, hess_init in itertools.product(FLOORS, TEMPERATURES, HESS_INITS)
    ]


def adamw_groups() -> list[list[dict[str, Any]]]:
    """Settings that are trained together: those of one weight decay."""
    return [
        [
            {
                "method": "adamw",
                "width": WIDTH,
                "learning_rate": rate,
                "weight_decay": decay,
            }
            for rate in ADAMW_RATES
        ]
        for decay in ADAMW_DECAYS
    ]


def rule_groups() -> list[list[dict[str, Any]]]:
    """Several hess_init for one width and temperature, the last by the rule (of one seed)."""
    groups = []
    for width in RULE_WIDTHS:
        params = MLP(width=width).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        for temperature in TEMPERATURES:
            by_rule = recipes.hess_init_for(params, NUM_TRAIN / temperature)
            groups.append(
                [
                    {
                        "method": "rule" if number == len(HESS_INITS) else "ivon",
                        "width": width,
                        "learning_rate": RULE_RATE,
                        "hess_init": hess_init,
                        "temperature": temperature,
                        "precision_floor": FLOORS[-1],
                    }
                    for number, hess_init in enumerate((*HESS_INITS, by_rule))
                ]
            )
    return groups


def measure(runs: list[Any], data: Any, test: Any) -> list[dict[str, Any]]:
    """Trains runs of one width in one computation."""
    first_run = runs[0]
    names = [n for n in first_run if n not in ("method", "seed", "epochs", "width")]
    values = {name: jnp.array([run[name] for run in runs]) for name in names}
    optimizer = "adamw" if first_run["method"] == "adamw" else "ivon"
    if optimizer == "ivon":
        values["weight_decay"] = PRIOR_PRECISION * values["temperature"] / len(data[1])
    run = Run(first_run["epochs"], first_run["width"])
    seeds = jnp.array([run["seed"] for run in runs])
    lanes = train_lanes(optimizer, run, values, seeds, data, test)
    lanes = {name: np.asarray(x) for name, x in lanes.items()}
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
    result["diverged"] = first(~(loss[start:] < math.log(10.0)), start)
    if "risk" in lane:
        result["noisy_start"] = bool(lane["start"] < 0.5)  # as `learning_status` says it
        result["warned"] = first(~(lane["risk"] <= 1.0), 0)
        result["largest_risk"] = float(np.nan_to_num(np.nanmax(lane["risk"]), posinf=1e30))
        result["largest_gain"] = float(np.nan_to_num(np.nanmax(lane["gain"]), posinf=1e30))
    return result


def first(flags: np.ndarray, offset: int) -> int | None:
    """Index of the first true element."""
    return int(np.argmax(flags)) + offset if flags.any() else None


if __name__ == "__main__":
    main()
