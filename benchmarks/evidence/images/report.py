"""Tables, verdicts and figure of the image benchmarks, made from their journal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks._shared.journal import Journal, write_tables
from benchmarks._shared.methods import Values
from benchmarks._shared.tuning import described
from benchmarks.evidence.images.claims import (
    Read,
    Results,
    at_mean,
    at_samples,
    claims,
    column,
    paired,
    reported,
    rises,
)
from benchmarks.evidence.images.methods import METHODS, POINTS, VARIATIONAL
from benchmarks.evidence.images.tuning import CHOSEN, guarded_values, overlong_values
from examples._shared.reporting import cell, mean_and_error, save_figure

DIVERGED = 10.0  # a test NLL that no network of use has
NETWORKS = {"mlp": "perceptron", "resnet": "ResNet with filter response normalisation"}
COLUMNS = {  # metric: label, factor, decimals
    "accuracy": ("accuracy, %", 100, 2),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE, %", 100, 2),
    "brier": ("Brier", 1, 4),
    "auroc_letters": ("AUROC letters", 1, 3),
    "auroc_patches": ("AUROC patches", 1, 3),
}
CURVE = ("accuracy", "nll", "ece")
UNFAMILIAR = {"letters": "letters", "patches": "patches of photographs"}
DETECTION = {
    "auroc": "AUROC",
    "aupr_out": "AUPR out",
    "aupr_in": "AUPR in",
    "fpr95": "FPR95",
    "information": "AUROC of MI",
}
COLORS = {
    "sgd": "#0072B2",
    "adamw": "#E69F00",
    "dropout": "#CC79A7",
    "swag": "#56B4E9",
    "backprop": "#999933",
    "ensemble": "#444444",
    "ivon": "#00785A",
    "ivon_bayes": "#D55E00",
}
NOTES = (
    "{train:,} training and {test:,} test images; {epochs} epochs in batches of {batch_size}; "
    "mean ± standard error over {seeds} seeds. MC-dropout, SWAG and IVON average 64 samples where "
    "no number is given; the ensemble spends five times the gradients. AUROC: how well the entropy "
    "of the prediction tells test images from letters and from patches of photographs. IVON was "
    "tuned with a temperature (ess = N / temperature), or, as ess = N, without; all settings were "
    "chosen on held-out training images. Numbers of samples: the mean over all disjoint groups of "
    "so many. Differences are paired by seed; one counts beyond two standard errors. A claim is "
    "reproduced if each of its statements holds, reversed if the opposite of the first does, and "
    "otherwise not reproduced. In over-long training IVON's b2 moves towards 1 with the length of "
    "the run (b2 to the power 1/factor); rows 'b2 kept' show what happens without, 'guard' what "
    "precision_floor=0.1 does about it."
)
DETECTION_NOTES = (
    " Detection, in %: the entropy, or in the last column the mutual information, tells test "
    "images from unfamiliar ones. AUPR out takes the unfamiliar images as positives, AUPR in the "
    "test images; FPR95 is the share of unfamiliar images that pass as familiar where 95 % of the "
    "test images do (lower is better). H: mean entropy in nats. σ: the middle 90 % of the weights' "
    "posterior standard deviations."
)
Rows = list[Sequence[str]]


def write_report(journal: Journal, identity: Mapping[str, Any], factor: int) -> None:
    """Makes the tables and the figure of the runs that a command asks for."""
    usual = collect(journal, lambda values: values, task="compare", **identity)
    if not usual:
        raise SystemExit(f"{journal.path} has no results of {identity}")
    ivons = {method: METHODS[method] for method in VARIATIONAL if method in usual}
    tables = {"Test images and unfamiliar ones": quality_rows(usual)}
    detected = {m: r for m, r in usual.items() if all("detection" in x for x in r.values())}
    for name, label in UNFAMILIAR.items() if detected else ():
        tables[f"Detection of {label}"] = detection_rows(detected, name)
    for ivon, label in ivons.items():
        tables[f"Number of posterior samples: {label}"] = sample_rows(usual, ivon)
    overlong, kept, guarded = {}, {}, {}
    if factor:
        longer = {"task": "overlong", "factor": factor, **identity}
        overlong = collect(journal, lambda values: overlong_values(values, factor), **longer)
        kept = collect(journal, lambda v: v if "b2" in v else None, **longer)
        guarded = collect(journal, lambda v: guarded_values(v) if "b2" in v else None, **longer)
    if overlong:
        tables[f"Over-long training: {factor} times the epochs"] = [
            *overlong_rows(usual, overlong),
            *overlong_rows(usual, kept, ", b2 kept")[1:],
            *overlong_rows(usual, guarded, ", b2 kept, guard")[1:],
        ]
    found = [each for ivon, label in ivons.items() for each in claims(usual, overlong, ivon, label)]
    if found:
        verdicts = ((each.name, each.verdict) for each in found)
        tables["The authors' claims"] = [("claim", "verdict"), *verdicts]
    for claim in found:
        rows = [("statement", "difference", "in errors", "holds")]
        tables[claim.name] = [*rows, *(statement.row() for statement in claim.statements)]
    chosen = CHOSEN[identity["model"], identity["dataset"]]
    settings = ((METHODS[m], described(chosen[m])) for m in usual)
    tables["Settings"] = [("", "settings"), *settings]
    title = f"Image classification: {identity['dataset']}, {NETWORKS[identity['model']]}"
    seeds = max(len(results) for results in usual.values())
    run = journal.select(task="compare", **identity)[0][0]
    notes = NOTES.format(seeds=seeds, **run) + (DETECTION_NOTES if detected else "")
    notes = f"`{command(**identity)} --seeds {seeds}`\n\n{notes}"
    write_tables(journal, title, tables, notes)
    save_figure(draw(title, usual, overlong, identity["epochs"]), journal.path.with_suffix(".png"))


def command(model: str, dataset: str, **_: Any) -> str:
    """The command line of a comparison."""
    data = "" if dataset == "digits" else f" --dataset {dataset} --data-dir DIR"
    network = "" if model == "mlp" else f" --model {model}"
    return f"python benchmarks/evidence/images/main.py{data}{network}"


def collect(
    journal: Journal, values_of: Callable[[Values], Values | None], **fields: Any
) -> dict[str, dict[int, Any]]:
    """Results by method and seed, at settings made from the chosen ones."""
    chosen = CHOSEN[fields["model"], fields["dataset"]]
    found: dict[str, dict[int, Any]] = {}
    for method in METHODS:
        values = values_of(chosen[method]) if method in chosen else None
        if values and (runs := journal.select(method=method, values=values, **fields)):
            found[method] = {run["seed"]: result for run, result in runs}
    return found


# --- Tables ---------------------------------------------------------------------------------------


def ways(method: str) -> dict[str, tuple[Callable[[str], Read], str]]:
    """Ways to predict: label, metrics, and the name of the NLLs in over-long training."""
    label = METHODS[method]
    if method not in VARIATIONAL:
        return {label: (reported, "test_nll")}
    return {
        f"{label}: mean": (at_mean, "mean_test_nll"),
        f"{label}: 64 samples": (reported, "test_nll"),
    }


def quality_rows(usual: Results) -> Rows:
    """A row per way of predicting."""
    rows: Rows = [["", *(label for label, _, _ in COLUMNS.values()), "seconds"]]
    for method, results in usual.items():
        seconds = f"{np.mean([result['seconds'] for result in results.values()]):.1f}"
        for label, (read, _) in ways(method).items():
            cells = [
                cell([factor * read(name)(result) for result in results.values()], decimals)
                for name, (_, factor, decimals) in COLUMNS.items()
            ]
            rows.append([label, *cells, seconds])
    return rows


def detection_rows(usual: Results, name: str) -> Rows:
    """How well each method tells one unfamiliar set from the test images."""
    rows: Rows = [["", "H", "H, test", *DETECTION.values(), "σ, 5 % to 95 %"]]
    for method, results in usual.items():
        found = list(results.values())
        cells = [
            "" if key == "information" and method in POINTS else cell(values, 1)
            for key in DETECTION
            if (values := [100 * result["detection"][name][key] for result in found])
        ]
        widths = [result["width"] for result in found if "width" in result]
        low, high = np.mean(widths, axis=0) if widths else (np.nan, np.nan)
        entropies = (cell([r["entropy"][which] for r in found], 3) for which in (name, "test"))
        width = f"{low:.3f} to {high:.3f}" if widths else ""
        rows.append([METHODS[method], *entropies, *cells, width])
    return rows


def sample_rows(usual: Results, ivon: str) -> Rows:
    """IVON's metrics against the number of samples, and differences from the mean."""
    rows: Rows = [["samples", "accuracy, %", "NLL", "ECE, %", "accuracy - mean's", "NLL - mean's"]]

    def row(label: str, read: Callable[[str], Read], *differences: str) -> list[str]:
        cells = [
            cell(np.multiply(list(column(usual, ivon, read(name)).values()), factor), decimals)
            for name, (_, factor, decimals) in ((name, COLUMNS[name]) for name in CURVE)
        ]
        return [label, *cells, *(differences or ("", ""))]

    rows.append(row("mean", at_mean))
    for count in next(iter(usual[ivon].values()))["curve"]["samples"]:
        differences = []
        for name in ("accuracy", "nll"):
            _, factor, decimals = COLUMNS[name]
            drawn, mean = at_samples(name, count), at_mean(name)
            lead = paired(column(usual, ivon, drawn), column(usual, ivon, mean))
            differences.append(cell(np.multiply(factor, lead), decimals))
        rows.append(row(str(count), lambda name, c=count: at_samples(name, c), *differences))
    return rows


