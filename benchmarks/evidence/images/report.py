"""Tables and verdicts of `images.py`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks._shared.journal import Journal, write_tables
from benchmarks.evidence.images.claims import (
    Results,
    at_mean,
    at_samples,
    claims,
    column,
    paired,
    reported,
    rises,
)
from benchmarks.evidence.images.figure import draw
from benchmarks.evidence.images.training import Values
from benchmarks.evidence.images.tuning import CHOSEN, described, guarded_values, overlong_values
from examples._shared.reporting import cell, save_figure

METHODS = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "dropout": "MC-dropout",
    "swag": "SWAG",
    "ensemble": "ensemble of 5",
    "ivon": "IVON",
    "ivon_bayes": "IVON, ess = N",
}
DIVERGED = 10.0  # a test NLL that no network of use has
VARIATIONAL = ("ivon", "ivon_bayes")
NETWORKS = {"mlp": "perceptron", "resnet": "ResNet with filter response normalisation"}
COLUMNS = {  # metric: label, factor, decimals
    "accuracy": ("accuracy, %", 100, 2),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE, %", 100, 2),
    "brier": ("Brier", 1, 4),
    "auroc_letters": ("AUROC letters", 1, 3),
    "auroc_patches": ("AUROC patches", 1, 3),
}
Rows = list[Sequence[str]]


def write_report(journal: Journal, identity: Mapping[str, Any], factor: int) -> None:
    """Makes the tables and the figure of the runs that a command asks for."""
    usual = collect(journal, lambda values: values, task="compare", **identity)
    longer = {"task": "overlong", "factor": factor, **identity}
    overlong, kept, guarded = {}, {}, {}
    if factor:
        overlong = collect(journal, lambda values: overlong_values(values, factor), **longer)
        kept = collect(journal, lambda values: values if "b2" in values else None, **longer)
        guarded = collect(
            journal, lambda values: guarded_values(values) if "b2" in values else None, **longer
        )
    if not usual:
        raise SystemExit(f"{journal.path} has no results of {identity}")
    ivons = {method: METHODS[method] for method in VARIATIONAL if method in usual}
    tables = {"Test images and unfamiliar ones": quality_rows(usual)}
    for ivon, label in ivons.items():
        tables[f"Number of posterior samples: {label}"] = sample_rows(usual, ivon)
    if overlong:
        tables[f"Over-long training: {factor} times the epochs"] = [
            *overlong_rows(usual, overlong),
            *overlong_rows(usual, kept, ", b2 kept")[1:],
            *overlong_rows(usual, guarded, ", b2 kept, guard")[1:],
        ]
    found = [each for ivon, label in ivons.items() for each in claims(usual, overlong, ivon, label)]
    if found:
        tables["The authors' claims"] = [
            ("claim", "verdict"),
            *((each.name, each.verdict) for each in found),
        ]
    for claim in found:
        rows = [("statement", "difference", "in errors", "holds")]
        tables[claim.name] = [*rows, *(statement.row() for statement in claim.statements)]
    tables["Settings"] = settings_rows(usual, identity)
    title = f"Image classification: {identity['dataset']}, {NETWORKS[identity['model']]}"
    write_tables(journal, title, tables, notes(journal, usual, identity))
    figure = draw(title, METHODS, usual, overlong, identity["epochs"])
    save_figure(figure, journal.path.with_suffix(".png"))


def collect(
    journal: Journal, values_of: Callable[[Values], Values | None], **fields: Any
) -> dict[str, dict[int, Any]]:
    """Results by method and seed, at settings made from the chosen ones."""
    chosen = CHOSEN[fields["model"]][fields["dataset"]]
    found: dict[str, dict[int, Any]] = {}
    for method in METHODS:
        values = values_of(chosen[method]) if method in chosen else None
        if values and (runs := journal.select(method=method, values=values, **fields)):
            found[method] = {run["seed"]: result for run, result in runs}
    return found


def notes(journal: Journal, usual: Results, identity: Mapping[str, Any]) -> str:
    """What was trained and how to read the tables."""
    run = journal.select(task="compare", **identity)[0][0]
    seeds = max(len(results) for results in usual.values())
    return (
        f"{run['train']:,} training and {run['test']:,} test images; {identity['epochs']} epochs "
        f"in batches of {identity['batch_size']}; mean ± standard error over {seeds} seeds. "
        "MC-dropout, SWAG and IVON average 64 samples where no number is given; the ensemble "
        "spends five times the gradients. AUROC: how well the entropy of the prediction tells test "
        "images from letters and from patches of photographs. IVON was tuned with a temperature "
        "(ess = N / temperature), or, as ess = N, without; all settings were chosen on held-out "
        "training images. Numbers of samples: the mean over all disjoint groups of so many. "
        "Differences are paired by seed; one counts beyond two standard errors. A claim is "
        "reproduced if each of its statements holds, reversed if the opposite of the first does, "
        "and otherwise not reproduced. In over-long training IVON's b2 moves towards 1 with the "
        "length of the run (b2 to the power 1/factor); rows 'b2 kept' show what happens without, "
        "'guard' what precision_floor=0.1 does about it."
    )


def quality_rows(usual: Results) -> Rows:
    """A row per way of predicting."""
    rows: Rows = [["", *(label for label, _, _ in COLUMNS.values()), "seconds"]]
    for method, results in usual.items():
        ways: dict[str, Callable] = {METHODS[method]: reported}
        if method in VARIATIONAL:
            ways = {f"{METHODS[method]}: mean": at_mean, f"{METHODS[method]}: 64 samples": reported}
        seconds = f"{np.mean([result['seconds'] for result in results.values()]):.1f}"
        for label, read in ways.items():
            cells = [
                cell([factor * read(name)(result) for result in results.values()], decimals)
                for name, (_, factor, decimals) in COLUMNS.items()
            ]
            rows.append([label, *cells, seconds])
    return rows


def sample_rows(usual: Results, ivon: str) -> Rows:
    """IVON's metrics against the number of samples, and differences from the mean."""
    rows: Rows = [["samples", "accuracy, %", "NLL", "ECE, %", "accuracy - mean's", "NLL - mean's"]]
    results = usual[ivon]

    def row(label: str, read: Callable, *differences: str) -> list[str]:
        columns = {name: list(column(usual, ivon, read(name)).values()) for name in COLUMNS_CURVE}
        cells = [
            cell(np.multiply(columns[name], COLUMNS[name][1]), COLUMNS[name][2])
            for name in COLUMNS_CURVE
        ]
        return [label, *cells, *(differences or ("", ""))]

    rows.append(row("mean", at_mean))
    for count in next(iter(results.values()))["curve"]["samples"]:
        differences = [
            cell(np.multiply(factor, difference(usual, ivon, name, count)), decimals)
            for name, factor, decimals in (("accuracy", 100, 2), ("nll", 1, 4))
        ]
        rows.append(row(str(count), lambda name, c=count: at_samples(name, c), *differences))
    return rows


