"""UCI regression: test RMSE and log-likelihood of AdamW, MC-dropout, an ensemble and IVON.

    python benchmarks/evidence/uci/main.py --data DIR/concrete    # 20 splits, 12 minutes
    python benchmarks/evidence/uci/main.py --report               # tables

DIR/concrete holds data.txt, index_features.txt, index_target.txt, and index_train_K.txt and
index_test_K.txt for each split. In each split every method tries its 24 settings (`methods.GRIDS`)
on four fifths of the training rows, takes the setting and the variance of the observations with
the highest log-likelihood of the last fifth, and is trained again on all training rows. Budget:
10,000 gradients of 32 rows per network. `eigenbasis` is IVON with its grid and
`basis=Eigenbasis(decay=0.99)`; of .95, .99 and .999 that decay was best on held-out rows of
concrete and yacht.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Evidence, Journal, command, write_tables
from benchmarks._shared.tuning import settings
from benchmarks.evidence.uci import methods
from benchmarks.evidence.uci.data import Part, Split, hold_out, load_splits, standardise
from benchmarks.evidence.uci.methods import GRIDS
from examples._shared.reporting import cell

STEPS = 10_000  # gradients per network
BLOCK = 5  # splits that are trained together
LABELS = {
    "adamw": "AdamW",
    "dropout": "MC-dropout",
    "ensemble": "ensemble of 5",
    "ivon": "IVON, 100 samples",
    "eigenbasis": "in an eigenbasis, 100 samples",
}
# Test RMSE and log-likelihood of MC-dropout tuned by grid search, as published for these splits.
PUBLISHED = {
    "boston": (2.90, -2.40),
    "concrete": (4.82, -2.93),
    "power-plant": (4.01, -2.80),
    "protein": (4.27, -2.87),
    "yacht": (0.67, -1.25),
}


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("uci.jsonl")
    data: Path | None = None
    """Folder of a set."""


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """All methods on all splits of a set."""
    if options.data is None:
        raise SystemExit("name the folder of a set with --data DIR/NAME")
    splits = load_splits(options.data)
    journal = Journal(options.results, total=len(GRIDS) * len(splits))
    for method in GRIDS:
        runs = [
            {"dataset": options.data.name, "method": method, "split": k, "steps": STEPS}
            for k in range(len(splits))
        ]
        for first in range(0, len(splits), BLOCK):
            journal.compute_all(
                runs[first : first + BLOCK],
                lambda missing: evaluate([splits[run["split"]] for run in missing], missing),
            )


def evaluate(splits: list[Split], runs: list[Any]) -> list[dict[str, Any]]:
    """Chooses, trains again and tests one method on some splits."""
    one = functools.partial(evaluate_split, runs[0]["method"], runs[0]["steps"])
    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), run["split"]) for run in runs])
    measured = jax.vmap(one)(keys, standardise(hold_out(splits)), standardise(splits))
    return [jax.tree.map(lambda x, k=k: float(x[k]), measured) for k in range(len(runs))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate_split(method: str, steps: int, key: Any, held: Part, whole: Part) -> dict[str, Any]:
    """The chosen setting; RMSE and log-likelihood in the units of the targets."""
    tried = settings(GRIDS[method])
    grid = {name: jnp.array([values[name] for values in tried]) for name in tried[0]}

    def score(values: Any) -> tuple[Any, Any]:
        draws = methods.fit_and_predict(method, steps, key, values, held.train, held.test[0])
        return methods.best_noise(draws[""], held.test[1])

    noises, scores = jax.vmap(score)(grid)
    best = jnp.argmax(jnp.where(jnp.isfinite(scores), scores, -jnp.inf))
    chosen = {name: values[best] for name, values in grid.items()}
    # The level is relative to the targets' spread, which differs a little between the two.
    noise = noises[best] * held.scale / whole.scale
    predicted = methods.fit_and_predict(method, steps, key, chosen, whole.train, whole.test[0])
    measured: dict[str, Any] = {"chosen": chosen}
    for suffix, draws in predicted.items():
        likelihood = methods.log_likelihood(draws, whole.test[1], noise)
        measured["log_likelihood" + suffix] = likelihood - jnp.log(whole.scale)
        measured["rmse" + suffix] = whole.scale * methods.root_mean_square(draws, whole.test[1])
    return measured


# --- Report ---------------------------------------------------------------------------------------


def report(journal: Journal) -> None:
    """Writes, for each set, what was measured and what was chosen."""
    tables = {}
    for name in dict.fromkeys(run["dataset"] for run, _ in journal.select()):
        tables[name] = measured_rows(journal, name)
        tables[f"{name}: chosen, and how often"] = chosen_rows(journal, name)
    notes = (
        "Mean ± standard error over splits, units of the target. `over AdamW` is the paired "
        "difference of the log-likelihoods. The last row is MC-dropout tuned by grid search as "
        "published."
    )
    write_tables(journal, "UCI regression", tables, notes)


def measured_rows(journal: Journal, dataset: str) -> Sequence[Sequence[str]]:
    """Test results of each method."""
    adamw = journal.select(dataset=dataset, method="adamw")
    base = {run["split"]: result["log_likelihood"] for run, result in adamw}
    rows = [("", "splits", "test RMSE", "test log-likelihood", "its median", "over AdamW")]
    tested = [(label, method, "") for method, label in LABELS.items()]
    at_mean = [("IVON at the mean", "ivon", "_mean"), ("at its mean", "eigenbasis", "_mean")]
    for label, method, suffix in [*tested, *at_mean]:
        found = journal.select(dataset=dataset, method=method)
        if not found:
            continue
        rmse, score = ([x[k + suffix] for _, x in found] for k in ("rmse", "log_likelihood"))
        gains = [s - base[run["split"]] for s, (run, _) in zip(score, found, strict=True)]
        gain = cell(gains, 3) if method != "adamw" else ""
        cells = cell(rmse, 3), cell(score, 3), f"{np.median(score):.3f}"
        rows.append((label, str(len(found)), *cells, gain))
    if dataset in PUBLISHED:
        rmse, score = PUBLISHED[dataset]
        rows.append(("MC-dropout, published", "", f"{rmse:.2f}", f"{score:.2f}", "", ""))
    return rows


def chosen_rows(journal: Journal, dataset: str) -> Sequence[Sequence[str]]:
    """How often each value of each hyperparameter was chosen."""
    rows = [("method", "hyperparameter", "value × splits")]
    for method, grid in GRIDS.items():
        results = [x for _, x in journal.select(dataset=dataset, method=method)]
        for name, values in grid.items() if results else ():
            chosen = np.array([x["chosen"][name] for x in results])
            counts = (f"{v:g} × {np.isclose(chosen, v, rtol=1e-4).sum()}" for v in values)
            rows.append((LABELS[method], name, ", ".join(counts)))
    return rows


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
