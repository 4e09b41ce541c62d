"""UCI regression: test RMSE and log-likelihood of AdamW, MC-dropout, a deep ensemble and IVON.

    python benchmarks/uci.py --data-dir DIR --dataset concrete            # 20 splits
    python benchmarks/uci.py --data-dir DIR --dataset concrete --report   # table

`DIR/NAME` holds data.txt, index_features.txt, index_target.txt, and index_train_K.txt and
index_test_K.txt for each split. In each split every method tries its 24 settings
(`uci_methods.GRIDS`) on four fifths of the training rows, takes the setting and the variance of
the observations with the highest log-likelihood of the last fifth, and is trained again on all
training rows. Budget: 10,000 gradients of 32 rows per network.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Journal, evidence_parser, read_journal
from benchmarks.evidence.uci import report as uci_report
from benchmarks.evidence.uci.data import DataError, hold_out, load_splits, standardise
from benchmarks.evidence.uci.methods import (
    GRIDS,
    Fit,
    best_noise,
    draws,
    grid,
    log_likelihood,
    root_mean_square,
    train,
)

STEPS = 10_000
BLOCK = 5  # splits that are trained together


def main() -> None:
    """Parses the command line and computes, or reports."""
    parser = evidence_parser(
        "UCI regression over the standard splits; about 6 minutes per set on two cores.", "uci"
    )
    parser.add_argument("--data-dir", type=Path, help="folder with a folder for each set")
    parser.add_argument("--dataset", help="name of that folder, such as concrete")
    parser.add_argument("--methods", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--splits", type=int, help="only the first so many splits", default=None)
    parser.add_argument("--steps", type=int, default=STEPS, help="gradients per network")
    args = parser.parse_args()
    if args.report:
        uci_report.report(read_journal(args.results))
        return
    if args.data_dir is None or args.dataset is None:
        parser.error("name the data with --data-dir DIR --dataset NAME")
    if args.steps < 2 or (args.splits is not None and args.splits < 1):
        parser.error("--steps must be at least 2 and --splits at least 1")
    try:
        splits = load_splits(args.data_dir / args.dataset)[: args.splits]
    except DataError as error:
        parser.error(str(error))
    journal = Journal(args.results, total=len(args.methods) * len(splits))
    for method in args.methods:
        for first in range(0, len(splits), BLOCK):
            numbers = range(first, min(first + BLOCK, len(splits)))
            runs = [
                {"dataset": args.dataset, "method": method, "split": k, "steps": args.steps}
                for k in numbers
            ]
            journal.compute_all(
                runs,
                lambda missing: evaluate([splits[run["split"]] for run in missing], missing),
            )
    uci_report.report(journal)


def evaluate(splits: list[tuple[np.ndarray, ...]], runs: list[Any]) -> list[dict[str, Any]]:
    """Chooses, trains again and tests one method on some splits."""
    method, fit = runs[0]["method"], Fit(runs[0]["steps"])
    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), run["split"]) for run in runs])
    settings = grid(method)
    held = standardise(hold_out(splits))
    scores, noises = choose(fit, method, keys, settings, held)
    best = jnp.argmax(jnp.where(jnp.isfinite(scores), scores, -jnp.inf), axis=1)
    chosen = {name: values[best] for name, values in settings.items()}
    noise = jnp.take_along_axis(noises, best[:, None], axis=1)[:, 0]
    # The level is relative to the targets' spread, which differs a little between the two.
    part = standardise(splits)
    measured = test(fit, method, keys, chosen, noise * held.scale / part.scale, part)
    rows = []
    for index in range(len(runs)):
        values = {name: float(x[index]) for name, x in chosen.items()}
        held_out = [round(float(x), 4) for x in scores[index] - np.log(held.scale[index])]
        results = {name: float(x[index]) for name, x in measured.items()}
        rows.append({"chosen": values, "held_out": held_out, **results})
    return rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def choose(fit: Fit, method: str, keys: Any, settings: Any, part: Any) -> tuple[Any, Any]:
    """Held-out log-likelihood and noise of each split and setting."""

    def one(key: Any, values: Any, data: Any, held_out: Any) -> tuple[Any, Any]:
        fitted = train(fit, method, key, values, data)
        predicted = draws(fit, method, jax.random.fold_in(key, 1), values, fitted, held_out[0])
        noise, score = best_noise(predicted, held_out[1])
        return score, noise

    over_settings = jax.vmap(one, (None, 0, None, None))
    return jax.vmap(over_settings, (0, None, 0, 0))(keys, settings, part.train, part.test)


@functools.partial(jax.jit, static_argnums=(0, 1))
def test(fit: Fit, method: str, keys: Any, chosen: Any, noise: Any, part: Any) -> dict[str, Any]:
    """RMSE and log-likelihood in the units of the targets, with those of IVON's mean beside."""

    def one(key: Any, values: Any, s: Any, data: Any, held_out: Any, scale: Any) -> dict[str, Any]:
        fitted = train(fit, method, key, values, data)
        measured = {"noise": s * scale}
        for name in [method, "ivon_mean"] if method == "ivon" else [method]:
            predicted = draws(fit, name, jax.random.fold_in(key, 1), values, fitted, held_out[0])
            suffix = "_mean" if name == "ivon_mean" else ""
            measured["rmse" + suffix] = root_mean_square(predicted, held_out[1]) * scale
            score = log_likelihood(predicted, held_out[1], s)
            measured["log_likelihood" + suffix] = score - jnp.log(scale)
        return measured

    return jax.vmap(one)(keys, chosen, noise, part.train, part.test, part.scale)


if __name__ == "__main__":
    main()