COLUMNS_CURVE = ("accuracy", "nll", "ece")


def difference(usual: Results, ivon: str, name: str, count: int) -> list[float]:
    """A metric with so many samples less that of the mean, by seed."""
    return paired(column(usual, ivon, at_samples(name, count)), column(usual, ivon, at_mean(name)))


def overlong_rows(usual: Results, overlong: Results, suffix: str = "") -> Rows:
    """NLL and accuracy after usual and over-long training."""
    rows: Rows = [
        [
            "",
            "NLL, usual",
            "NLL, over-long",
            "rise",
            "lowest on the way",
            "train NLL",
            "accuracy, %",
        ]
    ]
    for method, results in overlong.items():
        ways: dict[str, tuple[Callable, str]] = {METHODS[method]: (reported, "test_nll")}
        if method in VARIATIONAL:
            ways = {
                f"{METHODS[method]}: mean": (at_mean, "mean_test_nll"),
                f"{METHODS[method]}: 64 samples": (reported, "test_nll"),
            }
        for label, (read, path) in ways.items():
            final = [read("nll")(result["final"]) for result in results.values()]
            accuracy = [100 * read("accuracy")(result["final"]) for result in results.values()]
            before = cell(list(column(usual, method, read("nll")).values()), 4)
            if diverged := sum(not each < DIVERGED for each in final):
                word = f"diverged ({diverged} of {len(final)} seeds)"
                rows.append([label + suffix, before, word, "", "", "", cell(accuracy, 2)])
                continue
            rows.append(
                [
                    label + suffix,
                    before,
                    cell(final, 4),
                    cell(list(rises(usual, overlong, method, read("nll")).values()), 4),
                    cell([min(result[path]) for result in results.values()], 4),
                    cell([result["train_nll"][-1] for result in results.values()], 4),
                    cell(accuracy, 2),
                ]
            )
    return rows


def settings_rows(usual: Results, identity: Mapping[str, Any]) -> Rows:
    """The hyperparameters of each method."""
    chosen = CHOSEN[identity["model"]][identity["dataset"]]
    return [("", "settings"), *((METHODS[m], described(chosen[m])) for m in usual)]