def overlong_rows(usual: Results, overlong: Results, suffix: str = "") -> Rows:
    """NLL and accuracy after usual and over-long training."""
    header = "NLL, usual|NLL, over-long|rise|lowest on the way|train NLL|accuracy, %"
    rows: Rows = [["", *header.split("|")]]
    for method, results in overlong.items():
        for label, (read, path) in ways(method).items():
            final = [read("nll")(result["final"]) for result in results.values()]
            accuracy = [100 * read("accuracy")(result["final"]) for result in results.values()]
            before = cell(list(column(usual, method, read("nll")).values()), 4)
            if diverged := sum(not each < DIVERGED for each in final):
                word = f"diverged ({diverged} of {len(final)} seeds)"
                rows.append([label + suffix, before, word, "", "", "", cell(accuracy, 2)])
                continue
            cells = [
                cell(final, 4),
                cell(list(rises(usual, overlong, method, read("nll")).values()), 4),
                cell([min(result[path]) for result in results.values()], 4),
                cell([result["train_nll"][-1] for result in results.values()], 4),
            ]
            rows.append([label + suffix, before, *cells, cell(accuracy, 2)])
    return rows


# --- Figure ---------------------------------------------------------------------------------------

PANELS = {"nll": ("NLL", 1), "accuracy": ("accuracy, %", 100), "ece": ("ECE, %", 100)}
BARS = {"nll": ("NLL", 1), "ece": ("ECE, %", 100), "auroc_letters": ("AUROC, letters", 1)}


