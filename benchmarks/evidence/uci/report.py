"""Tables of `uci.py` from its JSON lines."""

from collections.abc import Sequence

import numpy as np

from benchmarks._shared.journal import Journal, write_tables
from benchmarks.evidence.uci.methods import GRIDS, LABELS
from examples._shared.reporting import cell

# Test RMSE and log-likelihood of MC-dropout tuned by grid search, as published for these splits.
PUBLISHED = {"concrete": (4.82, -2.93), "power-plant": (4.01, -2.80), "yacht": (0.67, -1.25)}


def report(journal: Journal) -> None:
    """Writes, for each set, what was measured and what was chosen."""
    names = list(dict.fromkeys(run["dataset"] for run, _ in journal.select()))
    tables = {}
    for name in names:
        tables[name] = measured(journal, name)
        tables[f"{name}: chosen, and how often"] = chosen(journal, name)
    notes = (
        "Mean ± standard error over splits, units of the target. `over AdamW` is the paired "
        "difference of the log-likelihoods. The last row is MC-dropout tuned by grid search as "
        "published."
    )
    write_tables(journal, "UCI regression", tables, notes)


def measured(journal: Journal, dataset: str) -> Sequence[Sequence[str]]:
    """Test results of each method."""
    rows = [("", "splits", "test RMSE", "test log-likelihood", "over AdamW")]
    base = dict(_by_split(journal, dataset, "adamw", "log_likelihood"))
    for method, label in LABELS.items():
        trained, suffix = ("ivon", "_mean") if method == "ivon_mean" else (method, "")
        rmse = dict(_by_split(journal, dataset, trained, "rmse" + suffix))
        score = dict(_by_split(journal, dataset, trained, "log_likelihood" + suffix))
        if not score:
            continue
        common = [score[k] - base[k] for k in score if k in base]
        gain = cell(np.array(common), 3) if common and method != "adamw" else ""
        cells = cell(list(rmse.values()), 3), cell(list(score.values()), 3)
        rows.append((label, str(len(score)), *cells, gain))
    if dataset in PUBLISHED:
        rmse, score = PUBLISHED[dataset]
        rows.append(("MC-dropout, published", "20", f"{rmse:.2f}", f"{score:.2f}", ""))
    return rows


def chosen(journal: Journal, dataset: str) -> Sequence[Sequence[str]]:
    """How often each value of each hyperparameter was chosen."""
    rows = [("method", "hyperparameter", "value × splits")]
    for method, names in GRIDS.items():
        results = [x for _, x in journal.select(dataset=dataset, method=method)]
        for name, values in names.items() if results else ():
            counts = [
                (v, sum(np.isclose(x["chosen"][name], v, rtol=1e-4) for x in results))
                for v in values
            ]
            rows.append((LABELS[method], name, ", ".join(f"{v:g} × {n}" for v, n in counts)))
    return rows


def _by_split(journal: Journal, dataset: str, method: str, name: str) -> list[tuple[int, float]]:
    return [(r["split"], x[name]) for r, x in journal.select(dataset=dataset, method=method)]