def draw(title: str, usual: Results, overlong: Results, epochs: int) -> Figure:
    """Metrics against the number of samples, over-long training, and all methods."""
    figure = Figure(figsize=(14, 12 if overlong else 8.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(3 if overlong else 2, 3)
    for ax, (name, (label, factor)) in zip(axes[0], PANELS.items(), strict=True):
        draw_samples(ax, usual, name, factor)
        ax.set(title="Number of posterior samples", xlabel="samples", ylabel=label)
    axes[0, 0].legend(fontsize=8, frameon=False)
    for ax, (name, (label, factor)) in zip(axes[1], BARS.items(), strict=True):
        draw_methods(ax, usual, name, factor)
        ax.set(xlabel=label, title="All methods")
    if overlong:
        draw_overlong(axes[2], overlong, epochs)
    return figure


def draw_samples(ax: Axes, usual: Results, name: str, factor: float) -> None:
    """IVON's curves with its mean (dashed), SGD and the ensemble (dotted)."""
    for method in VARIATIONAL:
        if method not in usual:
            continue
        results, color = list(usual[method].values()), COLORS[method]
        label, counts = METHODS[method], results[0]["curve"]["samples"]
        mean, error = mean_and_error([np.multiply(r["curve"][name], factor) for r in results])
        ax.errorbar(counts, mean, np.nan_to_num(error), color=color, marker="o", ms=4, label=label)
        level = float(factor * np.mean([r["mean"][name] for r in results]))
        ax.axhline(level, color=color, ls="--", lw=1.2, label=f"{label}: mean")
    for method in ("sgd", "ensemble"):
        if method in usual:
            level = float(factor * np.mean([r["metrics"][name] for r in usual[method].values()]))
            ax.axhline(level, color=COLORS[method], ls=":", lw=1.6, label=METHODS[method])
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ScalarFormatter())


def draw_methods(ax: Axes, usual: Results, name: str, factor: float) -> None:
    """A row per way of predicting, with its standard error; open circles are IVON's mean."""
    rows: list[str] = []
    for method, results in usual.items():
        label = METHODS[method]
        points = {label: [r["metrics"] for r in results.values()]}
        if method in VARIATIONAL:
            points[f"{label}: mean"] = [r["mean"] for r in results.values()]
        for row, measured in points.items():
            mean, error = mean_and_error([factor * each[name] for each in measured])
            face = "white" if row.endswith("mean") else COLORS[method]
            style: dict[str, Any] = {"color": COLORS[method], "markerfacecolor": face}
            ax.errorbar(mean, len(rows), xerr=np.nan_to_num(error), fmt="o", **style)
            rows.append(row)
    ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", lw=0.4)
    ax.margins(x=0.08)


def draw_overlong(axes: np.ndarray, overlong: Results, epochs: int) -> None:
    """NLL of test and training images along the way, and where the usual run ends."""
    titles = ("test images", "training images, at the mean", "test images, at the mean")
    paths = ("test_nll", "train_nll", "mean_test_nll")
    for ax, title, path in zip(axes, titles, paths, strict=True):
        for method, results in overlong.items():
            shown = path if method in VARIATIONAL or path == "train_nll" else "test_nll"
            found = list(results.values())
            mean, error = mean_and_error([result[shown] for result in found])
            ax.plot(found[0]["epoch"], mean, color=COLORS[method], label=METHODS[method])
            low, high = mean - np.nan_to_num(error), mean + np.nan_to_num(error)
            ax.fill_between(found[0]["epoch"], low, high, color=COLORS[method], alpha=0.2, lw=0)
        ax.axvline(epochs, color="#999999", ls=":", lw=1.2)
        ax.set(title=f"Over-long: {title}", xlabel="epoch", ylabel="NLL")
        if path == "train_nll":
            ax.set_yscale("log")
    axes[0].legend(fontsize=8, frameon=False)
